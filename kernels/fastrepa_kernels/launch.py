"""This module alone decides every operation's path (Triton or torch) and block sizes.

Path: Triton for CUDA tensors, the torch path elsewhere and for float64. `with backend("triton")`
forces Triton (CPU tensors then need TRITON_INTERPRET=1), `with backend("torch")` forces torch.

Block sizes: an explicit table per kernel family, keyed by device generation (80 Ampere, 90 Hopper,
100 Blackwell) and padded width. There is no run-time autotuning: a table gives the same numbers,
the same speed and the same bits in every run. `python -m benchmarks.tune` proposes new rows.
The rows of most families were swept on an H200 at SiT-XL/2's size, the norms' also at SiT-B's
(benchmarks/records/gpu_suite_h200.jsonl). Other widths, and the generations for which nothing else
is written, have these or come from register counts (see aot.py) and from the bytes one
multiprocessor must keep in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrepa_kernels.language import INSTALLED

GENERATIONS = (80, 90, 100)

# Row kernels hold a whole row in registers; wider rows take the torch path.
WIDEST_ROW = 4096

# A plain global, not a context variable: CUDA backwards run on autograd's own thread.
_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the path of every operation inside the block: "triton", "torch" or "auto"."""
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f'backend: name must be "auto", "triton" or "torch"; got {name!r}')
    global _forced
    before, _forced = _forced, None if name == "auto" else name
    try:
        yield
    finally:
        _forced = before


def use_triton(x: Tensor, width: int = 1) -> bool:
    """Tell whether an operation on x [...], whose row kernels span `width`, runs Triton kernels.

    Raises ValueError where x is on a CUDA device that is not the current one, RuntimeError where
    there is no Triton.
    """
    if _forced == "torch" or x.dtype == torch.float64 or width > WIDEST_ROW:
        return False
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        # Triton launches on the current device; there, x's memory is another device's.
        raise ValueError(
            f"fastrepa_kernels: tensors are on {x.device} but the current device is "
            f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device first"
        )
    if not (x.is_cuda or _forced == "triton"):
        return False
    if not INSTALLED:
        raise RuntimeError(
            "fastrepa_kernels: Triton is not installed (pip install triton); without it, "
            'fastrepa_kernels.launch.backend("torch") has the torch paths'
        )
    return True


def generation(device: torch.device) -> int:
    """Return the table to use: the newest known generation that the device can stand in for."""
    if device.type != "cuda":
        return 90  # the interpreter: any table computes the same thing
    major = torch.cuda.get_device_capability(device)[0]
    # Capability 12 is Blackwell with Ampere's shared memory per block (about 100 KB).
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype torch.autocast wants for products where x [...] is; None where it is off."""
    kind = x.device.type
    if kind == "meta":  # shapes without numbers, which torch.autocast does not know
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(x: Tensor) -> torch.autocast:
    """Turn autocast off where x [...] is: an op's dtypes are decided and must not change again."""
    return torch.autocast(x.device.type, enabled=False)


def arithmetic_dtype(*operands: Tensor | None) -> torch.dtype:
    """Return the dtype arithmetic runs in: float64 where any operand [...] is, else float32."""
    any64 = any(t is not None and t.dtype == torch.float64 for t in operands)
    return torch.float64 if any64 else torch.float32


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has fast matrix products of `dtype`.

    oneDNN has them of a half dtype where the instructions are there (AVX-512 for bfloat16).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    known = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return known._is_mkldnn_bf16_supported()
    return known._is_mkldnn_fp16_supported()


@dataclass(frozen=True)
class Rows:
    """The launch row of a kernel that holds whole rows, block_n at a time.

    A row is held in one piece, block_d wide, or in two, the second `tail` wide: widths are rarely
    powers of two, and in one piece 1152 would be padded to 2048, 44% of it nothing. Where a program
    walks down rows it sums at most `split` of them and loads `stages` ahead (1: none). resident:
    programs that a multiprocessor holds, by the registers they take; 0 where waves are not counted.
    """

    block_d: int
    block_n: int
    num_warps: int
    tail: int = 0
    stages: int = 1
    split: int = 64
    resident: int = 0

    @property
    def width(self) -> int:
        """The widest row that fits, in elements."""
        return self.block_d + self.tail


@dataclass(frozen=True)
class Columns:
    """The launch row of a kernel that walks down `rows` rows of block_c columns and sums each."""

    block_n: int
    block_c: int
    rows: int
    num_warps: int


@dataclass(frozen=True)
class Flat:
    """The launch row of a pointwise kernel over a flat tensor."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class Gemm:
    """The launch row of a matrix product: a program makes one block_m x block_n tile of it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8  # tiles of this many row blocks share their weight tiles in L2


# The widths of SiT-S, B and XL have rows of their own, in two pieces.
_FORWARD = {
    384: Rows(256, 2, 1, tail=128),
    512: Rows(512, 1, 1),
    768: Rows(512, 1, 1, tail=256),
    1024: Rows(1024, 1, 1),
    1152: Rows(2048, 2, 4),  # padded: in pieces an H200 took 6% longer
    2048: Rows(2048, 1, 4),
    4096: Rows(4096, 1, 8),
}
# One row at a time: the per-sample sums live in registers beside the row.
_BACKWARD = {
    384: Rows(256, 1, 1, tail=128),
    512: Rows(512, 1, 2),
    768: Rows(512, 1, 2, tail=256, split=32),
    1024: Rows(1024, 1, 4),
    1152: Rows(1024, 1, 4, tail=128, resident=3),
    2048: Rows(2048, 1, 8),
    4096: Rows(4096, 1, 16),
}
_COSINE = {
    512: Rows(512, 1, 2),
    1024: Rows(1024, 1, 4),
    2048: Rows(2048, 1, 8),
    4096: Rows(4096, 1, 16),
}

ROWS: dict[str, dict[int, dict[int, Rows]]] = {
    "norm_forward": dict.fromkeys(GENERATIONS, _FORWARD),
    "norm_backward": dict.fromkeys(GENERATIONS, _BACKWARD),
    "cosine": dict.fromkeys(GENERATIONS, _COSINE),
}
COLUMNS: dict[str, dict[int, Columns]] = {
    "activation": dict.fromkeys(GENERATIONS, Columns(16, 128, 256, 8)),
    "residual": dict.fromkeys(GENERATIONS, Columns(16, 128, 256, 8)),
    "stack": dict.fromkeys(GENERATIONS, Columns(32, 64, 64, 4)),
    "sums": dict.fromkeys(GENERATIONS, Columns(8, 256, 256, 4)),
    "parts": dict.fromkeys(GENERATIONS, Columns(64, 32, 64, 4)),  # one program, whatever rows
}
FLAT: dict[str, dict[int, Flat]] = {
    "activation": dict.fromkeys(GENERATIONS, Flat(2048, 4)),
    "optimiser": dict.fromkeys(GENERATIONS, Flat(1024, 4)),
    "norm_sums": dict.fromkeys(GENERATIONS, Flat(256, 2)),
    "keyed_random": dict.fromkeys(GENERATIONS, Flat(128, 4)),  # four values each
}
# Within 99 KB of shared memory on sm_80, so that 8.6 and 8.9 devices launch the same rows.
GEMM: dict[str, dict[int, Gemm]] = {
    "cosine_sums": {
        80: Gemm(128, 128, 32, 8, 4),
        90: Gemm(128, 128, 64, 8, 4),
        100: Gemm(128, 128, 64, 8, 4),
    },
}
# Rows handled in one go by projector_alignment. CPU: every chunk starts about 35 parallel regions,
# and each costs milliseconds where the cores are shared with other work: few large chunks, 35 MiB
# of buffers in fp32. CUDA: the products of a small chunk fill their last wave badly and every chunk
# has its launches, so the largest whose buffers are at most this share of the device's memory:
# 32,768 rows on 80 GB (587 MB at P=2048, Z=768 in bf16), 16,384 on 40 GB. Of all its memory, not of
# what is free: sums of chunks are rounded, and a run must give its bits again.
CPU_CHUNK_ROWS = 1024
CUDA_CHUNK_ROWS = (32768, 16384, 8192, 4096)
CHUNK_SHARE = 1 / 128


def rows(family: str, width: int, device: torch.device) -> Rows:
    """Return the narrowest launch row of a row kernel that holds `width`, at most WIDEST_ROW."""
    table = ROWS[family][generation(device)]
    return table[min(held for held in table if held >= width)]


def rows_per_split(batch: int, tokens: int, most: int = 64, slots: int = 0) -> int:
    """Return how many rows a program of a two-stage reduction sums: few on small inputs.

    The partial sums cost 8/rows bytes per element and sum; 512 programs fill any current device.
    slots: programs that run at once, where that is known: then at most 1.5 `most`, such that the
    last wave is nearly full.
    """
    if slots and batch * tokens >= slots * most:
        splits = range(-(-2 * tokens // (3 * most)), max(1, tokens // 16) + 1)
        each = {n: -(-tokens // n) for n in splits}
        return each[min(splits, key=lambda n: (-(-batch * n // slots) * each[n], n))]
    for size in (64, 32, 16):
        if size <= most and batch * -(-tokens // size) >= 512:
            return size
    return 8


def slots(row: Rows, device: torch.device) -> int:
    """Return how many programs of `row` run at once, 0 where that is not known."""
    if device.type != "cuda":
        return 0
    return row.resident * torch.cuda.get_device_properties(device).multi_processor_count


def chunk_rows(device: torch.device, row_bytes: int) -> int:
    """Return the rows of a chunk whose buffers take `row_bytes` a row."""
    if device.type != "cuda":
        return CPU_CHUNK_ROWS
    allowed = CHUNK_SHARE * torch.cuda.get_device_properties(device).total_memory
    return next((n for n in CUDA_CHUNK_ROWS if n * row_bytes <= allowed), CUDA_CHUNK_ROWS[-1])


def cosine_rows(rows: int) -> int:
    """Return how many rows a program of the cosine kernel walks down: few where there are few.

    Its partial sums cost 4 bytes an element for every such walk; 2,048 programs fill any device.
    """
    for size in (16, 8):
        if -(-rows // size) >= 2048:
            return size
    return 4
