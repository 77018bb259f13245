"""The Triton kernel of attention.py: it puts gradients of q, k and v together and sums columns."""

from __future__ import annotations

import triton
import triton.language as tl

from fastrepa_kernels import launch
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.sass import Traffic


@triton.jit
def _stack_kernel(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, sums_ptr, N, C,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write dq, dk, dv [N,C] side by side to out [N,3C]; sums [cdiv(N, ROWS), 3C] of ROWS rows."""
    pid_c, pid_n = tl.program_id(0), tl.program_id(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    acc_q = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    acc_k = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        offs_n = pid_n * ROWS + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        row_start = offs_n.to(tl.int64)[:, None] * C  # [BLOCK_N, 1] int64
        mask = (offs_n < N)[:, None] & (offs_c < C)[None, :]
        offs = row_start + offs_c[None, :]  # [BLOCK_N, BLOCK_C] int64
        dq = tl.load(dq_ptr + offs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_C]
        dk = tl.load(dk_ptr + offs, mask=mask, other=0.0)
        dv = tl.load(dv_ptr + offs, mask=mask, other=0.0)
        out_ptrs = out_ptr + (3 * row_start + offs_c[None, :])
        tl.store(out_ptrs, dq, mask=mask)
        tl.store(out_ptrs + C, dk, mask=mask)
        tl.store(out_ptrs + 2 * C, dv, mask=mask)
        if SUMS:  # reduced once, after the loop: no barrier within it
            acc_q += dq.to(tl.float32)
            acc_k += dk.to(tl.float32)
            acc_v += dv.to(tl.float32)
    if SUMS:
        sums_ptrs = sums_ptr + (pid_n.to(tl.int64) * 3 * C + offs_c)
        tl.store(sums_ptrs, tl.sum(acc_q, 0), mask=offs_c < C)
        tl.store(sums_ptrs + C, tl.sum(acc_k, 0), mask=offs_c < C)
        tl.store(sums_ptrs + 2 * C, tl.sum(acc_v, 0), mask=offs_c < C)


def _aot_cases() -> list[AotCase]:
    pointers = dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr", "out_ptr"), "*bf16")
    return [
        AotCase(
            _stack_kernel, "with sums" if sums else "without sums", generation,
            {**pointers, "sums_ptr": "*fp32"},
            {
                "SUMS": sums, "ROWS": table.rows, "BLOCK_N": table.block_n,
                "BLOCK_C": table.block_c,
            },
            table.num_warps, registers=128, shared=8192, wide_loads=3,
            long_offsets=("dq_ptr", "dk_ptr", "dv_ptr", "out_ptr"),
            traffic=Traffic(6 * table.block_n * table.block_c, 6 * table.block_n * table.block_c),
        )
        for generation, table in launch.COLUMNS["stack"].items()
        for sums in (False, True)
    ]  # fmt: skip


AOT_CASES = _aot_cases()
