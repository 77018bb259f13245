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

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.adaln_kernels import (
    _norm_bwd_kernel,
    _norm_fwd_kernel,
    _residual_bwd_kernel,
    _residual_fwd_kernel,
    _sums_kernel,
)
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.registration import differentiable, first_order

EPS = 1e-6
# dx, dbranch, dshift, dscale, dgate
NormGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
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
) -> tuple[NormGradients, Tensor]:
    """((dx, dbranch, dshift, dscale, dgate), y): x is what was normalised; what nobody asked for is
    empty. y is made again where `y_dtype` asks for it: everything it takes is at hand here.
    """
    dx = torch.empty_like(x)
    dbranch = x.new_empty(0) if branch is None else torch.empty_like(branch)
    wanted = (shift, scale, scale.new_empty(0) if gate is None else gate)
    dshift, dscale, dgate = (torch.empty_like(v) if sums else v.new_empty(0) for v in wanted)
    totals = [dshift, dscale, dgate]
    y = None if y_dtype is None else torch.empty_like(x, dtype=y_dtype)
    given = (dy, dx_new, x, branch, gate, shift, scale, mean, rstd, dx, dbranch, y)
    if not launch.use_triton(x, x.shape[-1]):
        _norm_gradients_torch(*given, totals)
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
    per_split = launch.rows_per_split(b, t, row.split, launch.slots(row, x.device))
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
    dy, dx_new, x, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, totals
):
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
    return _norm_gradients(dy, dx_new, x, branch, gate, shift, scale, mean, rstd, sums)[0]


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
        tiles, strips = triton.cdiv(t, table.block_n), triton.cdiv(d, table.block_c)
        _residual_fwd_kernel[(b * tiles * strips,)](
            x, branch, gate, x_new, gate.stride(0), t, d, tiles, strips,
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
