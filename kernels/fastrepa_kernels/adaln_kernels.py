"""The kernels of adaln.py, Triton's and the torch path: formulas and shapes are there.

A row is one or two tensors, BLOCK_D and TAIL wide (launch.Rows). A pointer that a variant does not
take is None, and what would need it is not compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.aot.sass import Traffic
from fastrepa_kernels.language import tl, triton


@triton.jit
def _load(ptr, offs, mask):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_vectors(gate_ptr, shift_ptr, scale_ptr, offs_d, D):
    """A sample's (1 + scale, shift, gate) at the columns offs_d; what is absent is never read."""
    scale = 1.0 + _load(scale_ptr, offs_d, offs_d < D)
    shift = scale if shift_ptr is None else _load(shift_ptr, offs_d, offs_d < D)
    gate = scale if gate_ptr is None else _load(gate_ptr, offs_d, offs_d < D)
    return scale, shift, gate


@triton.jit
def _load_residual(x_ptr, branch_ptr, x_new_ptr, gate, offs, mask):
    """Return x, or x + gate branch as it will be stored: backward sees that, so statistics do."""
    x = _load(x_ptr, offs, mask)  # [BLOCK_N, columns]
    if branch_ptr is not None:
        x += gate[None, :] * _load(branch_ptr, offs, mask)
        x = x.to(x_new_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _norm_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, x_new_ptr, y_ptr, mean_ptr, rstd_ptr,
    stride_gate, stride_shift, stride_scale, T, D, num_pid_t, eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Norm BLOCK_N tokens of one sample; mean, rstd [B,T]."""
    pid = tl.program_id(0)
    b = (pid // num_pid_t).to(tl.int64)  # a block of tokens never spans two samples
    offs_t = (pid % num_pid_t) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row = b * T + offs_t  # [BLOCK_N] int64: N * D may pass 2^31
    shift_ptr += b * stride_shift
    scale_ptr += b * stride_scale
    if branch_ptr is not None:
        gate_ptr += b * stride_gate
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_t < T)[:, None] & (offs_d < D)[None, :]  # [BLOCK_N, BLOCK_D]
    offs = row[:, None] * D + offs_d[None, :]  # [BLOCK_N, BLOCK_D] int64
    scale, shift, gate = _load_vectors(gate_ptr, shift_ptr, scale_ptr, offs_d, D)  # [BLOCK_D]
    x = _load_residual(x_ptr, branch_ptr, x_new_ptr, gate, offs, mask)
    if TAIL:
        offs_e = BLOCK_D + tl.arange(0, TAIL)
        mask_tail = (offs_t < T)[:, None] & (offs_e < D)[None, :]  # [BLOCK_N, TAIL]
        offs_tail = row[:, None] * D + offs_e[None, :]  # [BLOCK_N, TAIL] int64
        scale_tail, shift_tail, gate_tail = _load_vectors(
            gate_ptr, shift_ptr, scale_ptr, offs_e, D
        )  # [TAIL]
        x_tail = _load_residual(x_ptr, branch_ptr, x_new_ptr, gate_tail, offs_tail, mask_tail)
    if branch_ptr is not None:  # after every load: stores and barriers hold later ones up
        tl.store(x_new_ptr + offs, x.to(x_new_ptr.dtype.element_ty), mask=mask)
        if TAIL:
            tl.store(x_new_ptr + offs_tail, x_tail.to(x_new_ptr.dtype.element_ty), mask=mask_tail)
    total = tl.sum(x, 1)  # [BLOCK_N]
    if TAIL:
        total += tl.sum(x_tail, 1)
    mean = total / D
    x = tl.where(mask, x - mean[:, None], 0.0)
    square = tl.sum(x * x, 1)  # [BLOCK_N]
    if TAIL:
        x_tail = tl.where(mask_tail, x_tail - mean[:, None], 0.0)
        square += tl.sum(x_tail * x_tail, 1)
    rstd = 1.0 / tl.sqrt(square / D + eps)
    y = x * rstd[:, None] * scale[None, :] + shift[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    if TAIL:
        y = x_tail * rstd[:, None] * scale_tail[None, :] + shift_tail[None, :]
        tl.store(y_ptr + offs_tail, y.to(y_ptr.dtype.element_ty), mask=mask_tail)
    tl.store(mean_ptr + row, mean, mask=offs_t < T)
    tl.store(rstd_ptr + row, rstd, mask=offs_t < T)


@triton.jit
def _load_row(dy_ptr, dx_new_ptr, x_ptr, branch_ptr, mean, rstd, offs, mask):
    """Load (dy, h, dx_new, branch) at the columns of a row; what is absent is never read."""
    dy = _load(dy_ptr, offs, mask)
    x = _load(x_ptr, offs, mask)
    dx_new = x if dx_new_ptr is None else _load(dx_new_ptr, offs, mask)
    branch = x if branch_ptr is None else _load(branch_ptr, offs, mask)
    return dy, tl.where(mask, (x - mean) * rstd, 0.0), dx_new, branch


@triton.jit
def _store_row(
    dx_ptr, dbranch_ptr, y_ptr, dx_new_ptr, branch_ptr,
    values, vectors, sums, rstd, g_mean, gh_mean, offs, mask,
):  # fmt: skip
    """Store dx, dbranch and y of one row; return the sums with this row."""
    dy, h, dx_new, branch = values
    scale, shift, gate = vectors
    dshift, dscale, dgate = sums
    dx = rstd * (dy * scale - g_mean - h * gh_mean)
    if dx_new_ptr is not None:
        dx += dx_new
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if branch_ptr is not None:
        tl.store(dbranch_ptr + offs, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=mask)
        dgate += branch * dx
    if y_ptr is not None:
        tl.store(y_ptr + offs, (h * scale + shift).to(y_ptr.dtype.element_ty), mask=mask)
    return dshift + dy, dscale + dy * h, dgate


@triton.jit
def _store_parts(parts_ptr, branch_ptr, sums, offs, stride_parts, mask):
    dshift, dscale, dgate = sums
    tl.store(parts_ptr + offs, dshift, mask=mask)
    tl.store(parts_ptr + (offs + stride_parts), dscale, mask=mask)
    if branch_ptr is not None:
        tl.store(parts_ptr + (offs + 2 * stride_parts), dgate, mask=mask)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, dx_new_ptr, x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dbranch_ptr, y_ptr, parts_ptr, stride_gate, stride_shift, stride_scale, T, D,
    num_splits, stride_parts,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk down ROWS tokens of one sample; parts [2 or 3, B * num_splits, D]."""
    pid = tl.program_id(0)
    b = (pid // num_splits).to(tl.int64)
    start_t = (pid % num_splits) * ROWS
    scale_ptr += b * stride_scale
    if shift_ptr is not None:
        shift_ptr += b * stride_shift
    if branch_ptr is not None:
        gate_ptr += b * stride_gate
    offs_d = tl.arange(0, BLOCK_D)
    vectors = _load_vectors(gate_ptr, shift_ptr, scale_ptr, offs_d, D)  # [BLOCK_D] each
    zeros = tl.zeros((BLOCK_D,), tl.float32)
    sums = zeros, zeros, zeros
    if TAIL:
        offs_e = BLOCK_D + tl.arange(0, TAIL)
        vectors_tail = _load_vectors(gate_ptr, shift_ptr, scale_ptr, offs_e, D)  # [TAIL] each
        zeros_tail = tl.zeros((TAIL,), tl.float32)
        sums_tail = zeros_tail, zeros_tail, zeros_tail
    for t in tl.range(start_t, tl.minimum(start_t + ROWS, T), num_stages=STAGES):
        row = b * T + t  # int64
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        offs = row * D + offs_d  # [BLOCK_D] int64
        values = _load_row(dy_ptr, dx_new_ptr, x_ptr, branch_ptr, mean, rstd, offs, offs_d < D)
        if TAIL:  # before the sums: their barriers hold later loads up
            offs_tail = row * D + offs_e  # [TAIL] int64
            values_tail = _load_row(
                dy_ptr, dx_new_ptr, x_ptr, branch_ptr, mean, rstd, offs_tail, offs_e < D
            )
        g = values[0] * vectors[0]
        g_sum, gh_sum = tl.sum(g, 0), tl.sum(g * values[1], 0)
        if TAIL:
            g = values_tail[0] * vectors_tail[0]
            g_sum += tl.sum(g, 0)
            gh_sum += tl.sum(g * values_tail[1], 0)
        sums = _store_row(
            dx_ptr, dbranch_ptr, y_ptr, dx_new_ptr, branch_ptr,
            values, vectors, sums, rstd, g_sum / D, gh_sum / D, offs, offs_d < D,
        )  # fmt: skip
        if TAIL:
            sums_tail = _store_row(
                dx_ptr, dbranch_ptr, y_ptr, dx_new_ptr, branch_ptr,
                values_tail, vectors_tail, sums_tail, rstd, g_sum / D, gh_sum / D,
                offs_tail, offs_e < D,
            )  # fmt: skip
    if parts_ptr is not None:
        part = pid.to(tl.int64) * D
        _store_parts(parts_ptr, branch_ptr, sums, part + offs_d, stride_parts, offs_d < D)
        if TAIL:
            _store_parts(parts_ptr, branch_ptr, sums_tail, part + offs_e, stride_parts, offs_e < D)


@triton.jit
def _sums_kernel(
    parts_ptr, out0_ptr, out1_ptr, out2_ptr, D, num_splits, stride_parts, BLOCK_D: tl.constexpr
):
    """Take the second stage of up to three sums: over a sample's splits, in fixed order."""
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    acc0 = tl.zeros((BLOCK_D,), tl.float32)
    acc1 = tl.zeros((BLOCK_D,), tl.float32)
    acc2 = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(num_splits):
        offs = (b * num_splits + split) * D + offs_d  # [BLOCK_D] int64
        acc0 += tl.load(parts_ptr + offs, mask=mask, other=0.0)
        if out1_ptr is not None:
            acc1 += tl.load(parts_ptr + (offs + stride_parts), mask=mask, other=0.0)
        if out2_ptr is not None:
            acc2 += tl.load(parts_ptr + (offs + 2 * stride_parts), mask=mask, other=0.0)
    offs = b * D + offs_d
    tl.store(out0_ptr + offs, acc0.to(out0_ptr.dtype.element_ty), mask=mask)
    if out1_ptr is not None:
        tl.store(out1_ptr + offs, acc1.to(out1_ptr.dtype.element_ty), mask=mask)
    if out2_ptr is not None:
        tl.store(out2_ptr + offs, acc2.to(out2_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _residual_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, x_new_ptr, stride_gate, T, D, num_pid_t, num_pid_c,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Update BLOCK_N tokens of one sample, BLOCK_C columns of each."""
    pid = tl.program_id(0)
    pid_bt = pid // num_pid_c  # neighbours read on in the same rows
    b = (pid_bt // num_pid_t).to(tl.int64)
    offs_t = (pid_bt % num_pid_t) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_c = (pid % num_pid_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_t < T)[:, None] & (offs_c < D)[None, :]  # [BLOCK_N, BLOCK_C]
    offs = (b * T + offs_t)[:, None] * D + offs_c[None, :]  # [BLOCK_N, BLOCK_C] int64
    gate = _load(gate_ptr + b * stride_gate, offs_c, offs_c < D)
    x_new = _load_residual(x_ptr, branch_ptr, x_new_ptr, gate, offs, mask)
    tl.store(x_new_ptr + offs, x_new.to(x_new_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _residual_bwd_kernel(
    dx_ptr, branch_ptr, gate_ptr, dbranch_ptr, parts_ptr, stride_gate, T, D, num_splits,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Walk down ROWS tokens of one sample, BLOCK_C columns of each; parts [B * num_splits, D]."""
    pid = tl.program_id(0)
    b = (pid // num_splits).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = _load(gate_ptr + b * stride_gate, offs_c, offs_c < D)[None, :]
    dgate = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        offs_t = (pid % num_splits) * ROWS + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask = (offs_t < T)[:, None] & (offs_c < D)[None, :]  # [BLOCK_N, BLOCK_C]
        offs = (b * T + offs_t)[:, None] * D + offs_c[None, :]  # [BLOCK_N, BLOCK_C] int64
        dx = _load(dx_ptr, offs, mask)
        if parts_ptr is not None:
            dgate += dx * _load(branch_ptr, offs, mask)
        tl.store(dbranch_ptr + offs, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=mask)
    if parts_ptr is not None:
        offs = pid.to(tl.int64) * D + offs_c
        tl.store(parts_ptr + offs, tl.sum(dgate, 0), mask=offs_c < D)


# The torch path: for a CPU and for float64, some samples at a time, in its caches.

_CPU_BLOCK = 1 << 18  # elements: five or so fp32 buffers of 1 MiB stay in a CPU's caches


def _samples(x: Tensor, *others: Tensor | None) -> Iterator[list[Any]]:
    """Yield as many samples of each tensor at a time as stay in a CPU's caches."""
    count = max(1, _CPU_BLOCK // max(1, x[:1].numel()))
    for start in range(0, x.shape[0], count):
        yield [None if t is None else t[start : start + count] for t in (x, *others)]


def norm_modulate_torch(x, branch, gate, shift, scale, eps, out_dtype):
    """Return (x_new, y, mean, rstd) as adaln._norm_modulate does."""
    wide = launch.arithmetic_dtype(x)
    kept = torch.empty_like(x) if branch is not None else None
    y = torch.empty_like(x, dtype=out_dtype)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=wide) for _ in range(2))
    for part in _samples(x, branch, gate, kept, shift, scale, y, mean, rstd):
        _norm_modulate_part(*part, eps=eps, wide=wide)
    return x.new_empty(0) if kept is None else kept, y, mean, rstd


def _norm_modulate_part(x, branch, gate, kept, shift, scale, y, mean, rstd, *, eps, wide):
    """Write kept, y and the statistics of some samples."""
    xw = x.to(wide)
    if kept is not None:
        update = xw, branch.to(wide), gate.to(wide)[:, None]
        if kept.dtype == wide:
            xw = torch.addcmul(*update, out=kept)
        else:
            xw = kept.copy_(torch.addcmul(*update)).to(wide)  # what backward will see
    # In passes that ATen vectorises: its own layer norm takes a CPU more than twice as long.
    h = torch.sub(xw, torch.mean(xw, -1, out=mean)[..., None])  # [B,T,D]
    torch.linalg.vector_norm(h, dim=-1, out=rstd)  # [B,T]
    rstd.square_().div_(xw.shape[-1]).add_(eps).rsqrt_()
    _modulate_torch(h.mul_(rstd[..., None]), shift, scale, out=y, buffer=h)


def _modulate_torch(h, shift, scale, out, buffer):
    """Write h (1 + scale) + shift to out, [B,T,D], through `buffer`, which may be h."""
    torch.mul(h, 1 + scale.to(h.dtype)[:, None], out=buffer)
    shift = shift.to(h.dtype)[:, None]
    if out.dtype == h.dtype:
        torch.add(buffer, shift, out=out)
    else:
        out.copy_(buffer.add_(shift))


def norm_gradients_torch(
    dy, dx_new, x, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, totals
):
    """Write dx, dbranch, y and, where they are not empty, the totals (dshift, dscale, dgate)."""
    wide = launch.arithmetic_dtype(x)
    dbranch = None if branch is None else dbranch
    into = [v.to(wide) if v.numel() else None for v in totals]  # v itself where it is wide
    for part in _samples(
        x, dy, dx_new, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, *into
    ):
        _norm_gradients_part(*part, wide=wide)
    for total, value in zip(totals, into, strict=True):
        if value is not None and value is not total:
            total.copy_(value)


def _norm_gradients_part(
    x, dy, dx_new, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, dshift, dscale, dgate,
    *, wide,
):  # fmt: skip
    """Write dx, dbranch, y and the sums of some samples."""
    x, dy = x.to(wide), dy.to(wide)
    mean, rstd = mean[..., None], rstd[..., None]  # [B,T,1]
    g = dy * (1 + scale.to(wide)[:, None])  # [B,T,D]
    grad = torch.ops.aten.native_layer_norm_backward(
        g, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]
    if dx_new is None or dx_new.dtype != dx.dtype or dx.dtype != wide:
        dx.copy_(grad if dx_new is None else grad.add_(dx_new))
    else:
        grad = torch.add(grad, dx_new, out=dx)
    if dshift is not None or y is not None:
        h = torch.sub(x, mean, out=g).mul_(rstd)  # g has done its work
    if y is not None:
        _modulate_torch(h, shift, scale, out=y, buffer=torch.empty_like(h))
    if dshift is not None:
        torch.sum(dy, 1, out=dshift)  # [B,D]
        torch.sum(h.mul_(dy), 1, out=dscale)
    if dgate is not None:
        torch.sum(torch.mul(branch.to(wide), grad, out=g), 1, out=dgate)
    if dbranch is not None:
        gate = gate.to(wide)[:, None]
        if dbranch.dtype == wide:
            torch.mul(grad, gate, out=dbranch)
        else:
            dbranch.copy_(torch.mul(grad, gate, out=g))


# Budget in bytes: what moving values between the fp32 and the bf16 thread layouts takes.
SHARED = 16384
# sass.py's estimate for the widths of SiT-S, B, L and XL and for the residual alone, at least.
FORWARD_SHARE, BACKWARD_SHARE = 0.80, 0.75
REAL_WIDTHS = (384, 768, 1024, 1152)


def _aot_cases() -> list[AotCase]:
    """Take bf16 branches and modulation around an fp32 residual, at every row of the table."""
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
    """Make a case with y made again, as adaln_linear's and adaln_mlp's backward take it, or not."""
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
            {"parts_ptr": fp, "out0_ptr": bf, "out1_ptr": bf, "out2_ptr": bf},
            {"BLOCK_D": flat.block}, flat.num_warps, registers=64, shared=0, wide_loads=3,
            long_offsets=("parts_ptr", "out0_ptr"),
        ),
    ]  # fmt: skip


AOT_CASES = _aot_cases()
