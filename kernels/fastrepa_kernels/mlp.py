"""Linear, bias and tanh-GELU: y = GELU(a), a = x w^T + b, the first half of a transformer's MLP.

Shapes: N rows (all leading dimensions of x flattened), D width in, F width out. x [..., D], w [F,D]
and b [F] as nn.Linear stores them, y [..., F].
Saved for backward: x, w and the pre-activation a; y is not saved here (the next Linear saves it as
its input).

Backward, with da = dy GELU'(a):   dx = da w      dw = da^T x      db = sum over rows of da
GELU and GELU' with the column sums of db are kernels of activation.py; the products are cuBLAS's.

Under ZeRO-3 the weight that autograd saves is the Parameter itself, as nn.Linear saves it, so that
DeepSpeed's backward hooks gather it again. Call it from the owning module's forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.activation import activate, activate_backward
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.registration import differentiable, first_order


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The specification, in whatever dtype it is given (float64 in tests): [..., D] -> [..., F]."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Return (y, a), [N,F] each, of x [N,D]; a is empty unless `keep`."""
    with launch.without_autocast(x):
        a = torch.addmm(bias, x, weight.t())  # [N,F]
        y = torch.empty_like(a) if keep else a
        activate(a, y, gelu=True)
        return y, a if keep else x.new_empty(0)


_linear_gelu_op = torch.library.custom_op("fastrepa::linear_gelu", mutates_args=())(_linear_gelu)


@_linear_gelu_op.register_fake
def _(x, weight, bias, keep):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    return y, torch.empty_like(y) if keep else x.new_empty(0)


@torch.library.custom_op("fastrepa::linear_gelu_backward", mutates_args=())
def _linear_gelu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx [N,D], dw [F,D], db [F]) of dy [N,F]; what `needs` leaves out is empty."""
    need_x, need_w, need_b = needs
    with launch.without_autocast(x):
        da = torch.empty_like(a)  # [N,F]
        sums = activate_backward(dy, a, da, gelu=True, sums=need_b)
        dx = torch.mm(da, weight) if need_x else x.new_empty(0)
        dw = torch.mm(da.t(), x) if need_w else x.new_empty(0)
        return dx, dw, x.new_empty(0) if sums is None else sums.to(x.dtype)


@_linear_gelu_backward.register_fake
def _(dy, x, weight, a, needs):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dw, db = (x.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))
    return dx, dw, db


_linear_gelu_backward_call = first_order(_linear_gelu_backward)


def _setup(ctx, inputs, output):
    x, weight, _, _ = inputs
    _, a = output
    ctx.save_for_backward(x, weight, a)
    ctx.mark_non_differentiable(a)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    if dy is None:
        return None, None, None, None
    needs = list(ctx.needs_input_grad[:3])
    grads = _linear_gelu_backward_call(dy.contiguous(), *ctx.saved_tensors, needs)
    dx, dw, db = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, dw, db, None


_linear_gelu_call = differentiable(_linear_gelu_op, setup_context=_setup, backward=_backward)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    name = "linear_gelu"
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(
            f"{name}: x must be a floating-point [..., D]; got {tuple(x.shape)} {x.dtype}"
        )
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name}: weight must be [F, D] with D = {x.shape[-1]}; got {tuple(weight.shape)} "
            "(under ZeRO-3, call this inside the owning module's forward)"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be [{weight.shape[0]}]; got {tuple(bias.shape)}")
    for argument, value in (("weight", weight), ("bias", bias)):
        if value.dtype != x.dtype or value.device != x.device:
            raise ValueError(
                f"{name}: {argument} must be {x.dtype} on {x.device}, as x; "
                f"got {value.dtype} on {value.device}"
            )


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute GELU(x weight^T + bias) with the tanh form of GELU.

    x: [..., D]; weight: [F, D]; bias: [F]; one dtype (float32, float16 or bfloat16; under
    torch.autocast all three are cast to its dtype). Returns [..., F] in that dtype.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    cast = launch.autocast_dtype(x)
    if cast is not None:
        x, weight, bias = x.to(cast), weight.to(cast), bias.to(cast)
    _check(x, weight, bias)
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    y, _ = _linear_gelu_call(
        x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), bias.contiguous(), needed
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_gelu_cost(n: int, d: int, f: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Count: forward reads x, w, b, writes a, y; backward reads dy, a, x, w, writes dx, dw, db."""
    product, weights = 2 * n * d * f, d * f + f
    if backward:
        moved = 2 * n * f + 2 * n * d + weights + d * f
        return Cost(flops=2 * product + 15 * n * f, bytes=itemsize * moved)
    return Cost(flops=product + 8 * n * f, bytes=itemsize * (n * d + weights + 2 * n * f))
