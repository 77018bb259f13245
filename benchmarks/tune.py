"""Sweep launch rows on the GPU at hand and print the table rows that launch.py should have.

    python -m benchmarks.tune [family ...]

Every candidate is tried on the operation itself, without autograd, at SiT-XL/2's size for 256
images of 256 tokens (the optimiser on 64 Mi elements). A candidate that does not launch (registers,
shared memory) is named and skipped. Proposals are printed, never applied: a table changes in a
reviewed commit, with the record that says why. `sweeps` and `using` are for who times otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton

from benchmarks.common import command_line
from fastrepa_kernels import adaln, adamw_ema, launch
from fastrepa_kernels.activation import activate, activate_backward, column_sums
from fastrepa_kernels.attention import _stacked
from fastrepa_kernels.cost import median_seconds
from fastrepa_kernels.projector_alignment import projector_alignment

Work = Callable[[], object]
DO_NOT_LAUNCH = (
    triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.CompilationError,
)  # fmt: skip


class SweepSize(NamedTuple):
    """The size of the tensors that operations are tried on; flat: elements of the optimiser's."""

    device: str = "cuda"
    images: int = 256
    tokens: int = 256
    flat: int = 1 << 26
    dtype: torch.dtype = torch.bfloat16

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


LARGE = SweepSize()


class Sweep(NamedTuple):
    """A sweep: `work` runs the operation with table[key]; candidates are values for it."""

    label: str
    table: dict
    key: Any
    candidates: list
    work: Work


def _norm(size: SweepSize, width: int, backward: bool) -> Work:
    """The gated norm around an fp32 stream; backward makes y again, as a training step does."""
    x = size.randn(size.images, size.tokens, width, dtype=torch.float32)
    branch = size.randn(size.images, size.tokens, width)
    gate, shift, scale = size.randn(size.images, 3 * width).chunk(3, dim=1)
    given = (x, branch, gate, shift, scale)
    if not backward:
        return lambda: adaln._norm_modulate(*given, adaln.EPS, size.dtype)
    _, y, mean, rstd = adaln._norm_modulate(*given, adaln.EPS, size.dtype)
    dy, dx_new = torch.randn_like(y), torch.randn_like(x)
    return lambda: adaln._norm_gradients(dy, dx_new, *given, mean, rstd, True, size.dtype)


def _residual(size: SweepSize) -> Work:
    dx = size.randn(size.images, size.tokens, 1152, dtype=torch.float32)
    branch, gate = size.randn(size.images, size.tokens, 1152), size.randn(size.images, 1152)
    return lambda: adaln._gated_residual_backward(dx, branch, gate, True)


def _cosine(size: SweepSize, width: int) -> Work:
    """The whole alignment with a narrow projector: what changes with the row is the cosine."""
    rows, p = size.rows // 4, 64
    shapes = ((p, p), (p,), (p, p), (p,), (width, p), (width,))
    x, weights = size.randn(rows, p), [size.randn(*s).requires_grad_() for s in shapes]
    target = size.randn(rows, width)
    return lambda: projector_alignment(x, weights, target, chunk_rows=rows)


def _activation(size: SweepSize, backward: bool) -> Work:
    a = size.randn(size.rows, 4608)
    out = torch.empty_like(a)
    if not backward:
        return lambda: activate(a, out, gelu=True)
    dh = torch.randn_like(a)
    return lambda: activate_backward(dh, a, out, gelu=True, sums=True)


def _stack(size: SweepSize) -> Work:
    grads = [size.randn(size.images, size.tokens, 16, 72) for _ in range(3)]
    return lambda: _stacked(grads, True)


def _sums(size: SweepSize) -> Work:
    t = size.randn(size.rows, 1152)
    return lambda: column_sums(t)


def _optimiser(size: SweepSize) -> Work:
    p, m, v, e = (size.randn(size.flat, dtype=torch.float32).abs_() for _ in range(4))
    g = size.randn(size.flat)
    return lambda: adamw_ema.adamw_ema_(p, g, m, v, e, step=10, lr=1e-4)


def _alignment_forward(size: SweepSize) -> Work:
    shapes = ((2048, 1152), (2048,), (2048, 2048), (2048,), (768, 2048), (768,))
    rows, weights = size.rows // 4, [size.randn(*s) for s in shapes]
    x, target = size.randn(rows, 1152), size.randn(rows, 768)
    return lambda: projector_alignment(x, weights, target)


def _gemms(first: launch.Gemm) -> Iterator[launch.Gemm]:
    for m, n in ((128, 128), (128, 256), (256, 128), (64, 256)):
        for k in (32, 64):
            for warps in (4, 8):
                for stages in (3, 4, 5):
                    yield replace(
                        first, block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages
                    )


def _pieces(width: int) -> Iterator[tuple[int, int]]:
    """Return (block_d, tail) of the row in one piece, and in two where that pads less."""
    padded = triton.next_power_of_2(width)
    yield padded, 0
    tail = triton.next_power_of_2(width - padded // 2)
    if tail < padded // 2:
        yield padded // 2, tail


def row_candidates(family: str, width: int) -> list[launch.Rows]:
    """Rows for `width`: pieces, rows at once, warps, and backward also stages and splits.

    A thread holds 4 to 36 values of a row forward; backward 4 to 16, beside three sums.
    """
    backward = family == "norm_backward"
    found = []
    for block_d, tail in _pieces(width) if family != "cosine" else [(width, 0)]:
        held = block_d + tail
        for warps in (1, 2, 4, 8, 16):
            if not 4 <= held / (32 * warps) <= (36 if family == "norm_forward" else 16):
                continue
            row = launch.Rows(block_d, 1, warps, tail=tail)
            if backward:
                found += [replace(row, stages=n, split=split) for n in (1, 2) for split in (32, 64)]
            elif family == "norm_forward":
                found += [replace(row, block_n=n) for n in (1, 2)]
            else:
                found.append(row)
    return found


def sweeps(
    generation: int, families: Sequence[str] = (), size: SweepSize = LARGE
) -> Iterator[Sweep]:
    """Every row of every table of `generation`; with `families`, where the label starts with one.

    An operation's tensors are made when its turn comes.
    """

    def wanted(label: str) -> bool:
        return not families or label.startswith(tuple(families))

    for family, tables in launch.ROWS.items():
        for width in tables[generation]:
            if wanted(label := f"{family} {width}"):
                candidates = row_candidates(family, width)
                cosine, backward = family == "cosine", family == "norm_backward"
                work = _cosine(size, width) if cosine else _norm(size, width, backward)
                yield Sweep(label, tables[generation], width, candidates, work)
    flats = [launch.Flat(b, w) for b in (512, 1024, 2048, 4096) for w in (2, 4, 8)]
    few = [launch.Flat(b, w) for b in (128, 256, 512) for w in (1, 2, 4)]
    columns = [
        launch.Columns(n, c, rows, w)
        for n in (8, 16, 32) for c in (64, 128, 256) for rows in (64, 128, 256) for w in (4, 8)
    ]  # fmt: skip
    gemms = launch.GEMM["cosine_sums"]
    others: list[tuple[str, dict, list, Callable[[], Work]]] = [
        ("activation", launch.FLAT["activation"], flats, lambda: _activation(size, False)),
        ("optimiser", launch.FLAT["optimiser"], flats, lambda: _optimiser(size)),
        ("norm_sums", launch.FLAT["norm_sums"], few, lambda: _norm(size, 1152, True)),
        (
            "columns activation",
            launch.COLUMNS["activation"],
            columns,
            lambda: _activation(size, True),
        ),
        ("columns residual", launch.COLUMNS["residual"], columns, lambda: _residual(size)),
        ("columns stack", launch.COLUMNS["stack"], columns, lambda: _stack(size)),
        ("columns sums", launch.COLUMNS["sums"], columns, lambda: _sums(size)),
        ("cosine_sums", gemms, list(_gemms(gemms[generation])), lambda: _alignment_forward(size)),
    ]
    for label, table, candidates, build in others:
        if wanted(label):
            yield Sweep(label, table, generation, candidates, build())


@contextmanager
def using(table: dict, key: Any, candidate: Any) -> Iterator[None]:
    """Run the block with `candidate` in the table, which is restored."""
    before, table[key] = table[key], candidate
    try:
        yield
    finally:
        table[key] = before


def _time(table: dict, key: Any, candidate: Any, work: Work) -> float | None:
    """Seconds with `candidate`, None if it does not launch."""
    try:
        with using(table, key, candidate):
            return median_seconds(work, torch.device("cuda"), 20)
    except DO_NOT_LAUNCH as error:
        print(f"    {candidate}: {type(error).__name__}")
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("tune", __doc__)
    parser.add_argument("families", nargs="*", help="rows whose label starts so")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: no CUDA device; launch tables can only be timed on one")
        return 2
    generation = launch.generation(torch.device("cuda"))
    for label, table, key, candidates, work in sweeps(generation, options.families):
        now = _time(table, key, table[key], work)
        timed = [(_time(table, key, c, work), c) for c in candidates]
        best = min(((s, c) for s, c in timed if s is not None), key=lambda pair: pair[0])
        current = "does not launch" if now is None else f"{1000 * now:.3f} ms"
        print(f"{label} sm_{generation}: now {table[key]} {current}; best {best[1]} ", end="")
        print(f"{1000 * best[0]:.3f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
