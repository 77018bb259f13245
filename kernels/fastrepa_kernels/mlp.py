"""Linear, bias and tanh-GELU: y = GELU(a), a = x w^T + b, the first half of a transformer's MLP.

Shapes: N rows (all leading dimensions of x flattened), D width in, F width out. x [..., D], w [F,D]
and b [F] as nn.Linear stores them, y [..., F].
Saved for backward: x, w and the pre-activation a; with `recompute=True`, x, w and b, and a is
multiplied out again. y is not saved here (the next Linear saves it as its input).

Backward, with da = dy GELU'(a):   dx = da w      dw = da^T x      db = sum over rows of da
GELU' and the column sums of db are one kernel (activation.py); the products are cuBLAS's.

Forward: either cuBLAS and one pointwise pass, or a product of ours whose epilogue writes a and y
together; launch.py's GELU_EPILOGUE chooses.

Under ZeRO-3 the weight that autograd saves is the Parameter itself, as nn.Linear saves it, so that
DeepSpeed's backward hooks gather it again. Call it from the owning module's forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.activation import _gelu_parts, activate, activate_backward
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.registration import differentiable, first_order


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The specification, in whatever dtype it is given (float64 in tests)."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@triton.jit
def _linear_gelu_gemm_kernel(
    x_ptr, w_ptr, b_ptr, a_ptr, y_ptr, N, D, F, tiles_n, tiles_f,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    in_group = GROUP_M * tiles_f  # neighbours share weight tiles in L2
    first = pid // in_group * GROUP_M
    height = tl.minimum(tiles_n - first, GROUP_M)
    n = (first + pid % in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = n.to(tl.int64)  # [BLOCK_M]
    col = (pid % in_group // height) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Rows and columns past the end read others again, unmasked, and are not stored.
    row_in, col_in = (n % N).to(tl.int64), (col % F).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(tl.cdiv(D, BLOCK_K)):
        at = start * BLOCK_K + k
        x = tl.load(
            x_ptr + (row_in[:, None] * D + at[None, :]), mask=(at < D)[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        w = tl.load(
            w_ptr + (col_in[None, :] * D + at[:, None]), mask=(at < D)[:, None], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        a = tl.dot(x, w, a)
    a += tl.load(b_ptr + col, mask=col < F, other=0.0).to(tl.float32)[None, :]
    inside = (n < N)[:, None] & (col < F)[None, :]
    rounded = a.to(y_ptr.dtype.element_ty)
    if a_ptr is not None:
        tl.store((a_ptr + row * F)[:, None] + col[None, :], rounded, mask=inside)
    a = rounded.to(tl.float32)  # backward sees the stored value, so the forward does too
    s, _ = _gelu_parts(a)
    y = (a * s).to(y_ptr.dtype.element_ty)
    tl.store((y_ptr + row * F)[:, None] + col[None, :], y, mask=inside)


def _epilogue(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    (n, d), f = x.shape, weight.shape[0]
    table = launch.GEMM["linear_gelu"][launch.generation(x.device)]
    y = torch.empty((n, f), dtype=x.dtype, device=x.device)
    a = torch.empty_like(y) if keep else None
    tiles_n, tiles_f = triton.cdiv(n, table.block_m), triton.cdiv(f, table.block_n)
    if n:
        _linear_gelu_gemm_kernel[(tiles_n * tiles_f,)](
            x, weight, bias, a, y, n, d, f, tiles_n, tiles_f,
            GROUP_M=table.group_m, BLOCK_M=table.block_m, BLOCK_N=table.block_n,
            BLOCK_K=table.block_k, num_warps=table.num_warps, num_stages=table.num_stages,
        )  # fmt: skip
    return y, x.new_empty(0) if a is None else a


def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool, recompute: bool
) -> tuple[Tensor, Tensor]:
    """(y, a); a is empty unless `keep`. `recompute` only tells backward what was saved."""
    with launch.without_autocast(x):
        half = x.dtype in (torch.float16, torch.bfloat16)
        if half and launch.use_triton(x) and launch.GELU_EPILOGUE[launch.generation(x.device)]:
            return _epilogue(x, weight, bias, keep)
        a = torch.addmm(bias, x, weight.t())
        y = torch.empty_like(a) if keep else a
        activate(a, y, gelu=True)
        return y, a if keep else x.new_empty(0)


_linear_gelu_op = torch.library.custom_op("fastrepa::linear_gelu", mutates_args=())(_linear_gelu)


@_linear_gelu_op.register_fake
def _(x, weight, bias, keep, recompute):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    return y, torch.empty_like(y) if keep else x.new_empty(0)


@torch.library.custom_op("fastrepa::linear_gelu_backward", mutates_args=())
def _linear_gelu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db); what `needs` leaves out is empty. With a bias, a is computed again."""
    need_x, need_w, need_b = needs
    with launch.without_autocast(x):
        if bias is None:
            da = torch.empty_like(a)
        else:
            a = da = torch.addmm(bias, x, weight.t())
        sums = activate_backward(dy, a, da, gelu=True, sums=need_b)
        dx = torch.mm(da, weight) if need_x else x.new_empty(0)
        dw = torch.mm(da.t(), x) if need_w else x.new_empty(0)
        return dx, dw, x.new_empty(0) if sums is None else sums.to(x.dtype)


@_linear_gelu_backward.register_fake
def _(dy, x, weight, bias, a, needs):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dw, db = (x.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))
    return dx, dw, db


_linear_gelu_backward_call = first_order(_linear_gelu_backward)


def _setup(ctx, inputs, output):
    x, weight, bias, _, recompute = inputs
    _, a = output
    ctx.save_for_backward(x, weight, bias if recompute else None, a)
    ctx.mark_non_differentiable(a)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    if dy is None:
        return None, None, None, None, None
    needs = list(ctx.needs_input_grad[:3])
    grads = _linear_gelu_backward_call(dy.contiguous(), *ctx.saved_tensors, needs)
    dx, dw, db = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, dw, db, None, None


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


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, recompute: bool = False) -> Tensor:
    """GELU(x weight^T + bias) with the tanh form of GELU.

    x: [..., D]; weight: [F, D]; bias: [F]; one dtype (float32, float16 or bfloat16; under
    torch.autocast all three are cast to its dtype). Returns [..., F] in that dtype.
    recompute: save no pre-activation, multiply it out again in backward.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    cast = launch.autocast_dtype(x)
    if cast is not None:
        x, weight, bias = x.to(cast), weight.to(cast), bias.to(cast)
    _check(x, weight, bias)
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    y, _ = _linear_gelu_call(
        x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), bias.contiguous(),
        needed and not recompute, recompute,
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_gelu_cost(n: int, d: int, f: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Forward reads x, w, b and writes a, y; backward reads dy, a, x, w and writes dx, dw, db."""
    product, weights = 2 * n * d * f, d * f + f
    if backward:
        moved = 2 * n * f + 2 * n * d + weights + d * f
        return Cost(flops=2 * product + 15 * n * f, bytes=itemsize * moved)
    return Cost(flops=product + 8 * n * f, bytes=itemsize * (n * d + weights + 2 * n * f))


def _aot_cases() -> list[AotCase]:
    bf = "*bf16"
    cases = []
    for generation, table in launch.GEMM["linear_gelu"].items():
        for label, absent in {"training": {}, "inference": {"a_ptr": None}}.items():
            cases.append(AotCase(
                _linear_gelu_gemm_kernel,
                f"{label} {table.block_m}x{table.block_n}x{table.block_k}", generation,
                dict.fromkeys(("x_ptr", "w_ptr", "b_ptr", "a_ptr", "y_ptr"), bf),
                {
                    "GROUP_M": table.group_m, "BLOCK_M": table.block_m, "BLOCK_N": table.block_n,
                    "BLOCK_K": table.block_k, **absent,
                },
                table.num_warps, num_stages=table.num_stages, registers=255,
                shared=99 * 1024 if generation == 80 else 227 * 1024, wide_loads=4, wgmma=True,
                long_offsets=("x_ptr", "w_ptr", "y_ptr"),
            ))  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
