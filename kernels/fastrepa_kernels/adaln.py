"""Adaptive LayerNorm of a diffusion transformer, with the gated residual in front of it.

    layernorm_modulate:                  y = LN(x) (1 + scale) + shift
    gated_residual_layernorm_modulate:   x' = x + gate branch;  y = LN(x') (1 + scale) + shift
    gated_residual:                      x' = x + gate branch

LN has no affine part: LN(x) = (x - mean) rstd, rstd = 1 / sqrt(var + eps), over the last dimension.

Shapes: B batch, T tokens, D width, N = B*T rows. x, branch, y [B,T,D]; shift, scale, gate [B,D]
(a view such as `chunk(6, dim=1)` gives is read in place, never copied).
Saved for backward: the normalised tensor's input (x or x'), branch, shift, scale, gate and two fp32
numbers a row (mean, rstd). Recomputed: LN(x), and y where a product wants it again.

Backward, with h = LN(x'), g = dy (1 + scale), and dx' the gradient that reaches x' elsewhere:
    dx = dx' + rstd (g - mean(g) - h mean(g h))      dbranch = gate dx
    dshift = sum_t dy      dscale = sum_t dy h       dgate = sum_t branch dx
Sums over tokens are two-stage in a fixed order: two runs agree bit for bit. One read and one write
of each tensor, forward and backward, statistics in fp32. A row is held in one or two pieces
(launch.Rows), and all of it is loaded before the first sum: one trip to memory a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.adaln_kernels import (
    _norm_bwd_kernel,
    _norm_fwd_kernel,
    _residual_bwd_kernel,
    _residual_fwd_kernel,
    _sums_kernel,
    norm_gradients_torch,
    norm_modulate_torch,
)
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.language import triton
from fastrepa_kernels.registration import differentiable, first_order

EPS = 1e-6
# dx, dbranch, dshift, dscale, dgate
NormGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def layernorm_modulate_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = EPS,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The specification, in whatever dtype it is given (float64 in tests).

    x [B,T,D]; shift, scale [B,D], widened to x's dtype before any arithmetic. Returns [B,T,D].
    """
    wide = torch.promote_types(x.dtype, torch.promote_types(scale.dtype, shift.dtype))
    y = F.layer_norm(x, x.shape[-1:], eps=eps)  # [B,T,D]
    y = y * (1 + scale[:, None].to(wide)) + shift[:, None].to(wide)
    return y.to(out_dtype or shift.dtype)


def gated_residual_reference(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """The specification of the residual update: x, branch [B,T,D], gate [B,D] -> [B,T,D].

    branch and gate are widened to x's dtype before any arithmetic; the result keeps it.
    """
    wide = torch.promote_types(x.dtype, torch.promote_types(gate.dtype, branch.dtype))
    return (x + gate[:, None].to(wide) * branch.to(wide)).to(x.dtype)


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
    """The specification: the two above, one after the other. Returns (x_new, y), [B,T,D] each."""
    x_new = gated_residual_reference(x, branch, gate)
    y = layernorm_modulate_reference(x_new, shift, scale, eps=eps, out_dtype=out_dtype)
    return x_new, y


def _norm_modulate(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (x_new, y [B,T,D], mean, rstd [B,T]); x_new is empty where there is no branch."""
    b, t, d = x.shape
    gated = branch is not None and gate is not None
    if not launch.use_triton(x, d):
        return norm_modulate_torch(x, branch, gate, shift, scale, eps, out_dtype)
    x_new = torch.empty_like(x) if gated else x.new_empty(0)
    y = torch.empty_like(x, dtype=out_dtype)
    mean = torch.empty((b, t), dtype=torch.float32, device=x.device)
    rstd = torch.empty((b, t), dtype=torch.float32, device=x.device)
    if x.numel():
        row = launch.rows("norm_forward", d, x.device)
        num_pid_t = triton.cdiv(t, row.block_n)
        _norm_fwd_kernel[(b * num_pid_t,)](
            x_ptr=x, branch_ptr=branch, gate_ptr=gate, shift_ptr=shift, scale_ptr=scale,
            x_new_ptr=x_new, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd,
            stride_gate=0 if gate is None else gate.stride(0), stride_shift=shift.stride(0),
            stride_scale=scale.stride(0), T=t, D=d, num_pid_t=num_pid_t, eps=eps,
            BLOCK_N=row.block_n, BLOCK_D=row.block_d, TAIL=row.tail, num_warps=row.num_warps,
        )  # fmt: skip
    return x_new, y, mean, rstd


_norm_modulate_op = torch.library.custom_op("fastrepa::norm_modulate", mutates_args=())(
    _norm_modulate
)


@_norm_modulate_op.register_fake
def _(x, branch, gate, shift, scale, eps, out_dtype):
    x_new, mean, rstd = _norm_shapes(x, branch)
    return x_new, torch.empty_like(x, dtype=out_dtype), mean, rstd


def _norm_shapes(x, branch):
    """Return fakes of (x_new [B,T,D], mean, rstd [B,T])."""
    x_new = x.new_empty(0) if branch is None else torch.empty_like(x)
    return x_new, *(x.new_empty(x.shape[:2], dtype=launch.arithmetic_dtype(x)) for _ in range(2))


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
) -> tuple[NormGradients, Tensor]:
    """Return ((dx, dbranch [B,T,D], dshift, dscale, dgate [B,D]), y [B,T,D]).

    x is what was normalised; what nobody asked for is empty. y is made again where `y_dtype` asks
    for it: everything it takes is at hand here.
    """
    dx = torch.empty_like(x)
    dbranch = x.new_empty(0) if branch is None else torch.empty_like(branch)
    wanted = (shift, scale, scale.new_empty(0) if gate is None else gate)
    dshift, dscale, dgate = (torch.empty_like(v) if sums else v.new_empty(0) for v in wanted)
    totals = [dshift, dscale, dgate]
    y = None if y_dtype is None else torch.empty_like(x, dtype=y_dtype)
    given = (dy, dx_new, x, branch, gate, shift, scale, mean, rstd, dx, dbranch, y)
    if not launch.use_triton(x, x.shape[-1]):
        norm_gradients_torch(*given, totals)
    elif x.numel():
        _norm_gradients_triton(*given, totals, sums)
    else:
        for total in totals:
            total.zero_()
    return (dx, dbranch, dshift, dscale, dgate), x.new_empty(0) if y is None else y


def _norm_gradients_triton(
    dy, dx_new, x, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, totals, sums
):
    b, t, d = x.shape
    row = launch.rows("norm_backward", d, x.device)
    # An H200 runs the kernel without a branch, whose programs are smaller, faster unrounded.
    slots = 0 if branch is None else launch.slots(row, x.device)
    rows_per_split = launch.rows_per_split(b, t, row.split, slots)
    num_splits = triton.cdiv(t, rows_per_split)
    parts = None
    if sums:
        shape = 2 if gate is None else 3, b * num_splits, d
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    _norm_bwd_kernel[(b * num_splits,)](
        dy_ptr=dy, dx_new_ptr=dx_new, x_ptr=x, branch_ptr=branch, gate_ptr=gate,
        shift_ptr=None if y is None else shift, scale_ptr=scale, mean_ptr=mean, rstd_ptr=rstd,
        dx_ptr=dx, dbranch_ptr=dbranch, y_ptr=y, parts_ptr=parts,
        stride_gate=0 if gate is None else gate.stride(0), stride_shift=shift.stride(0),
        stride_scale=scale.stride(0), T=t, D=d, num_splits=num_splits,
        stride_parts=b * num_splits * d, ROWS=rows_per_split, BLOCK_D=row.block_d, TAIL=row.tail,
        STAGES=row.stages, num_warps=row.num_warps,
    )  # fmt: skip
    if parts is not None:
        _sum_splits(parts, totals if gate is not None else [*totals[:2], None], num_splits)


def _sum_splits(parts: Tensor, totals: list[Tensor | None], num_splits: int) -> None:
    """Sum parts [up to 3, B * num_splits, D] into totals, [B,D] each."""
    _, rows, d = parts.shape
    out0, out1, out2 = totals
    flat = launch.FLAT["norm_sums"][launch.generation(parts.device)]
    _sums_kernel[(rows // num_splits, triton.cdiv(d, flat.block))](
        parts_ptr=parts, out0_ptr=out0, out1_ptr=out1, out2_ptr=out2, D=d, num_splits=num_splits,
        stride_parts=rows * d, BLOCK_D=flat.block, num_warps=flat.num_warps,
    )  # fmt: skip


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
    return _norm_gradients(dy, dx_new, x, branch, gate, shift, scale, mean, rstd, sums)[0]


def _norm_gradient_shapes(x, branch, gate, shift, scale, sums):
    """Return fakes of (dx, dbranch [B,T,D], dshift, dscale, dgate [B,D])."""
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
    x_new, _, *statistics = output
    _save(ctx, inputs[:5], x_new, statistics)


def _save(ctx, given, x_new, statistics, *products, unread=()):
    """Save, in this order, what was normalised, branch, gate, shift, scale, (mean, rstd), products.

    given: (x, branch, gate, shift, scale); unread: further outputs that have no gradient.
    """
    x, branch, *vectors = given
    kept = x if branch is None else x_new
    ctx.save_for_backward(kept, branch, *vectors, *statistics, *products)
    ctx.mark_non_differentiable(*statistics, *unread, *([x_new] if branch is None else []))
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
    """Return (dx, dbranch, dgate, dshift, dscale), None where `needs` says so."""
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
        num_pid_t, num_pid_c = triton.cdiv(t, table.block_n), triton.cdiv(d, table.block_c)
        _residual_fwd_kernel[(b * num_pid_t * num_pid_c,)](
            x_ptr=x, branch_ptr=branch, gate_ptr=gate, x_new_ptr=x_new, stride_gate=gate.stride(0),
            T=t, D=d, num_pid_t=num_pid_t, num_pid_c=num_pid_c,
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
    """Return (dbranch [B,T,D], dgate [B,D]); dgate is empty where nobody needs it."""
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
    num_splits = triton.cdiv(t, table.rows)
    parts = None
    if sums:
        parts = torch.empty((1, b * num_splits, d), dtype=torch.float32, device=branch.device)
    _residual_bwd_kernel[(b * num_splits, triton.cdiv(d, table.block_c))](
        dx_ptr=dx, branch_ptr=branch, gate_ptr=gate, dbranch_ptr=dbranch, parts_ptr=parts,
        stride_gate=gate.stride(0), T=t, D=d, num_splits=num_splits, ROWS=table.rows,
        BLOCK_N=table.block_n, BLOCK_C=table.block_c, num_warps=table.num_warps,
    )  # fmt: skip
    if parts is not None:
        _sum_splits(parts, [dgate, None, None], num_splits)
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
    return (dx if need_x else None, dbranch if need_branch else None, dgate if need_gate else None)


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
    """Return [B,D] with any row stride, so that a chunk of [B,6D] is read where it lies."""
    return per_sample if per_sample.stride(-1) == 1 else per_sample.contiguous()


def layernorm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = EPS,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Apply LayerNorm without affine part, then a per-sample scale and shift (DiT's adaLN).

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
    """Update the residual and apply the next adaLN, in one pass.

    x: [B, T, D], the residual stream, float32 or a half dtype; branch: [B, T, D], any floating
    dtype; gate, shift, scale: [B, D]. Returns x_new = x + gate branch in x's dtype and its
    modulated norm in `out_dtype` (shift's by default), [B, T, D] each. Raises ValueError where
    shapes, dtypes or devices do not fit.
    """
    name = "gated_residual_layernorm_modulate"
    _check(name, x, branch, gate=gate, shift=shift, scale=scale)
    x_new, y, _, _ = _norm_modulate_call(
        x.contiguous(), branch.contiguous(), _row_major(gate), _row_major(shift),
        _row_major(scale), eps, out_dtype or shift.dtype,
    )  # fmt: skip
    return x_new, y


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate branch, [B, T, D] in x's dtype; branch: [B, T, D], gate: [B, D].

    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check("gated_residual", x, branch, gate=gate)
    return _gated_residual_call(x.contiguous(), branch.contiguous(), _row_major(gate))


def layernorm_modulate_cost(
    b: int, t: int, d: int, x_itemsize: int, y_itemsize: int, *, backward: bool = False
) -> Cost:
    """Count: forward reads x, writes y; backward reads dy, x, writes dx; and per-sample vectors."""
    n = b * t
    tensors = (2 * x_itemsize + y_itemsize) if backward else (x_itemsize + y_itemsize)
    return Cost(
        flops=(15 if backward else 9) * n * d,
        bytes=n * d * tensors + (3 if backward else 2) * b * d * y_itemsize + 8 * n,
    )


def gated_residual_layernorm_modulate_cost(
    b: int, t: int, d: int, x_itemsize: int, y_itemsize: int, *, backward: bool = False
) -> Cost:
    """Count: forward reads x, branch, writes x_new, y; backward reads dy, dx_new, x_new, branch.

    Backward writes dx, dbranch; branch has y's itemsize.
    """
    n = b * t
    tensors = (3 * x_itemsize + 3 * y_itemsize) if backward else (2 * x_itemsize + 2 * y_itemsize)
    return Cost(
        flops=(19 if backward else 11) * n * d,
        bytes=n * d * tensors + (5 if backward else 3) * b * d * y_itemsize + 8 * n,
    )


def gated_residual_cost(
    b: int, t: int, d: int, x_itemsize: int, branch_itemsize: int, *, backward: bool = False
) -> Cost:
    """Count: forward reads x, branch, writes x_new; backward reads dx_new, branch, writes dbranch.

    dx is dx_new itself.
    """
    tensors = x_itemsize + 2 * branch_itemsize if backward else 2 * x_itemsize + branch_itemsize
    vectors = (2 if backward else 1) * b * d * branch_itemsize
    return Cost(flops=(3 if backward else 2) * b * t * d, bytes=b * t * d * tensors + vectors)
