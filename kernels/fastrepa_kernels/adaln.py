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
def _norm_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, x_new_ptr, y_ptr, mean_ptr, rstd_ptr,
    gate_stride, shift_stride, scale_stride, T, D, tiles, eps,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)  # a tile never spans two samples
    t = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row = b * T + t  # [BLOCK_N] int64: N * D may pass 2^31
    d = tl.arange(0, BLOCK_D)
    wide = d < D
    inside = (t < T)[:, None] & wide[None, :]  # [BLOCK_N, BLOCK_D]
    at = row[:, None] * D + d[None, :]  # [BLOCK_N, BLOCK_D] int64
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    shift = tl.load(shift_ptr + (b * shift_stride + d), mask=wide, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + (b * scale_stride + d), mask=wide, other=0.0).to(tl.float32)
    if GATED:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + (b * gate_stride + d), mask=wide, other=0.0).to(tl.float32)
        stored = (x + gate[None, :] * branch).to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + at, stored, mask=inside)
        x = stored.to(tl.float32)  # backward sees the stored value, so the statistics do too
    mean = tl.sum(x, 1) / D  # [BLOCK_N]
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)  # [BLOCK_N]
    y = centred * rstd[:, None] * (1.0 + scale[None, :]) + shift[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=t < T)
    tl.store(rstd_ptr + row, rstd, mask=t < T)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, dx_new_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dbranch_ptr, sums_ptr, gate_stride, scale_stride, T, D, splits, sum_stride,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // splits).to(tl.int64)
    first = (pid % splits) * ROWS
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    scale = tl.load(scale_ptr + (b * scale_stride + d), mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + (b * gate_stride + d), mask=inside, other=0.0).to(tl.float32)
    dshift = tl.zeros((BLOCK_D,), tl.float32)
    dscale = tl.zeros((BLOCK_D,), tl.float32)
    dgate = tl.zeros((BLOCK_D,), tl.float32)
    for t in range(first, tl.minimum(first + ROWS, T)):
        row = b * T + t  # int64
        at = row * D + d  # [BLOCK_D] int64
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_D]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_D]
        rstd = tl.load(rstd_ptr + row)
        h = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        g = dy * (1.0 + scale)
        dx = rstd * (g - tl.sum(g, 0) / D - h * (tl.sum(g * h, 0) / D))
        if RESIDUAL:
            dx += tl.load(dx_new_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(dbranch_ptr + at, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            dshift += dy
            dscale += dy * h
            if GATED:
                branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
                dgate += branch * dx
    if SUMS:
        part = pid.to(tl.int64) * D + d  # sums is [2 or 3, B * splits, D]
        tl.store(sums_ptr + part, dshift, mask=inside)
        tl.store(sums_ptr + sum_stride + part, dscale, mask=inside)
        if GATED:
            tl.store(sums_ptr + 2 * sum_stride + part, dgate, mask=inside)


@triton.jit
def _residual_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, x_new_ptr, gate_stride, T, D, tiles,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    t = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    d = tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]  # [BLOCK_N, BLOCK_D]
    at = (b * T + t)[:, None] * D + d[None, :]  # [BLOCK_N, BLOCK_D] int64
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + (b * gate_stride + d), mask=d < D, other=0.0).to(tl.float32)
    x_new = x + gate[None, :] * branch
    tl.store(x_new_ptr + at, x_new.to(x_new_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _residual_bwd_kernel(
    dx_ptr, branch_ptr, gate_ptr, dbranch_ptr, sums_ptr, gate_stride, T, D, splits,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // splits).to(tl.int64)
    first = (pid % splits) * ROWS
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    gate = tl.load(gate_ptr + (b * gate_stride + d), mask=inside, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK_D,), tl.float32)
    for t in range(first, tl.minimum(first + ROWS, T)):
        at = (b * T + t) * D + d  # [BLOCK_D] int64
        dx = tl.load(dx_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_D]
        tl.store(dbranch_ptr + at, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            dgate += dx * tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SUMS:
        tl.store(sums_ptr + (pid.to(tl.int64) * D + d), dgate, mask=inside)


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
            GATED=gated, BLOCK_N=row.block_n, BLOCK_D=row.block_d, num_warps=row.num_warps,
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
    _modulate_torch(h.mul_(rstd[..., None]), shift, scale, out=y)


def _modulate_torch(h, shift, scale, out):
    """out = h (1 + scale) + shift; h is overwritten."""
    h.mul_(1 + scale.to(h.dtype)[:, None])
    shift = shift.to(h.dtype)[:, None]
    if out.dtype == h.dtype:
        torch.add(h, shift, out=out)
    else:
        out.copy_(h.add_(shift))


def _modulate_again_torch(x, shift, scale, mean, rstd, out_dtype):
    """y from the saved statistics, which spares two passes over x."""
    y = torch.empty_like(x, dtype=out_dtype)
    for x_part, shift_part, scale_part, mean_part, rstd_part, y_part in _samples(
        x, shift, scale, mean, rstd, y
    ):
        h = torch.sub(x_part, mean_part[..., None]).mul_(rstd_part[..., None])
        _modulate_torch(h, shift_part, scale_part, out=y_part)
    return y


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


def _norm_modulate_backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbranch, [dshift, dscale, dgate] summed over tokens); x is what was normalised."""
    b, t, d = x.shape
    gated = branch is not None and gate is not None
    if not launch.use_triton(x, d):
        return _norm_modulate_backward_torch(dy, dx_new, x, branch, gate, scale, mean, rstd, sums)
    dx = torch.empty_like(x)
    dbranch = torch.empty_like(x if branch is None else branch) if gated else x.new_empty(0)
    if not x.numel():
        return dx, dbranch, torch.zeros((3, b, d) if sums else (0,), device=x.device)
    row = launch.rows("norm_backward", d, x.device)
    per_split = launch.rows_per_split(b, t)
    splits = triton.cdiv(t, per_split)
    parts = torch.empty(
        (3 if gated else 2, b, splits, d) if sums else (0,), dtype=torch.float32, device=x.device
    )
    _norm_bwd_kernel[(b * splits,)](
        dy, dx_new, x, branch, gate, scale, mean, rstd, dx, dbranch, parts,
        gate.stride(0) if gate is not None else 0, scale.stride(0), t, d, splits, b * splits * d,
        GATED=gated, RESIDUAL=dx_new is not None, SUMS=sums, ROWS=per_split,
        BLOCK_D=row.block_d, num_warps=row.num_warps,
    )  # fmt: skip
    total = parts.sum(2) if sums else parts  # the second stage, in fixed order
    if sums and not gated:
        total = torch.cat([total, total.new_zeros(1, b, d)])
    return dx, dbranch, total


def _norm_modulate_backward_torch(dy, dx_new, x, branch, gate, scale, mean, rstd, sums):
    wide = launch.arithmetic_dtype(x)
    dx = torch.empty_like(x)
    dbranch = None if branch is None else torch.empty_like(branch)
    total = x.new_zeros((3, *scale.shape) if sums else (3, x.shape[0], 0), dtype=wide)
    together = _samples(x, dy, dx_new, branch, gate, scale, mean, rstd, dx, dbranch, *total)
    for part in together:
        _norm_modulate_backward_part(*part, wide=wide, sums=sums)
    return dx, x.new_empty(0) if dbranch is None else dbranch, total if sums else total.view(0)


def _norm_modulate_backward_part(
    x, dy, dx_new, branch, gate, scale, mean, rstd, dx, dbranch, dshift, dscale, dgate, *, wide,
    sums,
):  # fmt: skip
    """Of some samples, into dx, dbranch and the sums."""
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
    if sums:
        h = torch.sub(x, mean, out=g).mul_(rstd)  # g has done its work
        torch.sum(dy, 1, out=dshift)
        torch.sum(h.mul_(dy), 1, out=dscale)
    if branch is not None:
        if sums:
            torch.sum(torch.mul(branch.to(wide), grad, out=g), 1, out=dgate)
        gate = gate.to(wide)[:, None]
        if dbranch.dtype == wide:
            torch.mul(grad, gate, out=dbranch)
        else:
            dbranch.copy_(torch.mul(grad, gate, out=g))


_norm_modulate_backward_op = torch.library.custom_op(
    "fastrepa::norm_modulate_backward", mutates_args=()
)(_norm_modulate_backward)


@_norm_modulate_backward_op.register_fake
def _(dy, dx_new, x, branch, gate, scale, mean, rstd, sums):
    return (
        torch.empty_like(x),
        x.new_empty(0) if branch is None else torch.empty_like(branch),
        x.new_empty((3, *scale.shape) if sums else (0,), dtype=mean.dtype),
    )


_norm_modulate_backward_call = first_order(_norm_modulate_backward_op)


def _norm_setup(ctx, inputs, output):
    x, branch, gate, shift, scale, _, _ = inputs
    x_new, _, mean, rstd = output
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x if branch is None else x_new, branch, gate, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd, *([x_new] if branch is None else []))
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, dx_new, dy, _mean, _rstd):
    x, branch, gate, scale, mean, rstd = ctx.saved_tensors
    need_x, need_branch, need_gate, need_shift, need_scale, _, _ = ctx.needs_input_grad
    if dy is None:  # only x_new was used
        dy = torch.zeros_like(x)
    # .sum().backward() sends a gradient of stride 0: contiguous() is not for show.
    dx, dbranch, sums = _norm_modulate_backward_call(
        dy.contiguous(), None if dx_new is None or branch is None else dx_new.contiguous(),
        x, branch, gate, scale, mean, rstd, need_gate or need_shift or need_scale,
    )  # fmt: skip
    return (
        dx if need_x else None,
        dbranch if need_branch else None,
        sums[2].to(gate.dtype) if need_gate else None,
        sums[0].to(ctx.shift_dtype) if need_shift else None,
        sums[1].to(scale.dtype) if need_scale else None,
        None,
        None,
    )


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
        row = launch.rows("norm_forward", d, x.device)
        tiles = triton.cdiv(t, row.block_n)
        _residual_fwd_kernel[(b * tiles,)](
            x, branch, gate, x_new, gate.stride(0), t, d, tiles,
            BLOCK_N=row.block_n, BLOCK_D=row.block_d, num_warps=row.num_warps,
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
        dgate = torch.sum(dx.to(wide) * branch.to(wide), 1) if sums else dx.new_empty(0, dtype=wide)
        return (dx.to(wide) * gate.to(wide)[:, None]).to(branch.dtype), dgate
    dbranch = torch.empty_like(branch)
    if not branch.numel():
        return dbranch, torch.zeros((b, d) if sums else (0,), device=dx.device)
    row = launch.rows("norm_backward", d, branch.device)
    per_split = launch.rows_per_split(b, t)
    splits = triton.cdiv(t, per_split)
    parts = torch.empty((b, splits, d) if sums else (0,), dtype=torch.float32, device=branch.device)
    _residual_bwd_kernel[(b * splits,)](
        dx, branch, gate, dbranch, parts, gate.stride(0), t, d, splits,
        SUMS=sums, ROWS=per_split, BLOCK_D=row.block_d, num_warps=row.num_warps,
    )  # fmt: skip
    return dbranch, parts.sum(1) if sums else parts


@_gated_residual_backward.register_fake
def _(dx, branch, gate, sums):
    wide = launch.arithmetic_dtype(dx)
    return torch.empty_like(branch), branch.new_empty(gate.shape if sums else (0,), dtype=wide)


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
        dgate.to(gate.dtype) if need_gate and dgate is not None else None,
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


def _aot_cases() -> list[AotCase]:
    """bf16 branches and modulation around an fp32 residual stream, at every row of the table."""
    bf, fp = "*bf16", "*fp32"
    fwd_types = {
        "x_ptr": fp, "branch_ptr": bf, "gate_ptr": bf, "shift_ptr": bf, "scale_ptr": bf,
        "x_new_ptr": fp, "y_ptr": bf, "mean_ptr": fp, "rstd_ptr": fp, "eps": "fp32",
    }  # fmt: skip
    bwd_types = {
        "dy_ptr": bf, "dx_new_ptr": fp, "x_ptr": fp, "branch_ptr": bf, "gate_ptr": bf,
        "scale_ptr": bf, "mean_ptr": fp, "rstd_ptr": fp, "dx_ptr": fp, "dbranch_ptr": bf,
        "sums_ptr": fp,
    }  # fmt: skip
    cases = []
    for generation in launch.GENERATIONS:
        for width, row in launch.ROWS["norm_forward"][generation].items():
            for gated in (False, True):
                absent = {} if gated else {"branch_ptr": None, "gate_ptr": None}
                sizes = {"GATED": gated, "BLOCK_N": row.block_n, "BLOCK_D": row.block_d}
                cases.append(AotCase(
                    _norm_fwd_kernel, f"{'gated ' if gated else ''}width {width}", generation,
                    fwd_types, {**sizes, **absent}, row.num_warps, registers=128, shared=SHARED,
                    wide_loads=4 if gated else 2, long_offsets=("x_ptr", "y_ptr"),
                ))  # fmt: skip
        for width, row in launch.ROWS["norm_backward"][generation].items():
            for gated in (False, True):
                absent = {} if gated else {"branch_ptr": None, "gate_ptr": None, "dx_new_ptr": None}
                sizes = {
                    "GATED": gated, "RESIDUAL": gated, "SUMS": True, "ROWS": 32,
                    "BLOCK_D": row.block_d,
                }  # fmt: skip
                cases.append(AotCase(
                    _norm_bwd_kernel, f"{'gated ' if gated else ''}width {width}", generation,
                    bwd_types, {**sizes, **absent}, row.num_warps, registers=128, shared=SHARED,
                    wide_loads=4 if gated else 2, long_offsets=("x_ptr", "dx_ptr"),
                ))  # fmt: skip
        cases += _aot_residual_cases(generation)
    return cases


def _aot_residual_cases(generation: int) -> list[AotCase]:
    bf, fp = "*bf16", "*fp32"
    cases = [
        AotCase(
            _residual_fwd_kernel, f"width {width}", generation,
            {"x_ptr": fp, "branch_ptr": bf, "gate_ptr": bf, "x_new_ptr": fp},
            {"BLOCK_N": row.block_n, "BLOCK_D": row.block_d}, row.num_warps, registers=64,
            shared=SHARED, wide_loads=3, long_offsets=("x_ptr", "branch_ptr", "x_new_ptr"),
        )
        for width, row in launch.ROWS["norm_forward"][generation].items()
    ]  # fmt: skip
    return cases + [
        AotCase(
            _residual_bwd_kernel, f"width {width}", generation,
            {"dx_ptr": fp, "branch_ptr": bf, "gate_ptr": bf, "dbranch_ptr": bf, "sums_ptr": fp},
            {"SUMS": True, "ROWS": 32, "BLOCK_D": row.block_d}, row.num_warps, registers=64,
            shared=SHARED, wide_loads=3, long_offsets=("dx_ptr", "branch_ptr", "dbranch_ptr"),
        )
        for width, row in launch.ROWS["norm_backward"][generation].items()
    ]  # fmt: skip


AOT_CASES = _aot_cases()
