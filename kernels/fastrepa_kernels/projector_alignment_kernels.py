"""The Triton kernels of projector_alignment.py, which has the formulas and the operation."""

from __future__ import annotations

from fastrepa_kernels import launch
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.aot.sass import Traffic
from fastrepa_kernels.language import tl, triton


@triton.jit
def _cosine_kernel(
    z_ptr, y_ptr, y_scale_ptr, weight_ptr, cos_ptr, sums_ptr, N, Z, eps,
    GRAD: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Walk down ROWS rows: v c to cos [N], dz over z [N,Z], its sums to sums [cdiv(N, ROWS), Z]."""
    pid = tl.program_id(0)
    start = pid * ROWS
    offs_z = tl.arange(0, BLOCK_D)
    mask = offs_z < Z
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for n in range(start, tl.minimum(start + ROWS, N)):
        row = tl.full((), 0, tl.int64) + n
        offs = row * Z + offs_z  # [BLOCK_D] int64
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_D]
        y = tl.load(y_ptr + offs, mask=mask, other=0).to(tl.float32)  # [BLOCK_D]
        if y_scale_ptr is not None:
            y *= tl.load(y_scale_ptr + row)
        weight = 1.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row)
        length = tl.sqrt(tl.sum(z * z, 0))
        rz = 1.0 / tl.maximum(length, eps)
        ry = 1.0 / tl.maximum(tl.sqrt(tl.sum(y * y, 0)), eps)
        c = tl.sum(z * y, 0) * rz * ry
        tl.store(cos_ptr + row, weight * c)
        if GRAD:
            along = tl.where(length < eps, 0.0, c * rz)  # below eps the norm is a constant
            dz = weight * rz * (y * ry - along * z)
            tl.store(z_ptr + offs, dz.to(z_ptr.dtype.element_ty), mask=mask)
            if SUMS:
                acc += dz
    if SUMS:
        tl.store(sums_ptr + (pid.to(tl.int64) * Z + offs_z), acc, mask=mask)


@triton.jit
def _cosine_sums_gemm_kernel(
    h_ptr, w_ptr, b_ptr, y_ptr, y_scale_ptr, sums_ptr, M, N, K, num_pid_m, num_pid_n, stride_sums,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a tile of z [M,N] = h [M,K] w^T [K,N] + b [N] and write its row sums, not itself.

    M rows, N = Z features, K = P. sums [3, num_pid_n, M]: of z^2, z y and y^2.
    """
    pid = tl.program_id(0)
    num_pid_in_group = GROUP_M * num_pid_n  # neighbours share weight tiles in L2
    first_pid_m = pid // num_pid_in_group * GROUP_M
    group_size_m = tl.minimum(num_pid_m - first_pid_m, GROUP_M)
    pid_m = first_pid_m + pid % num_pid_in_group % group_size_m
    pid_n = pid % num_pid_in_group // group_size_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = offs_m.to(tl.int64)  # [BLOCK_M]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Rows and columns past the end read others again, unmasked, and are not stored.
    offs_hm, offs_wn = (offs_m % M).to(tl.int64), (offs_n % N).to(tl.int64)
    lanes_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        offs_k = k * BLOCK_K + lanes_k
        offs_h = offs_hm[:, None] * K + offs_k[None, :]  # [BLOCK_M, BLOCK_K] int64
        h = tl.load(h_ptr + offs_h, mask=(offs_k < K)[None, :], other=0.0)
        offs_w = offs_wn[None, :] * K + offs_k[:, None]  # [BLOCK_K, BLOCK_N] int64
        w = tl.load(w_ptr + offs_w, mask=(offs_k < K)[:, None], other=0.0)
        acc = tl.dot(h, w, acc)
    acc += tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    z = tl.where(mask, acc, 0.0)  # wrapped columns hold other columns' projections
    y = tl.load(y_ptr + (row[:, None] * N + offs_n[None, :]), mask=mask, other=0).to(tl.float32)
    if y_scale_ptr is not None:
        y *= tl.load(y_scale_ptr + row, mask=offs_m < M, other=0.0)[:, None]
    sums_ptrs = sums_ptr + (pid_n.to(tl.int64) * M + row)  # [BLOCK_M]
    tl.store(sums_ptrs, tl.sum(z * z, 1), mask=offs_m < M)
    tl.store(sums_ptrs + stride_sums, tl.sum(z * y, 1), mask=offs_m < M)
    tl.store(sums_ptrs + 2 * stride_sums, tl.sum(y * y, 1), mask=offs_m < M)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Write x * factor to y, flat."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
    mask = offs < size
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    y = x * tl.load(factor_ptr)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def _aot_cases() -> list[AotCase]:
    bf, fp = "*bf16", "*fp32"
    cases = []
    for generation in launch.GENERATIONS:
        for width, row in launch.ROWS["cosine"][generation].items():
            for target in ("bf16", "int8"):
                absent = {} if target == "int8" else {"y_scale_ptr": None, "weight_ptr": None}
                cases.append(AotCase(
                    _cosine_kernel, f"{target} target width {width}", generation,
                    {
                        "z_ptr": bf, "y_ptr": "*i8" if target == "int8" else bf, "y_scale_ptr": fp,
                        "weight_ptr": fp, "cos_ptr": fp, "sums_ptr": fp, "eps": "fp32",
                    },
                    {
                        "GRAD": True, "SUMS": True, "ROWS": 16, "BLOCK_D": row.block_d,
                        **absent,
                    },
                    row.num_warps, registers=96, shared=32768,
                    wide_loads=1 if target == "int8" else 2, long_offsets=("z_ptr", "y_ptr"),
                    traffic=Traffic((3 if target == "int8" else 4) * width, 2 * width),
                ))  # fmt: skip
        table = launch.GEMM["cosine_sums"][generation]
        cases.append(AotCase(
            _cosine_sums_gemm_kernel, f"{table.block_m}x{table.block_n}x{table.block_k}",
            generation,
            {"h_ptr": bf, "w_ptr": bf, "b_ptr": bf, "y_ptr": bf, "sums_ptr": fp},
            {
                "y_scale_ptr": None, "GROUP_M": table.group_m, "BLOCK_M": table.block_m,
                "BLOCK_N": table.block_n, "BLOCK_K": table.block_k,
            },
            table.num_warps, num_stages=table.num_stages, registers=255,
            shared=99 * 1024 if generation == 80 else 227 * 1024, wide_loads=4, wgmma=True,
            long_offsets=("h_ptr", "w_ptr", "y_ptr"),
        ))  # fmt: skip
        flat = launch.FLAT["activation"][generation]
        cases.append(AotCase(
            _scale_kernel, f"block {flat.block}", generation,
            {"x_ptr": bf, "factor_ptr": fp, "y_ptr": bf}, {"BLOCK": flat.block}, flat.num_warps,
            registers=64, shared=0, wide_loads=2, long_offsets=("x_ptr", "y_ptr"),
            traffic=Traffic(2 * flat.block, 2 * flat.block),
        ))  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
