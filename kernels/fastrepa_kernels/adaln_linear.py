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
Saved for backward: x', branch, gate, shift, scale, two fp32 numbers a row, the weights and a [N,F];
with `keep_h` h too. Recomputed: y, by the norm's backward, which has all of it in registers; h,
where it is not kept, in the same pass as GELU' (activation.py).

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
    NormGradients,
    _check,
    _flowing,
    _in_order,
    _norm_gradient_shapes,
    _norm_gradients,
    _norm_modulate,
    _norm_shapes,
    _row_major,
    _save,
    gated_residual_layernorm_modulate_cost,
    gated_residual_reference,
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
    """The specification, in whatever dtype it is given (float64 in tests).

    Arguments and result as in `adaln_linear`: x [B,T,D] -> [B,T,M].
    """
    if residual is not None:
        x = gated_residual_reference(x, *residual)
    y = layernorm_modulate_reference(x, shift, scale, eps=eps, out_dtype=weight.dtype)
    out = F.linear(y, weight, bias)
    return out if residual is None else (x, out)


def adaln_mlp_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    residual: Branch | None = None,
    eps: float = EPS,
    keep_h: bool = False,  # autograd keeps it anyway
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification, in whatever dtype it is given (float64 in tests).

    Arguments and result as in `adaln_mlp`: x [B,T,D] -> [B,T,M].
    """
    w1, b1, w2, b2 = weights
    if residual is not None:
        x = gated_residual_reference(x, *residual)
    y = layernorm_modulate_reference(x, shift, scale, eps=eps, out_dtype=w1.dtype)
    out = F.linear(F.gelu(F.linear(y, w1, b1), approximate="tanh"), w2, b2)
    return out if residual is None else (x, out)


def _rows(t: Tensor) -> Tensor:
    return t.view(-1, t.shape[-1])


def _first_gradients(
    g: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    sums: bool,
    need_w: bool,
) -> tuple[NormGradients, Tensor]:
    """Return ((dx, dbranch, dshift, dscale, dgate), dw) of the product that reads y, from g [N,M].

    g is the product's gradient, dw has its weight's shape [M,D]. y is made again in the norm's
    backward, which is therefore between the two products.
    """
    dy = torch.mm(g, weight).view_as(x)  # [B,T,D]
    norm, y = _norm_gradients(
        dy, dx_new, x, branch, gate, shift, scale, mean, rstd, sums,
        weight.dtype if need_w else None,
    )  # fmt: skip
    del dy
    return norm, torch.mm(g.t(), _rows(y)) if need_w else weight.new_empty(0)


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
    """Return (x_new [B,T,D], out [B,T,M], mean, rstd [B,T]); x_new is empty without a branch."""
    with launch.without_autocast(x):
        x_new, y, mean, rstd = _norm_modulate(x, branch, gate, shift, scale, eps, weight.dtype)
        out = torch.addmm(bias, _rows(y), weight.t())  # [N,M]
        return x_new, out.view(*x.shape[:2], weight.shape[0]), mean, rstd


@_adaln_linear.register_fake
def _(x, branch, gate, shift, scale, weight, bias, eps):
    x_new, mean, rstd = _norm_shapes(x, branch)
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
    sums: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dbranch, dshift, dscale, dgate, dw, db); x is what was normalised."""
    need_w, need_b = needs
    with launch.without_autocast(x):
        g = _rows(dout)  # [N,M]
        norm, dw = _first_gradients(
            g, dx_new, x, branch, gate, shift, scale, mean, rstd, weight, sums, need_w
        )
        return *norm, dw, _bias_grad(g, need_b)


@_adaln_linear_backward.register_fake
def _(dout, dx_new, x, branch, gate, shift, scale, mean, rstd, weight, sums, needs):
    dw, db = (weight.new_empty(weight.shape[:n] if needs[2 - n] else (0,)) for n in (2, 1))
    return *_norm_gradient_shapes(x, branch, gate, shift, scale, sums), dw, db


_adaln_linear_backward_call = first_order(_adaln_linear_backward)


def _linear_setup(ctx, inputs, output):
    *given, weight, _, _ = inputs
    x_new, _, *statistics = output
    _save(ctx, given, x_new, statistics, weight)


def _linear_backward(ctx, dx_new, dout, _mean, _rstd):
    x, branch, gate, shift, scale, mean, rstd, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if dout is None:  # only x_new was used
        dout = weight.new_zeros((*x.shape[:2], weight.shape[0]))
    *norm, dw, db = _adaln_linear_backward_call(
        dout.contiguous(), _flowing(dx_new, branch), x, branch, gate, shift, scale, mean, rstd,
        weight, any(needs[2:5]), list(needs[5:7]),
    )  # fmt: skip
    return (*_in_order(norm, needs[:5]), dw if needs[5] else None, db if needs[6] else None, None)


_adaln_linear_call = differentiable(
    _adaln_linear, setup_context=_linear_setup, backward=_linear_backward
)


def _tall_product(g: Tensor, h: Tensor) -> Tensor:
    """Multiply g^T [D,N] by h [N,F]: on a GPU with F > D as (h^T g)^T and a small transposition.

    cuBLAS has faster kernels for that: on an H200 12% at SiT-XL/2's MLP
    (benchmarks/records/gpu_suite_h200.jsonl).
    """
    if g.is_cuda and h.shape[1] > g.shape[1]:
        return torch.mm(h.t(), g).t().contiguous()
    return torch.mm(g.t(), h)


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
    keep_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (x_new, out, mean, rstd, a, h); a [N,F] is empty unless `keep`, h unless `keep_h`."""
    with launch.without_autocast(x):
        x_new, y, mean, rstd = _norm_modulate(x, branch, gate, shift, scale, eps, w1.dtype)
        h, a = _linear_gelu(_rows(y), w1, b1, keep)  # [N,F]
        out = torch.addmm(b2, h, w2.t())  # [N,M]
        h = h if keep_h else h.new_empty(0)
        return x_new, out.view(*x.shape[:2], w2.shape[0]), mean, rstd, a, h


@_adaln_mlp.register_fake
def _(x, branch, gate, shift, scale, w1, b1, w2, b2, eps, keep, keep_h):
    x_new, mean, rstd = _norm_shapes(x, branch)
    out = w2.new_empty((*x.shape[:2], w2.shape[0]))
    hidden = x.shape[0] * x.shape[1], w1.shape[0]
    a, h = (w1.new_empty(hidden if kept else (0,)) for kept in (keep, keep_h))
    return x_new, out, mean, rstd, a, h


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
    h: Tensor,
    w1: Tensor,
    w2: Tensor,
    sums: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dbranch, dshift, dscale, dgate, dw1, db1, dw2, db2); x was normalised."""
    need_w1, need_b1, need_w2, need_b2 = needs
    with launch.without_autocast(x):
        g = _rows(dout)  # [N,M]
        dh = torch.mm(g, w2)  # [N,F]
        again = torch.empty_like(a) if need_w2 and h.shape != a.shape else None
        db1 = activate_backward(dh, a, dh, gelu=True, sums=need_b1, again=again)
        dw2 = w2.new_empty(0)
        if need_w2:
            dw2 = _tall_product(g, h if again is None else again)
        del again  # before the next large tensor
        norm, dw1 = _first_gradients(
            dh, dx_new, x, branch, gate, shift, scale, mean, rstd, w1, sums, need_w1
        )
        db1 = w1.new_empty(0) if db1 is None else db1.to(w1.dtype)
        return *norm, dw1, db1, dw2, _bias_grad(g, need_b2)


@_adaln_mlp_backward.register_fake
def _(dout, dx_new, x, branch, gate, shift, scale, mean, rstd, a, h, w1, w2, sums, needs):
    shapes = (w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    grads = (w1.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))
    return *_norm_gradient_shapes(x, branch, gate, shift, scale, sums), *grads


_adaln_mlp_backward_call = first_order(_adaln_mlp_backward)


def _mlp_setup(ctx, inputs, output):
    *given, w1, _, w2, _, _, _, _ = inputs
    x_new, _, *statistics, a, h = output
    _save(ctx, given, x_new, statistics, a, h, w1, w2, unread=(a, h))


def _mlp_backward(ctx, dx_new, dout, _mean, _rstd, _a, _h):
    x, branch, gate, shift, scale, mean, rstd, a, h, w1, w2 = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if dout is None:  # only x_new was used
        dout = w2.new_zeros((*x.shape[:2], w2.shape[0]))
    *norm, dw1, db1, dw2, db2 = _adaln_mlp_backward_call(
        dout.contiguous(), _flowing(dx_new, branch), x, branch, gate, shift, scale, mean, rstd, a,
        h, w1, w2, any(needs[2:5]), list(needs[5:9]),
    )  # fmt: skip
    grads = zip((dw1, db1, dw2, db2), needs[5:9], strict=True)
    return (
        *_in_order(norm, needs[:5]),
        *(g if need else None for g, need in grads),
        None,
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
    """Check and lay out: ([x, branch, gate, shift, scale], weights and biases)."""
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
    """Apply a modulated LayerNorm, then a Linear: `linear(LN(x) (1 + scale) + shift)`.

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
    keep_h: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply a modulated LayerNorm, then a transformer's MLP `w2 GELU(w1 y + b1) + b2`, tanh form.

    weights: w1 [F, D], b1 [F], w2 [M, F], b2 [M], of one dtype; everything else as in
    `adaln_linear`. keep_h: h [B T, F], in the weights' dtype, lives until backward and is not made
    again there; the numbers are the same. Returns [B, T, M]; with a residual, (x' in x's dtype,
    [B, T, M]).
    """
    products = dict(zip(("w1", "b1", "w2", "b2"), weights, strict=True))
    given, laid = _prepared("adaln_mlp", x, shift, scale, residual, products)
    tensors = [t for t in (*given, *laid) if t is not None]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    keep_h = keep_h and keep and laid[2].requires_grad  # only w2's gradient reads h
    x_new, out, *_ = _adaln_mlp_call(*given, *laid, eps, keep, keep_h)
    return out if residual is None else (x_new, out)


def adaln_linear_cost(
    b: int, t: int, d: int, m: int, x_itemsize: int, y_itemsize: int,
    *, residual: bool = False, backward: bool = False,
) -> Cost:  # fmt: skip
    """Count the norm and one product; backward writes y once more and takes two products."""
    norm = gated_residual_layernorm_modulate_cost if residual else layernorm_modulate_cost
    n, product = b * t, 2 * b * t * d * m
    moved = y_itemsize * (n * d + n * m + d * m + m)
    if not backward:
        return norm(b, t, d, x_itemsize, y_itemsize) + Cost(product, moved)
    again = Cost(2 * n * d, n * d * y_itemsize)
    grads = Cost(2 * product + n * m, 2 * moved)
    return norm(b, t, d, x_itemsize, y_itemsize, backward=True) + again + grads


def adaln_mlp_cost(
    b: int, t: int, d: int, f: int, x_itemsize: int, y_itemsize: int,
    *, residual: bool = False, backward: bool = False, keep_h: bool = False,
) -> Cost:  # fmt: skip
    """Count the norm and an MLP back to width d; backward makes y again, and h unless kept."""
    n = b * t
    second = Cost(2 * n * f * d, y_itemsize * (n * f + n * d + f * d + d))
    if not backward:
        norm = gated_residual_layernorm_modulate_cost if residual else layernorm_modulate_cost
        gelu = linear_gelu_cost(n, d, f, y_itemsize)
        return norm(b, t, d, x_itemsize, y_itemsize) + gelu + second
    first = adaln_linear_cost(
        b, t, d, f, x_itemsize, y_itemsize, residual=residual, backward=True
    )  # fmt: skip
    gelu = Cost(15 * n * f, (3 if keep_h else 4) * n * f * y_itemsize)  # dh, a in; da, h out
    return first + gelu + second + second
