"""Adaptive LayerNorm and the products that read it, without keeping what is cheap to make again.

    x' = x + gate branch  (or x itself)      y = LN(x') (1 + scale) + shift
    adaln_linear:   out = y w^T + b
    adaln_mlp:      a = y w1^T + b1,   h = GELU(a),   out = h w2^T + b2     (tanh form of GELU)

nn.Linear saves its input: y for the first product, h for the second, which together are five of the
about eighteen [B,T,D] tensors that an unfused block keeps for backward. Both follow from what is
saved anyway by one pass over memory, so here they are made again in backward and never kept.

Shapes: B batch, T tokens, D width, N = B*T rows, F width of the MLP, M width out.
x, branch [B,T,D]; shift, scale, gate [B,D] (views are read in place); w [M,D], b [M];
w1 [F,D], b1 [F]; w2 [M,F], b2 [M].
Saved for backward: x', branch, gate, shift, scale, two fp32 numbers a row, the weights and a [N,F].
Recomputed: y, and h in the same pass as GELU' (activation.py).

Backward: with dout the gradient of out,
    adaln_linear:  dw = dout^T y    db = sum dout    dy = dout w
    adaln_mlp:     dh = dout w2     da = dh GELU'(a)
                   dw2 = dout^T h   db2 = sum dout   dw1 = da^T y   db1 = sum da   dy = da w1
then dy through the norm and the residual (adaln.py). Products are cuBLAS's.

Under ZeRO-3 the weights that autograd saves are the Parameters themselves, as nn.Linear saves them;
call these from the forward of the module that owns the weights, or of one around it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.activation import activate_backward, column_sums
from fastrepa_kernels.adaln import (
    EPS,
    _check,
    _modulate_again_torch,
    _norm_modulate,
    _norm_modulate_backward,
    _row_major,
    gated_residual_layernorm_modulate_cost,
    gated_residual_layernorm_modulate_reference,
    layernorm_modulate_cost,
    layernorm_modulate_reference,
)
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.mlp import _linear_gelu, linear_gelu_cost
from fastrepa_kernels.registration import differentiable, first_order

Branch = tuple[Tensor, Tensor]


def adaln_linear_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Branch | None = None,
    eps: float = EPS,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification, in whatever dtype it is given (float64 in tests)."""
    if residual is None:
        y = layernorm_modulate_reference(x, shift, scale, eps=eps, out_dtype=weight.dtype)
        return F.linear(y, weight, bias)
    x_new, y = gated_residual_layernorm_modulate_reference(
        x, *residual, shift, scale, eps=eps, out_dtype=weight.dtype
    )
    return x_new, F.linear(y, weight, bias)


def adaln_mlp_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    residual: Branch | None = None,
    eps: float = EPS,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification, in whatever dtype it is given (float64 in tests)."""
    w1, b1, w2, b2 = weights
    first = adaln_linear_reference(x, shift, scale, w1, b1, residual=residual, eps=eps)
    if residual is None:
        assert isinstance(first, Tensor)
        return F.linear(F.gelu(first, approximate="tanh"), w2, b2)
    x_new, a = first
    return x_new, F.linear(F.gelu(a, approximate="tanh"), w2, b2)


def _rows(t: Tensor) -> Tensor:
    return t.view(-1, t.shape[-1])


def _again(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """y [N,D] from what was normalised."""
    if launch.use_triton(x, x.shape[-1]):
        return _rows(_norm_modulate(x, None, None, shift, scale, eps, dtype)[1])
    return _rows(_modulate_again_torch(x, shift, scale, mean, rstd, dtype))


def _first_shapes(x, branch):
    """Fakes of (x_new, mean, rstd)."""
    statistics = launch.arithmetic_dtype(x)
    return (
        x.new_empty(0) if branch is None else torch.empty_like(x),
        x.new_empty(x.shape[:2], dtype=statistics),
        x.new_empty(x.shape[:2], dtype=statistics),
    )


def _norm_grad_shapes(x, branch, scale, mean, sums):
    """Fakes of the norm's (dx, dbranch, sums)."""
    return (
        torch.empty_like(x),
        x.new_empty(0) if branch is None else torch.empty_like(branch),
        x.new_empty((3, *scale.shape) if sums else (0,), dtype=mean.dtype),
    )


def _bias_grad(g: Tensor, needed: bool) -> Tensor:
    return column_sums(g).to(g.dtype) if needed else g.new_empty(0)


# adaln_linear -----------------------------------------------------------------------------------


@torch.library.custom_op("fastrepa::adaln_linear", mutates_args=())
def _adaln_linear(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_new, out, mean, rstd); x_new is empty where there is no branch."""
    with launch.without_autocast(x):
        x_new, y, mean, rstd = _norm_modulate(x, branch, gate, shift, scale, eps, weight.dtype)
        out = torch.addmm(bias, _rows(y), weight.t())
        return x_new, out.view(*x.shape[:2], weight.shape[0]), mean, rstd


@_adaln_linear.register_fake
def _(x, branch, gate, shift, scale, weight, bias, eps):
    x_new, mean, rstd = _first_shapes(x, branch)
    return x_new, weight.new_empty((*x.shape[:2], weight.shape[0])), mean, rstd


@torch.library.custom_op("fastrepa::adaln_linear_backward", mutates_args=())
def _adaln_linear_backward(
    dout: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    eps: float,
    sums: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, [dshift, dscale, dgate], dw, db); x is what was normalised."""
    need_w, need_b = needs
    with launch.without_autocast(x):
        g = _rows(dout)
        dw = weight.new_empty(0)
        if need_w:
            dw = torch.mm(g.t(), _again(x, shift, scale, mean, rstd, eps, weight.dtype))
        dy = torch.mm(g, weight).view_as(x)
        dx, dbranch, total = _norm_modulate_backward(
            dy, dx_new, x, branch, gate, scale, mean, rstd, sums
        )
        return dx, dbranch, total, dw, _bias_grad(g, need_b)


@_adaln_linear_backward.register_fake
def _(dout, dx_new, x, branch, gate, shift, scale, mean, rstd, weight, eps, sums, needs):
    dw, db = (weight.new_empty(weight.shape[:n] if needs[2 - n] else (0,)) for n in (2, 1))
    return *_norm_grad_shapes(x, branch, scale, mean, sums), dw, db


_adaln_linear_backward_call = first_order(_adaln_linear_backward)


def _linear_setup(ctx, inputs, output):
    x, branch, gate, shift, scale, weight, _, ctx.eps = inputs
    x_new, _, mean, rstd = output
    kept = x if branch is None else x_new
    ctx.save_for_backward(kept, branch, gate, shift, scale, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd, *([x_new] if branch is None else []))
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, dx_new, dout, _mean, _rstd):
    x, branch, gate, shift, scale, mean, rstd, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if dout is None:  # only x_new was used
        dout = weight.new_zeros((*x.shape[:2], weight.shape[0]))
    *norm, dw, db = _adaln_linear_backward_call(
        dout.contiguous(), _flowing(dx_new, branch), x, branch, gate, shift, scale, mean, rstd,
        weight, ctx.eps, any(needs[2:5]), list(needs[5:7]),
    )  # fmt: skip
    return (
        *_norm_grads(needs, norm, gate, shift, scale),
        dw if needs[5] else None,
        db if needs[6] else None,
        None,
    )


def _flowing(dx_new: Tensor | None, branch: Tensor | None) -> Tensor | None:
    # .sum().backward() sends a gradient of stride 0: contiguous() is not for show.
    return None if dx_new is None or branch is None else dx_new.contiguous()


def _norm_grads(needs, norm, gate, shift, scale):
    """Gradients of x, branch, gate, shift, scale, in their dtypes; None where not needed."""
    dx, dbranch, sums = norm
    return (
        dx if needs[0] else None,
        dbranch if needs[1] else None,
        sums[2].to(gate.dtype) if needs[2] else None,
        sums[0].to(shift.dtype) if needs[3] else None,
        sums[1].to(scale.dtype) if needs[4] else None,
    )


_adaln_linear_call = differentiable(
    _adaln_linear, setup_context=_linear_setup, backward=_linear_backward
)


# adaln_mlp --------------------------------------------------------------------------------------


@torch.library.custom_op("fastrepa::adaln_mlp", mutates_args=())
def _adaln_mlp(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x_new, out, mean, rstd, a); a [N,F] is empty unless `keep`."""
    with launch.without_autocast(x):
        x_new, y, mean, rstd = _norm_modulate(x, branch, gate, shift, scale, eps, w1.dtype)
        h, a = _linear_gelu(_rows(y), w1, b1, keep)
        out = torch.addmm(b2, h, w2.t())
        return x_new, out.view(*x.shape[:2], w2.shape[0]), mean, rstd, a


@_adaln_mlp.register_fake
def _(x, branch, gate, shift, scale, w1, b1, w2, b2, eps, keep):
    x_new, mean, rstd = _first_shapes(x, branch)
    out = w2.new_empty((*x.shape[:2], w2.shape[0]))
    a = w1.new_empty((x.shape[0] * x.shape[1], w1.shape[0]) if keep else (0,))
    return x_new, out, mean, rstd, a


@torch.library.custom_op("fastrepa::adaln_mlp_backward", mutates_args=())
def _adaln_mlp_backward(
    dout: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    a: Tensor,
    w1: Tensor,
    w2: Tensor,
    eps: float,
    sums: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, [dshift, dscale, dgate], dw1, db1, dw2, db2); x is what was normalised."""
    need_w1, need_b1, need_w2, need_b2 = needs
    with launch.without_autocast(x):
        g = _rows(dout)
        dh = torch.mm(g, w2)
        h = torch.empty_like(a) if need_w2 else None
        db1 = activate_backward(dh, a, dh, gelu=True, sums=need_b1, again=h)
        dw2 = w2.new_empty(0) if h is None else torch.mm(g.t(), h)
        del h  # before the next large tensor
        dw1 = w1.new_empty(0)
        if need_w1:
            dw1 = torch.mm(dh.t(), _again(x, shift, scale, mean, rstd, eps, w1.dtype))
        dy = torch.mm(dh, w1).view_as(x)
        dx, dbranch, total = _norm_modulate_backward(
            dy, dx_new, x, branch, gate, scale, mean, rstd, sums
        )
        db1 = w1.new_empty(0) if db1 is None else db1.to(w1.dtype)
        return dx, dbranch, total, dw1, db1, dw2, _bias_grad(g, need_b2)


@_adaln_mlp_backward.register_fake
def _(dout, dx_new, x, branch, gate, shift, scale, mean, rstd, a, w1, w2, eps, sums, needs):
    shapes = (w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    grads = (w1.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))
    return *_norm_grad_shapes(x, branch, scale, mean, sums), *grads


_adaln_mlp_backward_call = first_order(_adaln_mlp_backward)


def _mlp_setup(ctx, inputs, output):
    x, branch, gate, shift, scale, w1, _, w2, _, ctx.eps, _ = inputs
    x_new, _, mean, rstd, a = output
    kept = x if branch is None else x_new
    ctx.save_for_backward(kept, branch, gate, shift, scale, mean, rstd, a, w1, w2)
    ctx.mark_non_differentiable(mean, rstd, a, *([x_new] if branch is None else []))
    ctx.set_materialize_grads(False)


def _mlp_backward(ctx, dx_new, dout, _mean, _rstd, _a):
    x, branch, gate, shift, scale, mean, rstd, a, w1, w2 = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if dout is None:  # only x_new was used
        dout = w2.new_zeros((*x.shape[:2], w2.shape[0]))
    *norm, dw1, db1, dw2, db2 = _adaln_mlp_backward_call(
        dout.contiguous(), _flowing(dx_new, branch), x, branch, gate, shift, scale, mean, rstd, a,
        w1, w2, ctx.eps, any(needs[2:5]), list(needs[5:9]),
    )  # fmt: skip
    grads = zip((dw1, db1, dw2, db2), needs[5:9], strict=True)
    return (
        *_norm_grads(needs, norm, gate, shift, scale),
        *(g if need else None for g, need in grads),
        None,
        None,
    )


_adaln_mlp_call = differentiable(_adaln_mlp, setup_context=_mlp_setup, backward=_mlp_backward)


# Public -----------------------------------------------------------------------------------------


def _prepared(
    name: str,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    residual: Branch | None,
    products: dict[str, Tensor],
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Checked and laid out: ([x, branch, gate, shift, scale], weights and biases)."""
    cast = launch.autocast_dtype(x)
    if cast is not None:
        products = {key: value.to(cast) for key, value in products.items()}
    branch, gate = residual or (None, None)
    vectors = {"shift": shift, "scale": scale} | ({} if gate is None else {"gate": gate})
    _check(name, x, branch, **vectors)
    width, dtype = x.shape[-1], next(iter(products.values())).dtype
    for key, value in products.items():
        is_weight = key.startswith("w")
        if is_weight and (value.ndim != 2 or value.shape[1] != width):
            raise ValueError(
                f"{name}: {key} must be [*, {width}]; got {tuple(value.shape)} "
                "(under ZeRO-3, call this inside the owning module's forward)"
            )
        if not is_weight and value.shape != (width,):
            raise ValueError(f"{name}: {key} must be [{width}]; got {tuple(value.shape)}")
        if value.dtype != dtype or value.device != x.device or not value.is_floating_point():
            raise ValueError(
                f"{name}: {key} must be {dtype} on {x.device}, as the first weight and x; "
                f"got {value.dtype} on {value.device}"
            )
        width = value.shape[0]
    rows = [None if t is None else _row_major(t) for t in (gate, shift, scale)]
    tensors = [x.contiguous(), None if branch is None else branch.contiguous(), *rows]
    return tensors, [value.contiguous() for value in products.values()]


def adaln_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Branch | None = None,
    eps: float = EPS,
) -> Tensor | tuple[Tensor, Tensor]:
    """Modulated LayerNorm, then a Linear: `linear(LN(x) (1 + scale) + shift)`.

    x: [B, T, D] float32, float16 or bfloat16 (float64 through torch); shift, scale: [B, D], any
    floating dtype; weight: [M, D], bias: [M], of one dtype, in which the norm's output is rounded
    and the product runs (under torch.autocast: its dtype). residual: (branch [B, T, D], gate
    [B, D]), added to x first: x' = x + gate branch. Returns [B, T, M]; with a residual, (x' in x's
    dtype, [B, T, M]). Raises ValueError where shapes, dtypes or devices do not fit.
    """
    products = {"weight": weight, "bias": bias}
    given, (w, b) = _prepared("adaln_linear", x, shift, scale, residual, products)
    x_new, out, _, _ = _adaln_linear_call(*given, w, b, eps)
    return out if residual is None else (x_new, out)


def adaln_mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    residual: Branch | None = None,
    eps: float = EPS,
) -> Tensor | tuple[Tensor, Tensor]:
    """Modulated LayerNorm, then a transformer's MLP: `w2 GELU(w1 y + b1) + b2`, tanh form.

    weights: w1 [F, D], b1 [F], w2 [M, F], b2 [M], of one dtype; everything else as in
    `adaln_linear`. Returns [B, T, M]; with a residual, (x' in x's dtype, [B, T, M]).
    """
    products = dict(zip(("w1", "b1", "w2", "b2"), weights, strict=True))
    given, laid = _prepared("adaln_mlp", x, shift, scale, residual, products)
    tensors = [t for t in (*given, *laid) if t is not None]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    x_new, out, *_ = _adaln_mlp_call(*given, *laid, eps, keep)
    return out if residual is None else (x_new, out)


def adaln_linear_cost(
    b: int, t: int, d: int, m: int, x_itemsize: int, y_itemsize: int,
    *, residual: bool = False, backward: bool = False,
) -> Cost:  # fmt: skip
    """The norm and one product; backward makes y again and takes two products."""
    norm = gated_residual_layernorm_modulate_cost if residual else layernorm_modulate_cost
    n, product = b * t, 2 * b * t * d * m
    moved = y_itemsize * (n * d + n * m + d * m + m)
    if not backward:
        return norm(b, t, d, x_itemsize, y_itemsize) + Cost(product, moved)
    again = layernorm_modulate_cost(b, t, d, x_itemsize, y_itemsize)
    grads = Cost(2 * product + n * m, 2 * moved)
    return norm(b, t, d, x_itemsize, y_itemsize, backward=True) + again + grads


def adaln_mlp_cost(
    b: int, t: int, d: int, f: int, x_itemsize: int, y_itemsize: int,
    *, residual: bool = False, backward: bool = False,
) -> Cost:  # fmt: skip
    """The norm and an MLP back to width d; backward makes y and h again."""
    n = b * t
    second = Cost(2 * n * f * d, y_itemsize * (n * f + n * d + f * d + d))
    if not backward:
        norm = gated_residual_layernorm_modulate_cost if residual else layernorm_modulate_cost
        gelu = linear_gelu_cost(n, d, f, y_itemsize)
        return norm(b, t, d, x_itemsize, y_itemsize) + gelu + second
    first = adaln_linear_cost(
        b, t, d, f, x_itemsize, y_itemsize, residual=residual, backward=True
    )  # fmt: skip
    gelu = Cost(15 * n * f, 4 * n * f * y_itemsize)  # dh, a in; da, h out
    return first + gelu + second + second
