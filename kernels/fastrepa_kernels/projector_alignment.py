"""The projector MLP and normalised cosine loss of REPA, forward and backward at once, in chunks.

    a1 = x w1^T + b1;  h1 = SiLU(a1);  a2 = h1 w2^T + b2;  h2 = SiLU(a2);  z = h2 w3^T + b3
    c = <n(z), n(y)>,  n(u) = u / max(|u|, eps);      loss = - sum_n v_n c_n / sum_n v_n

Shapes: N rows (all leading dimensions of x flattened), D width, P projector width, Z feature width.
x [..., D]; w1 [P,D], b1 [P], w2 [P,P], b2 [P], w3 [Z,P], b3 [Z] as nn.Linear stores them; target y
[..., Z]; v_n an optional weight or mask per row (absent: 1).

The loss is a mean, so its gradient is known up to the scalar that autograd hands back later: every
chunk of rows runs its forward AND backward at once, and the real backward only multiplies. With
rz = 1/max(|z|, eps), ry likewise:
    d(sum c)/dz = v rz (y ry - c z rz)          (for |z| < eps the clamp removes the second term)
Saved for backward: dx [N,D] in the weights' dtype, the weight gradients in fp32, and one scalar.
They hold the gradients of sum v c; the factor -g / sum v comes in backward, in fp32, so that fp16
does not underflow at large N. Nothing of width P or Z outlives its chunk; nothing is recomputed.
What nobody needs (frozen projector, frozen input, no_grad) is not computed. Without any gradient,
z itself is never written: the last product's epilogue reduces |z|^2, <z,y> and |y|^2.

Under ZeRO-3 the weights are whole only inside the owning module's forward: they are read there and
nowhere else, because no weight is saved for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.activation import activate, activate_backward, partial_rows, sum_of_parts
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.language import triton
from fastrepa_kernels.projector_alignment_kernels import (
    _cosine_kernel,
    _cosine_sums_gemm_kernel,
    _scale_kernel,
)
from fastrepa_kernels.registration import differentiable, first_order

EPS = 1e-12
NAMES = ("w1", "b1", "w2", "b2", "w3", "b3")


def projector_reference(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Project x [..., D] by the three Linears: z [..., Z], in the weights' dtype."""
    w1, b1, w2, b2, w3, b3 = weights
    h = F.silu(F.linear(x.to(w1.dtype), w1, b1))  # [..., P]
    return F.linear(F.silu(F.linear(h, w2, b2)), w3, b3)


def projector_alignment_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    target: Tensor,
    *,
    eps: float = EPS,
    row_weight: Tensor | None = None,
    target_scale: Tensor | None = None,
) -> Tensor:
    """The specification, vectorised eager, in whatever dtype it is given (float64 in tests).

    Arguments and result as in `projector_alignment`, x [..., D] and target [..., Z] -> [], but
    rows must be weighted by something: `row_weight` sums to more than 0.
    """
    z = projector_reference(x, weights)  # [..., Z]
    wide = launch.arithmetic_dtype(x, *weights)
    y = target.to(wide)
    if target_scale is not None:
        y = y * target_scale.to(wide).unsqueeze(-1)
    c = (F.normalize(z.to(wide), dim=-1, eps=eps) * F.normalize(y, dim=-1, eps=eps)).sum(-1)
    if row_weight is None:
        return -c.mean()
    return -(c * row_weight.to(wide)).sum() / row_weight.to(wide).sum()


@dataclass(frozen=True)
class _Rows:
    """One chunk of rows: target [n,Z], its scale [n] and the weight of each row [n]."""

    target: Tensor
    scale: Tensor | None
    weight: Tensor | None

    def part(self, rows: slice) -> _Rows:
        """Return some of the rows."""
        return _Rows(
            self.target[rows],
            None if self.scale is None else self.scale[rows],
            None if self.weight is None else self.weight[rows],
        )


def _cosine_parts(z: Tensor, rows_per_program: int, rows: int) -> int:
    """Return how many rows of partial sums _cosine_ gives for `rows` rows of z [N,Z]."""
    return triton.cdiv(rows, rows_per_program) if launch.use_triton(z, z.shape[1]) else 1


def _cosine_(
    z: Tensor, rows: _Rows, cos: Tensor, eps: float, rows_per_program: int, grad: bool,
    parts: Tensor | None,
) -> None:  # fmt: skip
    """Write v c to cos [N]; with `grad`, dz over z [N,Z], and its partial column sums to parts."""
    n, width = z.shape
    if not launch.use_triton(z, width):
        _cosine_torch_(z, rows, cos, eps, grad, parts)
        return
    row = launch.rows("cosine", width, z.device)
    _cosine_kernel[(triton.cdiv(n, rows_per_program),)](
        z_ptr=z, y_ptr=rows.target, y_scale_ptr=rows.scale, weight_ptr=rows.weight, cos_ptr=cos,
        sums_ptr=cos if parts is None else parts, N=n, Z=width, eps=eps,
        GRAD=grad, SUMS=parts is not None, ROWS=rows_per_program, BLOCK_D=row.block_d,
        num_warps=row.num_warps,
    )  # fmt: skip


def _cosine_torch_(z, rows, cos, eps, grad, parts):
    wide = cos.dtype
    zw, y = z.to(wide), rows.target.to(wide)
    if rows.scale is not None:
        y = y * rows.scale[:, None]
    length = torch.linalg.vector_norm(zw, dim=-1)  # [N], as all but zw, y and dz
    rz = length.clamp_min(eps).reciprocal_()
    ry = torch.linalg.vector_norm(y, dim=-1).clamp_min_(eps).reciprocal_()
    c = torch.linalg.vecdot(zw, y).mul_(rz).mul_(ry)
    weight = torch.ones_like(c) if rows.weight is None else rows.weight
    torch.mul(weight, c, out=cos)
    if not grad:
        return
    along = torch.where(length < eps, 0, -cos * rz * rz)  # below eps the norm is a constant
    dz = torch.mul(y, (weight * rz * ry)[:, None]).addcmul_(zw, along[:, None])
    z.copy_(dz)
    if parts is not None:
        parts.copy_(dz.sum(0))


def _cosine_of_last_product(
    h2: Tensor, w3: Tensor, b3: Tensor, rows: _Rows, cos: Tensor, eps: float
):
    """Write v c to cos [N] without writing z (no gradient wanted); h2 [N,P], w3 [Z,P], b3 [Z]."""
    (n, p), width = h2.shape, w3.shape[0]
    table = launch.GEMM["cosine_sums"][launch.generation(h2.device)]
    num_pid_m, num_pid_n = triton.cdiv(n, table.block_m), triton.cdiv(width, table.block_n)
    sums = torch.empty((3, num_pid_n, n), dtype=torch.float32, device=h2.device)
    _cosine_sums_gemm_kernel[(num_pid_m * num_pid_n,)](
        h_ptr=h2, w_ptr=w3, b_ptr=b3, y_ptr=rows.target, y_scale_ptr=rows.scale, sums_ptr=sums,
        M=n, N=width, K=p, num_pid_m=num_pid_m, num_pid_n=num_pid_n, stride_sums=num_pid_n * n,
        GROUP_M=table.group_m, BLOCK_M=table.block_m, BLOCK_N=table.block_n,
        BLOCK_K=table.block_k, num_warps=table.num_warps, num_stages=table.num_stages,
    )  # fmt: skip
    zz, zy, yy = sums.sum(1)  # [N] each
    c = zy / (zz.sqrt_().clamp_min_(eps) * yy.sqrt_().clamp_min_(eps))
    cos.copy_(c if rows.weight is None else c.mul_(rows.weight))


def _accumulate_(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Add left^T right, [N,P] and [N,D], to total [P,D], or write it where `first`.

    In total's dtype: fp32 for half operands.
    """
    beta = 0 if first else 1
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right, beta=beta)
    elif left.is_cuda:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(left.t() @ right)
    else:
        total.add_(left.t() @ right)


class _Chunks:
    """The buffers of one chunk and the gradients that all chunks add up to."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor], chunk: int, needs: Sequence[bool]):
        w1, _, _, _, w3, _ = weights
        rows, p, z, dtype = min(chunk, x.shape[0]), w1.shape[0], w3.shape[0], w1.dtype
        self.weights, self.needs = weights, needs
        self.wide = launch.arithmetic_dtype(x, w1)
        self.grad = any(needs)
        self.reach2 = any(needs[:5])  # something at or below the second Linear
        self.reach1 = any(needs[:3])  # something at or below the first
        self.h1, self.h2 = (torch.empty((rows, p), dtype=dtype, device=x.device) for _ in range(2))
        # Pre-activations are needed only by the backward; without one, SiLU runs in place.
        self.a1 = torch.empty_like(self.h1) if self.reach1 else self.h1
        self.a2 = torch.empty_like(self.h2) if self.reach2 else self.h2
        self.z = torch.empty((rows, z), dtype=dtype, device=x.device)
        self.dx = torch.empty(x.shape if needs[0] else (0,), dtype=dtype, device=x.device)
        make = torch.empty if len(x) else torch.zeros  # the first chunk writes, others add
        self.totals = [
            make(w.shape if need else (0,), dtype=self.wide, device=x.device)
            for w, need in zip(weights[::2], needs[1::2], strict=True)
        ]
        self.rows_per_program = launch.cosine_rows(rows)
        self.part_rows = self._partial_rows(rows)
        # Partial sums of every chunk's bias gradients, one below the other; added up at the end.
        full, rest = divmod(len(x), chunk)
        all_rows = [
            full * count + (last if rest else 0)
            for count, last in zip(self.part_rows, self._partial_rows(rest), strict=True)
        ]
        self.parts = [
            torch.empty((n, len(b)) if need else (0,), dtype=self.wide, device=x.device)
            for n, b, need in zip(all_rows, weights[1::2], needs[2::2], strict=True)
        ]

    def _partial_rows(self, rows: int) -> tuple[int, int, int]:
        """Return the rows of partial sums that `rows` rows give for db1, db2 and db3."""
        silu = partial_rows(self.h1, rows)
        return silu, silu, _cosine_parts(self.z, self.rows_per_program, rows)

    def run(self, i: int, x: Tensor, dx: Tensor, rows: _Rows, cos: Tensor, eps: float) -> None:
        """Run the forward of chunk number i, then (where a gradient is wanted) its backward.

        x, dx: [rows,D]; cos: [rows].
        """
        w1, b1, w2, b2, w3, b3 = self.weights
        m = x.shape[0]
        x = x.to(w1.dtype)
        a1, h1, a2, h2, z = (t[:m] for t in (self.a1, self.h1, self.a2, self.h2, self.z))
        torch.addmm(b1, x, w1.t(), out=a1)  # [rows,P], as h1, a2 and h2
        activate(a1, h1, gelu=False)
        torch.addmm(b2, h1, w2.t(), out=a2)
        activate(a2, h2, gelu=False)
        if not self.grad and launch.use_triton(h2) and h2.dtype != torch.float32:
            _cosine_of_last_product(h2, w3, b3, rows, cos, eps)
            return
        torch.addmm(b3, h2, w3.t(), out=z)  # [rows,Z]
        parts = [
            t[i * count : (i + 1) * count] if need else None
            for t, count, need in zip(self.parts, self.part_rows, self.needs[2::2], strict=True)
        ]
        _cosine_(z, rows, cos, eps, self.rows_per_program, self.grad, parts[2])
        if self.grad:
            self._backward(i == 0, x, dx, a1, h1, a2, h2, z, parts)

    def _backward(self, first, x, dx, a1, h1, a2, h2, dz, parts) -> None:
        w1, _, w2, _, w3, _ = self.weights
        need_x, need_w1, _, need_w2, _, need_w3, _ = self.needs
        dw1, dw2, dw3 = self.totals
        if need_w3:
            _accumulate_(dw3, dz, h2, first)
        if not self.reach2:
            return
        torch.mm(dz, w3, out=h2)  # h2 has done its work: the buffer becomes dh2, a2 becomes da2
        activate_backward(h2, a2, a2, gelu=False, sums=parts[1] is not None, parts=parts[1])
        if need_w2:
            _accumulate_(dw2, a2, h1, first)
        if not self.reach1:
            return
        torch.mm(a2, w2, out=h1)
        activate_backward(h1, a1, a1, gelu=False, sums=parts[0] is not None, parts=parts[0])
        if need_w1:
            _accumulate_(dw1, a1, x, first)
        if need_x:
            torch.mm(a1, w1, out=dx)

    def gradients(self) -> list[Tensor]:
        """Return [dw1, db1, dw2, db2, dw3, db3]; what is not needed is empty."""
        sums = [
            sum_of_parts(parts) if need else parts
            for parts, need in zip(self.parts, self.needs[2::2], strict=True)
        ]
        return [t for pair in zip(self.totals, sums, strict=True) for t in pair]


@torch.library.custom_op("fastrepa::projector_alignment", mutates_args=())
def _projector_alignment(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    row_weight: Tensor | None,
    eps: float,
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, factor, dx, dw1, db1, dw2, db2, dw3, db3); what `needs` leaves out is empty.

    chunk: rows, 0 for what launch.py says.
    """
    n = x.shape[0]
    chunk = chunk or launch.chunk_rows(x.device, w1.element_size() * (4 * len(w1) + len(w3)))
    with launch.without_autocast(x):
        chunks = _Chunks(x, (w1, b1, w2, b2, w3, b3), chunk, needs)
        rows = _Rows(target, target_scale, row_weight)
        cos = torch.empty(n, dtype=chunks.wide, device=x.device)
        for i in range(triton.cdiv(n, chunk)):
            part = slice(i * chunk, (i + 1) * chunk)
            dx = chunks.dx[part] if needs[0] else chunks.dx
            chunks.run(i, x[part], dx, rows.part(part), cos[part], eps)
        if row_weight is None:
            factor = torch.full((), -1 / max(n, 1), dtype=chunks.wide, device=x.device)
        else:
            mass = row_weight.sum()
            factor = torch.where(mass == 0, 0, -1 / mass)  # nothing to align: loss 0, gradients 0
        dw1, db1, dw2, db2, dw3, db3 = chunks.gradients()
        return cos.sum() * factor, factor, chunks.dx, dw1, db1, dw2, db2, dw3, db3


@_projector_alignment.register_fake
def _(x, w1, b1, w2, b2, w3, b3, target, target_scale, row_weight, eps, chunk, needs):
    wide = launch.arithmetic_dtype(x, w1)
    grads = [
        x.new_empty(w.shape if need else (0,), dtype=wide)
        for w, need in zip((w1, b1, w2, b2, w3, b3), needs[1:], strict=True)
    ]
    dx = x.new_empty(x.shape if needs[0] else (0,), dtype=w1.dtype)
    return x.new_empty((), dtype=wide), x.new_empty((), dtype=wide), dx, *grads


@torch.library.custom_op("fastrepa::scaled", mutates_args=())
def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x * factor, of x's shape, in `dtype`: multiplied in factor's, without a copy in it."""
    out = torch.empty_like(x, dtype=dtype)
    if launch.use_triton(x):  # in one vectorised pass, which aten's, by a scalar on the GPU, is not
        if x.numel():
            flat = launch.FLAT["activation"][launch.generation(x.device)]
            _scale_kernel[(triton.cdiv(x.numel(), flat.block),)](
                x_ptr=x, factor_ptr=factor, y_ptr=out, size=x.numel(), BLOCK=flat.block,
                num_warps=flat.num_warps,
            )  # fmt: skip
        return out
    # A 0-dim factor would be rounded to a half operand's dtype first, where 1/N may be nothing.
    if x.dtype == factor.dtype:
        return x.mul(factor).to(dtype)
    if dtype == factor.dtype:
        return x.to(dtype).mul_(factor)
    for part, result in zip(x.split(1 << 16), out.split(1 << 16), strict=True):
        result.copy_(part.to(factor.dtype).mul_(factor))
    return out


@_scaled.register_fake
def _(x, factor, dtype):
    return torch.empty_like(x, dtype=dtype)


_scaled_call = first_order(_scaled)


def _setup(ctx, inputs, output):
    _, factor, *grads = output
    ctx.dtypes = [t.dtype for t in inputs[:7]]
    ctx.save_for_backward(factor, *grads)
    ctx.mark_non_differentiable(factor, *grads)
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    factor, *grads = ctx.saved_tensors
    results: list[Tensor | None] = [None] * 13
    if dloss is None:
        return tuple(results)
    scale = factor * dloss.to(factor.dtype)
    for i in reversed(range(7)):  # dx, the largest, last: the peak is lower
        if ctx.needs_input_grad[i]:
            results[i] = _scaled_call(grads[i], scale, ctx.dtypes[i])
    return tuple(results)


_projector_alignment_call = differentiable(
    _projector_alignment, setup_context=_setup, backward=_backward
)


def _check(x: Tensor, weights: Sequence[Tensor], target: Tensor) -> None:
    name = "projector_alignment"
    if len(weights) != 6:
        raise ValueError(f"{name}: weights must be (w1, b1, w2, b2, w3, b3); got {len(weights)}")
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"{name}: x must be a floating-point [..., D]; got {tuple(x.shape)} {x.dtype}"
        )
    w1, _, _, _, w3, _ = weights
    if w1.ndim != 2 or w3.ndim != 2:
        raise ValueError(
            f"{name}: w1 and w3 must be matrices; got {tuple(w1.shape)} and {tuple(w3.shape)} "
            "(under ZeRO-3, call this inside the owning module's forward)"
        )
    d, p, z = x.shape[-1], w1.shape[0], w3.shape[0]
    shapes = ((p, d), (p,), (p, p), (p,), (z, p), (z,))
    for argument, weight, shape in zip(NAMES, weights, shapes, strict=True):
        if weight.shape != shape:
            raise ValueError(f"{name}: {argument} must be {shape}; got {tuple(weight.shape)}")
        if weight.dtype != w1.dtype or not weight.is_floating_point():
            raise ValueError(
                f"{name}: {argument} must have w1's floating dtype {w1.dtype}; got {weight.dtype}"
            )
        if weight.device != x.device:
            raise ValueError(f"{name}: {argument} must be on {x.device}; got {weight.device}")
    if target.shape != (*x.shape[:-1], z) or target.device != x.device:
        raise ValueError(
            f"{name}: target must be {(*x.shape[:-1], z)} on {x.device}; "
            f"got {tuple(target.shape)} on {target.device}"
        )
    if not target.is_floating_point() and target.dtype != torch.int8:
        raise ValueError(f"{name}: target must be floating point or int8; got {target.dtype}")
    if target.requires_grad:
        raise ValueError(f"{name}: target must not require a gradient; detach it")


def _per_row(argument: str, value: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    if value.shape != x.shape[:-1] or value.device != x.device:
        raise ValueError(
            f"projector_alignment: {argument} must be {tuple(x.shape[:-1])} on {x.device}; "
            f"got {tuple(value.shape)} on {value.device}"
        )
    return value.detach().reshape(-1).to(dtype).contiguous()


def projector_alignment(
    x: Tensor,
    weights: Sequence[Tensor],
    target: Tensor,
    *,
    eps: float = EPS,
    chunk_rows: int | None = None,
    row_weight: Tensor | None = None,
    target_scale: Tensor | None = None,
) -> Tensor:
    """Return REPA's alignment loss: the mean of -cos(projector(x), target) over rows, in [-1, 1].

    x: [..., D], any floating dtype; it is cast to the weights' dtype chunk by chunk. weights:
    (w1, b1, w2, b2, w3, b3) of Linear(D,P) SiLU Linear(P,P) SiLU Linear(P,Z). target: [..., Z],
    any floating dtype or int8; `target_scale` [...] multiplies its rows (only the eps clamp can
    tell). `row_weight` [...]: weights or a mask; the mean is weighted, and 0 if they sum to 0.
    `chunk_rows`: rows per chunk, by default launch.py's. Under torch.autocast the weights are cast
    as nn.Linear's would be. Returns [] in fp32 (float64 for float64); no rows give 0.
    Gradients reach x and the weights, not target, row_weight or target_scale.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check(x, weights, target)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"projector_alignment: chunk_rows must be positive; got {chunk_rows}")
    cast = launch.autocast_dtype(x)
    if cast is not None:
        weights = [w.to(cast) for w in weights]
    d, z = x.shape[-1], target.shape[-1]
    wide = launch.arithmetic_dtype(x, weights[0])
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (x, *weights)]
    loss, *_ = _projector_alignment_call(
        x.reshape(-1, d).contiguous(),
        *[w.contiguous() for w in weights],
        target.reshape(-1, z).contiguous(),
        _per_row("target_scale", target_scale, x, wide),
        _per_row("row_weight", row_weight, x, wide),
        eps,
        chunk_rows or 0,
        needs,
    )
    return loss


def projector_alignment_cost(
    n: int, d: int, p: int, z: int, itemsize: int, *, x_itemsize: int | None = None,
    x_grad: bool = True, weight_grad: bool = True,
) -> Cost:  # fmt: skip
    """Count three products forward, each again for the gradients of its input and its weight.

    Bytes: x, target and the weights read once; dx and the weight gradients (fp32) written once.
    """
    x_itemsize = x_itemsize or itemsize
    products = (d * p, p * p, p * z)
    through = (products[0] if x_grad else 0) + products[1] + products[2]
    backward = (through if x_grad or weight_grad else 0) + (sum(products) if weight_grad else 0)
    weights = sum(products) + 2 * p + z
    return Cost(
        flops=2 * n * (sum(products) + backward),
        bytes=n * (d * x_itemsize + z * itemsize)
        + weights * itemsize
        + (n * d * x_itemsize if x_grad else 0)
        + (weights * 4 if weight_grad else 0),
    )
