"""The Triton kernels of adaln.py, which has the formulas, the shapes and the operations.

A row is one or two tensors, BLOCK_D and TAIL wide (launch.Rows). A pointer that a variant does not
take is None, and what would need it is not compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrepa_kernels import launch
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.sass import Traffic


@triton.jit
def _read(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _vectors(gate_ptr, shift_ptr, scale_ptr, d, D):
    """A sample's (1 + scale, shift, gate) at the columns d; what is absent is never read."""
    scale = 1.0 + _read(scale_ptr, d, d < D)
    shift = scale if shift_ptr is None else _read(shift_ptr, d, d < D)
    gate = scale if gate_ptr is None else _read(gate_ptr, d, d < D)
    return scale, shift, gate


@triton.jit
def _stream(x_ptr, branch_ptr, x_new_ptr, gate, at, inside):
    """x, or x + gate branch as it will be stored: backward sees that, so the statistics do too."""
    x = _read(x_ptr, at, inside)  # [BLOCK_N, columns]
    if branch_ptr is not None:
        x += gate[None, :] * _read(branch_ptr, at, inside)
        x = x.to(x_new_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _norm_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, x_new_ptr, y_ptr, mean_ptr, rstd_ptr,
    gate_stride, shift_stride, scale_stride, T, D, tiles, eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)  # a tile never spans two samples
    t = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row = b * T + t  # [BLOCK_N] int64: N * D may pass 2^31
    shift_ptr += b * shift_stride
    scale_ptr += b * scale_stride
    if branch_ptr is not None:
        gate_ptr += b * gate_stride
    d = tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]  # [BLOCK_N, BLOCK_D]
    at = row[:, None] * D + d[None, :]  # [BLOCK_N, BLOCK_D] int64
    scale, shift, gate = _vectors(gate_ptr, shift_ptr, scale_ptr, d, D)  # [BLOCK_D]
    x = _stream(x_ptr, branch_ptr, x_new_ptr, gate, at, inside)
    if TAIL:
        e = BLOCK_D + tl.arange(0, TAIL)
        inside_tail = (t < T)[:, None] & (e < D)[None, :]  # [BLOCK_N, TAIL]
        at_tail = row[:, None] * D + e[None, :]  # [BLOCK_N, TAIL] int64
        scale_tail, shift_tail, gate_tail = _vectors(gate_ptr, shift_ptr, scale_ptr, e, D)
        tail = _stream(x_ptr, branch_ptr, x_new_ptr, gate_tail, at_tail, inside_tail)
    if branch_ptr is not None:  # after every load: stores and barriers hold later ones up
        tl.store(x_new_ptr + at, x.to(x_new_ptr.dtype.element_ty), mask=inside)
        if TAIL:
            tl.store(x_new_ptr + at_tail, tail.to(x_new_ptr.dtype.element_ty), mask=inside_tail)
    total = tl.sum(x, 1)  # [BLOCK_N]
    if TAIL:
        total += tl.sum(tail, 1)
    mean = total / D
    x = tl.where(inside, x - mean[:, None], 0.0)
    square = tl.sum(x * x, 1)  # [BLOCK_N]
    if TAIL:
        tail = tl.where(inside_tail, tail - mean[:, None], 0.0)
        square += tl.sum(tail * tail, 1)
    rstd = 1.0 / tl.sqrt(square / D + eps)
    y = x * rstd[:, None] * scale[None, :] + shift[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if TAIL:
        y = tail * rstd[:, None] * scale_tail[None, :] + shift_tail[None, :]
        tl.store(y_ptr + at_tail, y.to(y_ptr.dtype.element_ty), mask=inside_tail)
    tl.store(mean_ptr + row, mean, mask=t < T)
    tl.store(rstd_ptr + row, rstd, mask=t < T)


@triton.jit
def _row(dy_ptr, dx_new_ptr, x_ptr, branch_ptr, mean, rstd, at, inside):
    """(dy, h, dx_new, branch) at the columns of one row; what is absent is never read."""
    dy = _read(dy_ptr, at, inside)
    x = _read(x_ptr, at, inside)
    dx_new = x if dx_new_ptr is None else _read(dx_new_ptr, at, inside)
    branch = x if branch_ptr is None else _read(branch_ptr, at, inside)
    return dy, tl.where(inside, (x - mean) * rstd, 0.0), dx_new, branch


@triton.jit
def _row_gradients(
    dx_ptr, dbranch_ptr, y_ptr, dx_new_ptr, branch_ptr,
    row, vectors, sums, rstd, g_mean, gh_mean, at, inside,
):  # fmt: skip
    """Store dx, dbranch and y of one row; return the sums with this row."""
    dy, h, dx_new, branch = row
    scale, shift, gate = vectors
    dshift, dscale, dgate = sums
    dx = rstd * (dy * scale - g_mean - h * gh_mean)
    if dx_new_ptr is not None:
        dx += dx_new
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if branch_ptr is not None:
        tl.store(dbranch_ptr + at, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=inside)
        dgate += branch * dx
    if y_ptr is not None:
        tl.store(y_ptr + at, (h * scale + shift).to(y_ptr.dtype.element_ty), mask=inside)
    return dshift + dy, dscale + dy * h, dgate


@triton.jit
def _store_parts(parts_ptr, branch_ptr, sums, at, stride, inside):
    dshift, dscale, dgate = sums
    tl.store(parts_ptr + at, dshift, mask=inside)
    tl.store(parts_ptr + (at + stride), dscale, mask=inside)
    if branch_ptr is not None:
        tl.store(parts_ptr + (at + 2 * stride), dgate, mask=inside)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, dx_new_ptr, x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dbranch_ptr, y_ptr, parts_ptr, gate_stride, shift_stride, scale_stride, T, D, splits,
    part_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // splits).to(tl.int64)
    first = (pid % splits) * ROWS
    scale_ptr += b * scale_stride
    if shift_ptr is not None:
        shift_ptr += b * shift_stride
    if branch_ptr is not None:
        gate_ptr += b * gate_stride
    d = tl.arange(0, BLOCK_D)
    vectors = _vectors(gate_ptr, shift_ptr, scale_ptr, d, D)  # [BLOCK_D] each
    zero = tl.zeros((BLOCK_D,), tl.float32)
    sums = zero, zero, zero
    if TAIL:
        e = BLOCK_D + tl.arange(0, TAIL)
        vectors_tail = _vectors(gate_ptr, shift_ptr, scale_ptr, e, D)  # [TAIL] each
        zero_tail = tl.zeros((TAIL,), tl.float32)
        sums_tail = zero_tail, zero_tail, zero_tail
    for t in tl.range(first, tl.minimum(first + ROWS, T), num_stages=STAGES):
        row = b * T + t  # int64
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        at = row * D + d  # [BLOCK_D] int64
        main = _row(dy_ptr, dx_new_ptr, x_ptr, branch_ptr, mean, rstd, at, d < D)
        if TAIL:  # before the sums: their barriers hold later loads up
            at_tail = row * D + e  # [TAIL] int64
            tail = _row(dy_ptr, dx_new_ptr, x_ptr, branch_ptr, mean, rstd, at_tail, e < D)
        g = main[0] * vectors[0]
        g_sum, gh_sum = tl.sum(g, 0), tl.sum(g * main[1], 0)
        if TAIL:
            g = tail[0] * vectors_tail[0]
            g_sum += tl.sum(g, 0)
            gh_sum += tl.sum(g * tail[1], 0)
        sums = _row_gradients(
            dx_ptr, dbranch_ptr, y_ptr, dx_new_ptr, branch_ptr,
            main, vectors, sums, rstd, g_sum / D, gh_sum / D, at, d < D,
        )  # fmt: skip
        if TAIL:
            sums_tail = _row_gradients(
                dx_ptr, dbranch_ptr, y_ptr, dx_new_ptr, branch_ptr,
                tail, vectors_tail, sums_tail, rstd, g_sum / D, gh_sum / D, at_tail, e < D,
            )  # fmt: skip
    if parts_ptr is not None:
        part = pid.to(tl.int64) * D  # parts are [2 or 3, B * splits, D]
        _store_parts(parts_ptr, branch_ptr, sums, part + d, part_stride, d < D)
        if TAIL:
            _store_parts(parts_ptr, branch_ptr, sums_tail, part + e, part_stride, e < D)


@triton.jit
def _sums_kernel(
    parts_ptr, first_ptr, second_ptr, third_ptr, D, splits, part_stride, BLOCK_D: tl.constexpr
):
    """The second stage: up to three sums over a sample's splits, in fixed order."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.zeros((BLOCK_D,), tl.float32)
    second = tl.zeros((BLOCK_D,), tl.float32)
    third = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(splits):
        at = (b * splits + split) * D + d  # [BLOCK_D] int64
        first += tl.load(parts_ptr + at, mask=d < D, other=0.0)
        if second_ptr is not None:
            second += tl.load(parts_ptr + (at + part_stride), mask=d < D, other=0.0)
        if third_ptr is not None:
            third += tl.load(parts_ptr + (at + 2 * part_stride), mask=d < D, other=0.0)
    at = b * D + d
    tl.store(first_ptr + at, first.to(first_ptr.dtype.element_ty), mask=d < D)
    if second_ptr is not None:
        tl.store(second_ptr + at, second.to(second_ptr.dtype.element_ty), mask=d < D)
    if third_ptr is not None:
        tl.store(third_ptr + at, third.to(third_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _residual_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, x_new_ptr, gate_stride, T, D, tiles, strips,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0) // strips  # neighbours read on in the same rows
    b = (pid // tiles).to(tl.int64)
    t = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    d = (tl.program_id(0) % strips) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t < T)[:, None] & (d < D)[None, :]  # [BLOCK_N, BLOCK_C]
    at = (b * T + t)[:, None] * D + d[None, :]  # [BLOCK_N, BLOCK_C] int64
    gate = _read(gate_ptr + b * gate_stride, d, d < D)
    x_new = _stream(x_ptr, branch_ptr, x_new_ptr, gate, at, inside)
    tl.store(x_new_ptr + at, x_new.to(x_new_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _residual_bwd_kernel(
    dx_ptr, branch_ptr, gate_ptr, dbranch_ptr, parts_ptr, gate_stride, T, D, splits,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // splits).to(tl.int64)
    d = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = _read(gate_ptr + b * gate_stride, d, d < D)[None, :]
    dgate = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        t = (pid % splits) * ROWS + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        inside = (t < T)[:, None] & (d < D)[None, :]  # [BLOCK_N, BLOCK_C]
        at = (b * T + t)[:, None] * D + d[None, :]  # [BLOCK_N, BLOCK_C] int64
        dx = _read(dx_ptr, at, inside)
        if parts_ptr is not None:
            dgate += dx * _read(branch_ptr, at, inside)
        tl.store(dbranch_ptr + at, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=inside)
    if parts_ptr is not None:
        at = pid.to(tl.int64) * D + d  # parts are [B * splits, D]
        tl.store(parts_ptr + at, tl.sum(dgate, 0), mask=d < D)


# Budget in bytes: what moving values between the fp32 and the bf16 thread layouts takes.
SHARED = 16384
# Of the rows for the widths of SiT-S, B, L and XL, at least, and of the residual alone: estimates.
FORWARD_SHARE, BACKWARD_SHARE = 0.80, 0.75
REAL_WIDTHS = (384, 768, 1024, 1152)


def _aot_cases() -> list[AotCase]:
    """bf16 branches and modulation around an fp32 residual stream, at every row of the table."""
    cases = []
    for generation in launch.GENERATIONS:
        for width, row in launch.ROWS["norm_forward"][generation].items():
            cases += [_aot_forward(generation, width, row, gated) for gated in (False, True)]
        for width, row in launch.ROWS["norm_backward"][generation].items():
            cases += [_aot_backward(generation, width, row, gated, True) for gated in (False, True)]
            if width == max(REAL_WIDTHS):  # less of the same code
                cases += [
                    _aot_backward(generation, width, row, gated, False) for gated in (False, True)
                ]
        cases += _aot_other_cases(generation)
    return cases


def _aot_forward(generation: int, width: int, row: launch.Rows, gated: bool) -> AotCase:
    bf, fp = "*bf16", "*fp32"
    return AotCase(
        _norm_fwd_kernel, f"{'gated ' if gated else ''}width {width}", generation,
        {
            "x_ptr": fp, "branch_ptr": bf, "gate_ptr": bf, "shift_ptr": bf, "scale_ptr": bf,
            "x_new_ptr": fp, "y_ptr": bf, "mean_ptr": fp, "rstd_ptr": fp, "eps": "fp32",
        },
        {
            "BLOCK_N": row.block_n, "BLOCK_D": row.block_d, "TAIL": row.tail,
            **({} if gated else {"branch_ptr": None, "gate_ptr": None}),
        },
        row.num_warps, registers=168, shared=SHARED, wide_loads=4 if gated else 2,
        long_offsets=("x_ptr", "y_ptr"),
        traffic=Traffic(
            row.block_n * width * (6 if gated else 4), row.block_n * width * (6 if gated else 2),
            row.block_n,
        ),
        share=FORWARD_SHARE if width in REAL_WIDTHS else 0.0,
    )  # fmt: skip


def _aot_backward(
    generation: int, width: int, row: launch.Rows, gated: bool, again: bool
) -> AotCase:
    """With y made again, as adaln_linear's and adaln_mlp's backward take it, and without."""
    bf, fp = "*bf16", "*fp32"
    absent = [] if gated else ["branch_ptr", "gate_ptr", "dx_new_ptr"]
    absent += [] if again else ["y_ptr", "shift_ptr"]
    label = f"{'gated ' if gated else ''}{'y again ' if again else ''}width {width}"
    return AotCase(
        _norm_bwd_kernel, label, generation,
        {
            "dy_ptr": bf, "dx_new_ptr": fp, "x_ptr": fp, "branch_ptr": bf, "gate_ptr": bf,
            "shift_ptr": bf, "scale_ptr": bf, "mean_ptr": fp, "rstd_ptr": fp, "dx_ptr": fp,
            "dbranch_ptr": bf, "y_ptr": bf, "parts_ptr": fp,
        },
        {
            "ROWS": row.split, "BLOCK_D": row.block_d, "TAIL": row.tail, "STAGES": row.stages,
            **dict.fromkeys(absent),
        },
        row.num_warps, registers=168, shared=SHARED, wide_loads=4 if gated else 2,
        long_offsets=("x_ptr", "dx_ptr"),
        traffic=Traffic(
            width * (12 if gated else 6), width * ((6 if gated else 4) + (2 if again else 0))
        ),
        share=BACKWARD_SHARE if width in REAL_WIDTHS else 0.0,
    )  # fmt: skip


def _aot_other_cases(generation: int) -> list[AotCase]:
    bf, fp = "*bf16", "*fp32"
    table, flat = launch.COLUMNS["residual"][generation], launch.FLAT["norm_sums"][generation]
    tile = {"BLOCK_N": table.block_n, "BLOCK_C": table.block_c}
    cells = table.block_n * table.block_c
    return [
        AotCase(
            _residual_fwd_kernel, "any width", generation,
            {"x_ptr": fp, "branch_ptr": bf, "gate_ptr": bf, "x_new_ptr": fp}, tile,
            table.num_warps, registers=64, shared=SHARED, wide_loads=3,
            long_offsets=("x_ptr", "branch_ptr", "x_new_ptr"),
            traffic=Traffic(6 * cells, 4 * cells), share=FORWARD_SHARE,
        ),
        AotCase(
            _residual_bwd_kernel, "any width", generation,
            {"dx_ptr": fp, "branch_ptr": bf, "gate_ptr": bf, "dbranch_ptr": bf, "parts_ptr": fp},
            {**tile, "ROWS": table.rows}, table.num_warps, registers=96, shared=SHARED,
            wide_loads=3, long_offsets=("dx_ptr", "branch_ptr", "dbranch_ptr"),
            traffic=Traffic(6 * cells, 2 * cells), share=BACKWARD_SHARE,
        ),
        AotCase(
            _sums_kernel, "three sums", generation,
            {"parts_ptr": fp, "first_ptr": bf, "second_ptr": bf, "third_ptr": bf},
            {"BLOCK_D": flat.block}, flat.num_warps, registers=64, shared=0, wide_loads=3,
            long_offsets=("parts_ptr", "first_ptr"),
        ),
    ]  # fmt: skip


AOT_CASES = _aot_cases()
