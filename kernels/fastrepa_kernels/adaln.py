"""Adaptive LayerNorm of a diffusion transformer, with the gated residual in front of it.

    layernorm_modulate:                  y = LN(x) (1 + scale) + shift
    gated_residual_layernorm_modulate:   x' = x + gate branch;  y = LN(x') (1 + scale) + shift
    gated_residual:                      x' = x + gate branch

LN has no affine part: LN(x) = (x - mean) rstd, rstd = 1 / sqrt(var + eps), over the last dimension.

Shapes: B batch, T tokens, D width, N = B*T rows. x, branch, y [B,T,D]; shift, scale, gate [B,D]
(a view such as `chunk(6, dim=1)` gives is read in place, never copied).
Saved for backward: the normalised tensor's input (x or x'), branch, scale, gate and two fp32
numbers a row (mean, rstd). Recomputed: LN(x).

Backward, with h = LN(x'), g = dy (1 + scale), and dx' the gradient that reaches x' elsewhere:
    dx = dx' + rstd (g - mean(g) - h mean(g h))      dbranch = gate dx
    dshift = sum_t dy      dscale = sum_t dy h       dgate = sum_t branch dx
Sums over tokens are two-stage in a fixed order: two runs agree bit for bit. One read and one write
of each tensor, forward and backward, statistics in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.registration import differentiable, first_order
from fastrepa_kernels.sass import Traffic

EPS = 1e-6
_CPU_BLOCK = 1 << 18  # elements: five or so fp32 buffers of 1 MiB stay in a CPU's caches


def layernorm_modulate_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = EPS,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The specification, in whatever dtype it is given (float64 in tests)."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]
    return y.to(out_dtype or shift.dtype)


def gated_residual_reference(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """The specification of the residual update; the result keeps x's dtype."""
    return (x + gate[:, None] * branch).to(x.dtype)


def gated_residual_layernorm_modulate_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = EPS,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: the two above, one after the other."""
    x_new = gated_residual_reference(x, branch, gate)
    y = layernorm_modulate_reference(x_new, shift, scale, eps=eps, out_dtype=out_dtype)
    return x_new, y


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
    tl.store(parts_ptr + stride + at, dscale, mask=inside)
    if branch_ptr is not None:
        tl.store(parts_ptr + 2 * stride + at, dgate, mask=inside)


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
            second += tl.load(parts_ptr + part_stride + at, mask=d < D, other=0.0)
        if third_ptr is not None:
            third += tl.load(parts_ptr + 2 * part_stride + at, mask=d < D, other=0.0)
    at = b * D + d
    tl.store(first_ptr + at, first.to(first_ptr.dtype.element_ty), mask=d < D)
    if second_ptr is not None:
        tl.store(second_ptr + at, second.to(second_ptr.dtype.element_ty), mask=d < D)
    if third_ptr is not None:
        tl.store(third_ptr + at, third.to(third_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _residual_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, x_new_ptr, gate_stride, T, D, tiles,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    t = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    d = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
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


def _norm_modulate(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_new, y, mean, rstd); x_new is empty where there is no branch."""
    b, t, d = x.shape
    gated = branch is not None and gate is not None
    if not launch.use_triton(x, d):
        return _norm_modulate_torch(x, branch, gate, shift, scale, eps, out_dtype)
    x_new = torch.empty_like(x) if gated else x.new_empty(0)
    y = torch.empty_like(x, dtype=out_dtype)
    mean = torch.empty((b, t), dtype=torch.float32, device=x.device)
    rstd = torch.empty((b, t), dtype=torch.float32, device=x.device)
    if x.numel():
        row = launch.rows("norm_forward", d, x.device)
        tiles = triton.cdiv(t, row.block_n)
        _norm_fwd_kernel[(b * tiles,)](
            x, branch, gate, shift, scale, x_new, y, mean, rstd,
            gate.stride(0) if gate is not None else 0, shift.stride(0), scale.stride(0),
            t, d, tiles, eps,
            BLOCK_N=row.block_n, BLOCK_D=row.block_d, TAIL=row.tail, num_warps=row.num_warps,
        )  # fmt: skip
    return x_new, y, mean, rstd


def _samples(x: Tensor, *others: Tensor | None) -> Iterator[list[Any]]:
    """What a CPU handles at once: as many samples as stay in its caches, of each tensor."""
    count = max(1, _CPU_BLOCK // max(1, x[:1].numel()))
    for start in range(0, x.shape[0], count):
        yield [None if t is None else t[start : start + count] for t in (x, *others)]


def _norm_modulate_torch(x, branch, gate, shift, scale, eps, out_dtype):
    wide = launch.arithmetic_dtype(x)
    kept = torch.empty_like(x) if branch is not None else None
    y = torch.empty_like(x, dtype=out_dtype)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=wide) for _ in range(2))
    for part in _samples(x, branch, gate, kept, shift, scale, y, mean, rstd):
        _norm_modulate_part(*part, eps=eps, wide=wide)
    return x.new_empty(0) if kept is None else kept, y, mean, rstd


def _norm_modulate_part(x, branch, gate, kept, shift, scale, y, mean, rstd, *, eps, wide):
    """Of some samples, into kept, y and the statistics."""
    xw = x.to(wide)
    if kept is not None:
        update = xw, branch.to(wide), gate.to(wide)[:, None]
        if kept.dtype == wide:
            xw = torch.addcmul(*update, out=kept)
        else:
            xw = kept.copy_(torch.addcmul(*update)).to(wide)  # what backward will see
    # In passes that ATen vectorises: its own layer norm takes a CPU more than twice as long.
    h = torch.sub(xw, torch.mean(xw, -1, out=mean)[..., None])
    torch.linalg.vector_norm(h, dim=-1, out=rstd)
    rstd.square_().div_(xw.shape[-1]).add_(eps).rsqrt_()
    _modulate_torch(h.mul_(rstd[..., None]), shift, scale, out=y, buffer=h)


def _modulate_torch(h, shift, scale, out, buffer):
    """out = h (1 + scale) + shift, through `buffer`, which may be h."""
    torch.mul(h, 1 + scale.to(h.dtype)[:, None], out=buffer)
    shift = shift.to(h.dtype)[:, None]
    if out.dtype == h.dtype:
        torch.add(buffer, shift, out=out)
    else:
        out.copy_(buffer.add_(shift))


_norm_modulate_op = torch.library.custom_op("fastrepa::norm_modulate", mutates_args=())(
    _norm_modulate
)


@_norm_modulate_op.register_fake
def _(x, branch, gate, shift, scale, eps, out_dtype):
    statistics = launch.arithmetic_dtype(x)
    return (
        x.new_empty(0) if branch is None else torch.empty_like(x),
        torch.empty_like(x, dtype=out_dtype),
        x.new_empty(x.shape[:2], dtype=statistics),
        x.new_empty(x.shape[:2], dtype=statistics),
    )


def _norm_gradients(
    dy: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: bool,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dx, dbranch, dshift, dscale, dgate, y): x is what was normalised; what nobody asked for is
    empty. y is made again where `y_dtype` asks for it: everything it takes is at hand here.
    """
    dx = torch.empty_like(x)
    dbranch = x.new_empty(0) if branch is None else torch.empty_like(branch)
    wanted = (shift, scale, scale.new_empty(0) if gate is None else gate)
    totals = [torch.empty_like(v) if sums else v.new_empty(0) for v in wanted]
    y = None if y_dtype is None else torch.empty_like(x, dtype=y_dtype)
    given = (dy, dx_new, x, branch, gate, shift, scale, mean, rstd, dx, dbranch, y)
    if not launch.use_triton(x, x.shape[-1]):
        _norm_gradients_torch(*given, totals, sums)
    elif x.numel():
        _norm_gradients_triton(*given, totals, sums)
    else:
        for total in totals:
            total.zero_()
    return dx, dbranch, *totals, y


def _norm_gradients_triton(
    dy, dx_new, x, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, totals, sums
):
    b, t, d = x.shape
    row = launch.rows("norm_backward", d, x.device)
    per_split = launch.rows_per_split(b, t, row.split)
    splits = triton.cdiv(t, per_split)
    parts = None
    if sums:
        shape = 2 if gate is None else 3, b * splits, d
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    _norm_bwd_kernel[(b * splits,)](
        dy, dx_new, x, branch, gate, None if y is None else shift, scale, mean, rstd,
        dx, dbranch, y, parts,
        0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0),
        t, d, splits, b * splits * d, ROWS=per_split, BLOCK_D=row.block_d, TAIL=row.tail,
        STAGES=row.stages, num_warps=row.num_warps,
    )  # fmt: skip
    if parts is not None:
        _sum_splits(parts, totals if gate is not None else [*totals[:2], None], splits)


def _sum_splits(parts: Tensor, totals: list[Tensor | None], splits: int) -> None:
    """totals, one [B,D] each, from parts [sums,B*splits,D]."""
    _, rows, d = parts.shape
    flat = launch.FLAT["norm_sums"][launch.generation(parts.device)]
    _sums_kernel[(rows // splits, triton.cdiv(d, flat.block))](
        parts, *totals, d, splits, rows * d, BLOCK_D=flat.block, num_warps=flat.num_warps
    )


def _norm_gradients_torch(
    dy, dx_new, x, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, totals, sums
):
    wide = launch.arithmetic_dtype(x)
    if branch is None:
        dbranch = None
    # A sum in another dtype is taken in the wide one, as statistics are.
    into = [v.new_empty(v.shape, dtype=wide) if sums else None for v in totals]
    parts = [None if v is None or not v.numel() else v for v in into]
    for part in _samples(
        x, dy, dx_new, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, *parts
    ):
        _norm_gradients_part(*part, wide=wide)
    for total, value in zip(totals, into, strict=True):
        if value is not None:
            total.copy_(value)


def _norm_gradients_part(
    x, dy, dx_new, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, dshift, dscale, dgate,
    *, wide,
):  # fmt: skip
    """Of some samples, into dx, dbranch, y and the sums."""
    x, dy = x.to(wide), dy.to(wide)
    mean, rstd = mean[..., None], rstd[..., None]
    g = dy * (1 + scale.to(wide)[:, None])
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
        torch.sum(dy, 1, out=dshift)
        torch.sum(h.mul_(dy), 1, out=dscale)
    if dgate is not None:
        torch.sum(torch.mul(branch.to(wide), grad, out=g), 1, out=dgate)
    if dbranch is not None:
        gate = gate.to(wide)[:, None]
        if dbranch.dtype == wide:
            torch.mul(grad, gate, out=dbranch)
        else:
            dbranch.copy_(torch.mul(grad, gate, out=g))


@torch.library.custom_op("fastrepa::norm_modulate_backward", mutates_args=())
def _norm_modulate_backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _norm_gradients(dy, dx_new, x, branch, gate, shift, scale, mean, rstd, sums)[:5]


def _norm_gradient_shapes(x, branch, gate, shift, scale, sums):
    """Fakes of (dx, dbranch, dshift, dscale, dgate)."""
    wanted = (shift, scale, scale.new_empty(0) if gate is None else gate)
    return (
        torch.empty_like(x),
        x.new_empty(0) if branch is None else torch.empty_like(branch),
        *(torch.empty_like(v) if sums else v.new_empty(0) for v in wanted),
    )


@_norm_modulate_backward.register_fake
def _(dy, dx_new, x, branch, gate, shift, scale, mean, rstd, sums):
    return _norm_gradient_shapes(x, branch, gate, shift, scale, sums)


_norm_modulate_backward_call = first_order(_norm_modulate_backward)


def _norm_setup(ctx, inputs, output):
    x, branch, gate, shift, scale, _, _ = inputs
    x_new, _, mean, rstd = output
    kept = x if branch is None else x_new
    ctx.save_for_backward(kept, branch, gate, shift, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd, *([x_new] if branch is None else []))
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, dx_new, dy, _mean, _rstd):
    x, branch, *rest = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    if dy is None:  # only x_new was used
        dy = torch.zeros_like(x)
    # .sum().backward() sends a gradient of stride 0: contiguous() is not for show.
    grads = _norm_modulate_backward_call(
        dy.contiguous(), _flowing(dx_new, branch), x, branch, *rest, any(needs[2:])
    )
    return *_in_order(grads, needs), None, None


def _flowing(dx_new: Tensor | None, branch: Tensor | None) -> Tensor | None:
    return None if dx_new is None or branch is None else dx_new.contiguous()


def _in_order(grads, needs):
    """(dx, dbranch, dshift, dscale, dgate) as x, branch, gate, shift, scale want them."""
    dx, dbranch, dshift, dscale, dgate = grads
    wanted = zip((dx, dbranch, dgate, dshift, dscale), needs, strict=True)
    return tuple(g if need else None for g, need in wanted)


_norm_modulate_call = differentiable(
    _norm_modulate_op, setup_context=_norm_setup, backward=_norm_backward
)


@torch.library.custom_op("fastrepa::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    b, t, d = x.shape
    if not launch.use_triton(x, d):
        wide = launch.arithmetic_dtype(x)
        return torch.addcmul(x.to(wide), branch.to(wide), gate.to(wide)[:, None]).to(x.dtype)
    x_new = torch.empty_like(x)
    if x.numel():
        table = launch.COLUMNS["residual"][launch.generation(x.device)]
        tiles = triton.cdiv(t, table.block_n)
        _residual_fwd_kernel[(b * tiles, triton.cdiv(d, table.block_c))](
            x, branch, gate, x_new, gate.stride(0), t, d, tiles,
            BLOCK_N=table.block_n, BLOCK_C=table.block_c, num_warps=table.num_warps,
        )  # fmt: skip
    return x_new


@_gated_residual.register_fake
def _(x, branch, gate):
    return torch.empty_like(x)


@torch.library.custom_op("fastrepa::gated_residual_backward", mutates_args=())
def _gated_residual_backward(
    dx: Tensor, branch: Tensor, gate: Tensor, sums: bool
) -> tuple[Tensor, Tensor]:
    """(dbranch, dgate); dgate is empty where nobody needs it."""
    b, t, d = branch.shape
    if not launch.use_triton(branch, d):
        wide = launch.arithmetic_dtype(dx)
        dgate = (dx.to(wide) * branch.to(wide)).sum(1).to(gate.dtype) if sums else gate.new_empty(0)
        return (dx.to(wide) * gate.to(wide)[:, None]).to(branch.dtype), dgate
    dbranch = torch.empty_like(branch)
    dgate = torch.empty_like(gate) if sums else gate.new_empty(0)
    if not branch.numel():
        return dbranch, dgate.zero_()
    table = launch.COLUMNS["residual"][launch.generation(branch.device)]
    splits = triton.cdiv(t, table.rows)
    parts = None
    if sums:
        parts = torch.empty((1, b * splits, d), dtype=torch.float32, device=branch.device)
    _residual_bwd_kernel[(b * splits, triton.cdiv(d, table.block_c))](
        dx, branch, gate, dbranch, parts, gate.stride(0), t, d, splits, ROWS=table.rows,
        BLOCK_N=table.block_n, BLOCK_C=table.block_c, num_warps=table.num_warps,
    )  # fmt: skip
    if parts is not None:
        _sum_splits(parts, [dgate, None, None], splits)
    return dbranch, dgate


@_gated_residual_backward.register_fake
def _(dx, branch, gate, sums):
    return torch.empty_like(branch), torch.empty_like(gate) if sums else gate.new_empty(0)


_gated_residual_backward_call = first_order(_gated_residual_backward)


def _residual_setup(ctx, inputs, output):
    _, branch, gate = inputs
    ctx.save_for_backward(branch, gate)


def _residual_backward(ctx, dx):
    branch, gate = ctx.saved_tensors
    need_x, need_branch, need_gate = ctx.needs_input_grad
    dbranch = dgate = None
    if need_branch or need_gate:
        dbranch, dgate = _gated_residual_backward_call(dx.contiguous(), branch, gate, need_gate)
    return (
        dx if need_x else None,
        dbranch if need_branch else None,
        dgate if need_gate else None,
    )


_gated_residual_call = differentiable(
    _gated_residual, setup_context=_residual_setup, backward=_residual_backward
)


def _check(name: str, x: Tensor, branch: Tensor | None, **per_sample: Tensor) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(
            f"{name}: x must be a floating-point [B, T, D]; got {tuple(x.shape)} {x.dtype}"
        )
    if branch is not None and (branch.shape != x.shape or branch.device != x.device):
        raise ValueError(
            f"{name}: branch must have x's shape {tuple(x.shape)} and device {x.device}; "
            f"got {tuple(branch.shape)} on {branch.device}"
        )
    wanted = (x.shape[0], x.shape[2])
    for argument, value in per_sample.items():
        if value.shape != wanted or value.device != x.device:
            raise ValueError(
                f"{name}: {argument} must be [B, D] = {wanted} on {x.device}; "
                f"got {tuple(value.shape)} on {value.device}"
            )
    floating = per_sample if branch is None else {"branch": branch, **per_sample}
    for argument, value in floating.items():
        if not value.is_floating_point():
            raise ValueError(f"{name}: {argument} must be floating point; got {value.dtype}")


def _row_major(per_sample: Tensor) -> Tensor:
    """Any row stride will do, so that a chunk of [B, 6D] is read where it lies."""
    return per_sample if per_sample.stride(-1) == 1 else per_sample.contiguous()


def layernorm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = EPS,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm without affine part, then a per-sample scale and shift (DiT's adaLN).

    x: [B, T, D] float32, float16 or bfloat16 (float64 through torch). shift, scale: [B, D], any
    floating dtype. Returns [B, T, D] in `out_dtype`, by default shift's dtype (that of the matrix
    product that follows). Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check("layernorm_modulate", x, None, shift=shift, scale=scale)
    _, y, _, _ = _norm_modulate_call(
        x.contiguous(), None, None, _row_major(shift), _row_major(scale), eps,
        out_dtype or shift.dtype,
    )  # fmt: skip
    return y


def gated_residual_layernorm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = EPS,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual update and the next adaLN in one pass: (x + gate branch, its modulated norm).

    x: [B, T, D], the residual stream, float32 or a half dtype; branch: [B, T, D], any floating
    dtype; gate, shift, scale: [B, D]. Returns x_new in x's dtype and y in `out_dtype` (shift's by
    default). Raises ValueError where shapes, dtypes or devices do not fit.
    """
    name = "gated_residual_layernorm_modulate"
    _check(name, x, branch, gate=gate, shift=shift, scale=scale)
    x_new, y, _, _ = _norm_modulate_call(
        x.contiguous(), branch.contiguous(), _row_major(gate), _row_major(shift),
        _row_major(scale), eps, out_dtype or shift.dtype,
    )  # fmt: skip
    return x_new, y


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate branch with a per-sample gate; [B, T, D] in x's dtype, gate [B, D].

    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check("gated_residual", x, branch, gate=gate)
    return _gated_residual_call(x.contiguous(), branch.contiguous(), _row_major(gate))


def layernorm_modulate_cost(
    b: int, t: int, d: int, x_itemsize: int, y_itemsize: int, *, backward: bool = False
) -> Cost:
    """Forward reads x and writes y; backward reads dy, x and writes dx; plus per-sample vectors."""
    n = b * t
    tensors = (2 * x_itemsize + y_itemsize) if backward else (x_itemsize + y_itemsize)
    return Cost(
        flops=(15 if backward else 9) * n * d,
        bytes=n * d * tensors + (3 if backward else 2) * b * d * y_itemsize + 8 * n,
    )


def gated_residual_layernorm_modulate_cost(
    b: int, t: int, d: int, x_itemsize: int, y_itemsize: int, *, backward: bool = False
) -> Cost:
    """Forward reads x, branch, writes x_new, y; backward reads dy, dx_new, x_new, branch and writes
    dx, dbranch; branch has y's itemsize."""
    n = b * t
    tensors = (3 * x_itemsize + 3 * y_itemsize) if backward else (2 * x_itemsize + 2 * y_itemsize)
    return Cost(
        flops=(19 if backward else 11) * n * d,
        bytes=n * d * tensors + (5 if backward else 3) * b * d * y_itemsize + 8 * n,
    )


def gated_residual_cost(
    b: int, t: int, d: int, x_itemsize: int, branch_itemsize: int, *, backward: bool = False
) -> Cost:
    """Forward reads x, branch, writes x_new; backward reads dx_new, branch and writes dbranch (dx
    is dx_new itself)."""
    tensors = x_itemsize + 2 * branch_itemsize if backward else 2 * x_itemsize + branch_itemsize
    vectors = (2 if backward else 1) * b * d * branch_itemsize
    return Cost(flops=(3 if backward else 2) * b * t * d, bytes=b * t * d * tensors + vectors)


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
            for gated in (False, True):
                cases += [
                    _aot_backward(generation, width, row, gated, again) for again in (False, True)
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
