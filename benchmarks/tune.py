"""Sweep launch rows on the GPU at hand and print the table rows that launch.py should have.

    python -m benchmarks.tune [family ...]

Every candidate is tried on the operation itself, at SiT-XL/2's size for 64 images of 256 tokens
(the optimiser on 64 Mi elements). A candidate that does not launch (registers, shared memory) is
named and skipped. Proposals are printed, never applied: a table changes in a reviewed commit, with
the record that says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from fastrepa_kernels import adaln, adamw_ema, launch
from fastrepa_kernels.activation import activate, activate_backward
from fastrepa_kernels.cost import median_seconds
from fastrepa_kernels.projector_alignment import projector_alignment

IMAGES, TOKENS = 64, 256
# One real width for every padded one.
REAL_WIDTH = {512: 384, 1024: 768, 2048: 1152, 4096: 4096}
BF16 = torch.bfloat16


def _cuda(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def _norm(width: int, backward: bool) -> Callable[[], object]:
    x = _cuda(IMAGES, TOKENS, width, dtype=torch.float32).requires_grad_(backward)
    branch = _cuda(IMAGES, TOKENS, width).requires_grad_(backward)
    vectors = [_cuda(IMAGES, width).requires_grad_(backward) for _ in range(3)]

    def forward() -> tuple[torch.Tensor, ...]:
        return adaln.gated_residual_layernorm_modulate(x, branch, *vectors)

    if not backward:
        return forward
    outputs = forward()
    upstream = [torch.randn_like(y) for y in outputs]
    leaves = [x, branch, *vectors]
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def _cosine(width: int) -> Callable[[], object]:
    """The whole alignment with a narrow projector: what changes with the row is the cosine."""
    rows, p = IMAGES * TOKENS, 64
    shapes = ((p, p), (p,), (p, p), (p,), (width, p), (width,))
    x, weights = _cuda(rows, p), [_cuda(*s).requires_grad_() for s in shapes]
    target = _cuda(rows, width)
    return lambda: projector_alignment(x, weights, target, chunk_rows=rows)


def _activation(backward: bool) -> Callable[[], object]:
    a = _cuda(IMAGES * TOKENS, 4608)
    out = torch.empty_like(a)
    if not backward:
        return lambda: activate(a, out, gelu=True)
    dh = torch.randn_like(a)
    return lambda: activate_backward(dh, a, out, gelu=True, sums=True)


def _optimiser() -> Callable[[], object]:
    p, m, v, e = (_cuda(1 << 26, dtype=torch.float32).abs_() for _ in range(4))
    g = _cuda(1 << 26)
    return lambda: adamw_ema.adamw_ema_(p, g, m, v, e, step=10, lr=1e-4)


def _alignment_forward() -> Callable[[], object]:
    shapes = ((2048, 1152), (2048,), (2048, 2048), (2048,), (768, 2048), (768,))
    x, weights, target = _cuda(16384, 1152), [_cuda(*s) for s in shapes], _cuda(16384, 768)
    return lambda: projector_alignment(x, weights, target)


def _gemms(first: launch.Gemm) -> Iterator[launch.Gemm]:
    for m, n in ((128, 128), (128, 256), (256, 128), (64, 256)):
        for k in (32, 64):
            for warps in (4, 8):
                for stages in (3, 4, 5):
                    yield replace(
                        first, block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages
                    )


def _sweeps(generation: int) -> Iterator[tuple[str, dict, Any, list, Callable[[], object]]]:
    """(label, table, key, candidates, work) of every row of every table."""
    for family, tables in launch.ROWS.items():
        for padded in tables[generation]:
            width = REAL_WIDTH[padded]
            heights = (1, 2, 4, 8) if family == "norm_forward" else (1,)
            candidates = [launch.Rows(padded, n, w) for n in heights for w in (1, 2, 4, 8, 16)]
            backward = family == "norm_backward"
            work = _cosine(width) if family == "cosine" else _norm(width, backward)
            yield f"{family} {padded}", tables[generation], padded, candidates, work
    flats = [launch.Flat(b, w) for b in (512, 1024, 2048, 4096) for w in (2, 4, 8)]
    yield "activation", launch.FLAT["activation"], generation, flats, _activation(False)
    yield "optimiser", launch.FLAT["optimiser"], generation, flats, _optimiser()
    columns = [
        launch.Columns(n, c, rows, w)
        for n in (8, 16, 32) for c in (64, 128, 256) for rows in (64, 128, 256) for w in (4, 8)
    ]  # fmt: skip
    yield "columns", launch.COLUMNS["activation"], generation, columns, _activation(True)
    table = launch.GEMM["cosine_sums"]
    yield "cosine_sums", table, generation, list(_gemms(table[generation])), _alignment_forward()


def _time(table: dict, key: Any, candidate: Any, work: Callable[[], object]) -> float | None:
    """Seconds with `candidate` in the table, None if it does not launch; the table is restored."""
    before, table[key] = table[key], candidate
    try:
        return median_seconds(work, torch.device("cuda"), 20)
    except (triton.runtime.errors.OutOfResources, triton.CompilationError) as error:
        print(f"    {candidate}: {type(error).__name__}")
        return None
    finally:
        table[key] = before


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("families", nargs="*", help="rows whose label starts so")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: no CUDA device; launch tables can only be timed on one")
        return 2
    generation = launch.generation(torch.device("cuda"))
    # The generations share their first rows: give this one tables of its own.
    for tables in launch.ROWS.values():
        tables[generation] = dict(tables[generation])
    for label, table, key, candidates, work in _sweeps(generation):
        if options.families and not label.startswith(tuple(options.families)):
            continue
        now = _time(table, key, table[key], work)
        timed = [(_time(table, key, c, work), c) for c in candidates]
        best = min(((s, c) for s, c in timed if s is not None), key=lambda pair: pair[0])
        current = "does not launch" if now is None else f"{1000 * now:.3f} ms"
        print(f"{label} sm_{generation}: now {table[key]} {current}; best {best[1]} ", end="")
        print(f"{1000 * best[0]:.3f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
