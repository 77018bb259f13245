"""AdamW, moving averages of the weights and their low-precision copy in one pass.

    g = grad grad_scale;   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    p <- (1 - lr wd) p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    e <- e + (1 - ema_decay) (p - e), for each of up to MAX_EMAS averages and their decays
    low <- p in the low precision

Shapes: any; every list entry (a ZeRO partition, or one parameter) is walked flat, and p, m, v, e
of an entry are fp32 (float64 in tests) of one size. grad may be a half dtype. Nothing is saved:
this op has no gradient. Every tensor is read once and written once.

A step told to be bad (`skip`, a device flag) changes nothing at all, no EMA either, and the host
never reads the flag: the kernel does. `step`, `lr`, `grad_scale` and the decays may be device
scalars as well. A decay that changes from step to step (EDM2's power function, `power_decay`) is
one more of them.

No result depends on where in a tensor an element lies: ZeRO cuts the flat parameters anywhere, and
any number of ranks must agree bit for bit. ATen's loops do not give that on a CPU, where vectors
and what is left over at the end may contract a multiply-add differently. So the torch path hands
its fused AdamW and lerp whole vectors only: pieces that end on CPU_LINE elements, and the ends of
all tensors gathered into a padded one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.aot.sass import Traffic
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.language import tl, triton

# Elements. ATen's fused AdamW gives each thread whole cache lines; its lerp gives one thread all of
# 32 Ki elements, or each of two a half of 64 Ki. So pieces of at most CPU_PIECE, whole in CPU_LINE,
# are cut by both into whole pairs of the widest vectors (AVX-512: 16 fp32), for any threads.
CPU_LINE = 64
CPU_PIECE = 1 << 16
CPU_GROUP = 1 << 17  # what is updated together: six fp32 streams (3 MB) fit the caches of two cores
MAX_EMAS = 4  # pointers that the kernel has


def adamw_ema_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float | Sequence[float],
    grad_scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """The specification, out of place and in any dtype: (param, exp_avg, exp_avg_sq, *emas).

    All tensors have param's shape [...]; so have the results.
    """
    g = grad.to(param.dtype) * grad_scale
    m = betas[0] * exp_avg + (1 - betas[0]) * g
    v = betas[1] * exp_avg_sq + (1 - betas[1]) * g * g
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    param = param * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps)
    emas = zip(_decays(ema_decay), _tensors(ema), strict=True)
    return param, m, v, *(d * e + (1 - d) * param for d, e in emas)


def power_decay(step: Any, gamma: float) -> Any:
    """Return the decay of EDM2's power-function average at update t = `step`, from 1.

    (1 - 1/t)^(gamma + 1), Karras et al. 2024, equation 2; an int or a tensor, as step is. The first
    update takes the weights.
    """
    return (1 - 1 / step) ** (gamma + 1)


class _Rates(NamedTuple):
    """The numbers that change with the step; `control` on the device is a flag and these, flat."""

    grad_scale: float
    decay_factor: float  # 1 - lr * weight_decay
    step_size: float  # lr / (1 - b1^t)
    bias2_rsqrt: float  # 1 / sqrt(1 - b2^t)
    ema_weights: tuple[float, ...]  # 1 - ema_decay of each average

    @classmethod
    def of(cls, flat: Sequence[float]) -> _Rates:
        """Read the numbers from a flat list of them."""
        return cls(flat[0], flat[1], flat[2], flat[3], tuple(flat[4:]))


@triton.jit
def _control_or(control_ptr, i: tl.constexpr, value):
    """Load number i of the control tensor, or take the host's value where there is none."""
    return value if control_ptr is None else tl.load(control_ptr + i)


@triton.jit
def _ema_weight(control_ptr, i: tl.constexpr, e_ptr, weight):
    """Do the same for an average, which may be absent."""
    return weight if e_ptr is None else _control_or(control_ptr, i, weight)


@triton.jit
def _adamw_ema_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, low_ptr, e0_ptr, e1_ptr, e2_ptr, e3_ptr, control_ptr,
    size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps,
    grad_scale, decay_factor, step_size, bias2_rsqrt,
    ema_weight0, ema_weight1, ema_weight2, ema_weight3,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Step BLOCK elements; control [5 + averages] fp32 is as `_control` lays it out."""
    if control_ptr is not None:
        size = tl.where(tl.load(control_ptr) != 0.0, size, 0)  # a bad step has no elements
    grad_scale = _control_or(control_ptr, 1, grad_scale)
    decay_factor = _control_or(control_ptr, 2, decay_factor)
    step_size = _control_or(control_ptr, 3, step_size)
    bias2_rsqrt = _control_or(control_ptr, 4, bias2_rsqrt)
    ema_ptrs = (e0_ptr, e1_ptr, e2_ptr, e3_ptr)
    ema_weights = (
        _ema_weight(control_ptr, 5, e0_ptr, ema_weight0),
        _ema_weight(control_ptr, 6, e1_ptr, ema_weight1),
        _ema_weight(control_ptr, 7, e2_ptr, ema_weight2),
        _ema_weight(control_ptr, 8, e3_ptr, ema_weight3),
    )
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
    mask = offs < size
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32) * grad_scale  # [BLOCK]
    m = tl.load(m_ptr + offs, mask=mask, other=0.0)
    v = tl.load(v_ptr + offs, mask=mask, other=0.0)
    p = tl.load(p_ptr + offs, mask=mask, other=0.0)
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    p = decay_factor * p - step_size * (m / (tl.sqrt(v) * bias2_rsqrt + eps))
    tl.store(m_ptr + offs, m, mask=mask)
    tl.store(v_ptr + offs, v, mask=mask)
    tl.store(p_ptr + offs, p, mask=mask)
    for i in tl.static_range(4):  # MAX_EMAS, a literal: Triton 3.6 has no len() where one is None
        if ema_ptrs[i] is not None:
            e = tl.load(ema_ptrs[i] + offs, mask=mask, other=0.0)
            tl.store(ema_ptrs[i] + offs, e + ema_weights[i] * (p - e), mask=mask)
    if low_ptr is not None:
        tl.store(low_ptr + offs, p.to(low_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op(
    "fastrepa::adamw_ema_",
    mutates_args=("params", "exp_avg", "exp_avg_sq", "emas", "low_precision"),
)
def _adamw_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    emas: list[Tensor],  # those of the first decay for all params, then of the second, ...
    low_precision: list[Tensor],
    control: Tensor | None,
    rates: list[float],
    betas: list[float],
    eps: float,
) -> None:
    count = len(params)
    of_param = [emas[i::count] for i in range(count)]
    low: Sequence[Any] = low_precision or [None] * count
    lists = (params, grads, exp_avg, exp_avg_sq, low, of_param)
    numbers = _Rates.of(rates)
    by_torch: dict[Any, list[Any]] = {}  # tensors that can share a scratch
    for *entry, averages in zip(*lists, strict=True):
        p = entry[0]
        if not p.numel():
            continue
        if launch.use_triton(p):
            _step_triton(entry, averages, control, numbers, betas, eps)
        else:
            by_torch.setdefault((p.device, p.dtype), []).append((*entry, *averages))
    for entries in by_torch.values():
        _step_torch(entries, control, numbers, betas, eps)


@_adamw_ema_.register_fake
def _(params, grads, exp_avg, exp_avg_sq, emas, low_precision, control, rates, betas, eps):
    return None


def _step_triton(entry, averages, control, rates, betas, eps) -> None:
    size = entry[0].numel()
    flat = launch.FLAT["optimiser"][launch.generation(entry[0].device)]
    p, g, m, v, low = entry
    emas: list[Any] = [*averages, *[None] * (MAX_EMAS - len(averages))]
    e0, e1, e2, e3 = emas
    weights = (*rates.ema_weights, *(0.0,) * (MAX_EMAS - len(rates.ema_weights)))
    _adamw_ema_kernel[(triton.cdiv(size, flat.block),)](
        p_ptr=p, g_ptr=g, m_ptr=m, v_ptr=v, low_ptr=low, e0_ptr=e0, e1_ptr=e1, e2_ptr=e2, e3_ptr=e3,
        control_ptr=control, size=size, beta1=betas[0], one_minus_beta1=1 - betas[0],
        beta2=betas[1], one_minus_beta2=1 - betas[1], eps=eps, grad_scale=rates.grad_scale,
        decay_factor=rates.decay_factor, step_size=rates.step_size, bias2_rsqrt=rates.bias2_rsqrt,
        ema_weight0=weights[0], ema_weight1=weights[1], ema_weight2=weights[2],
        ema_weight3=weights[3], BLOCK=flat.block, num_warps=flat.num_warps,
    )  # fmt: skip


def _step_torch(entries, control, rates, betas, eps) -> None:
    if control is not None:
        # On CPU the flag is host memory already: reading it waits for nothing.
        keep, *values = control.tolist()
        if keep == 0.0:
            return
        rates = _Rates.of(values)
    group: list[Any] = []
    tails: list[Any] = []
    held = 0
    for entry in entries:
        for piece in _pieces(entry):
            size = piece[0].numel()
            if size % CPU_LINE:
                tails.append(piece)
                continue
            if held + size > CPU_GROUP:
                _step_group(group, rates, betas, eps)
                group, held = [], 0
            group.append(piece)
            held += size
    if group:
        _step_group(group, rates, betas, eps)
    if tails:
        _step_tails(tails, rates, betas, eps)


def _pieces(entry):
    """Yield a piece of each tensor at a time, the last perhaps not whole in CPU_LINE."""
    size = entry[0].numel()
    whole = size - size % CPU_LINE
    if size <= CPU_PIECE and whole in (0, size):
        yield entry
        return
    flat = [None if t is None else t.view(-1) for t in entry]
    for start, stop in pairwise([*range(0, whole, CPU_PIECE), whole, size]):
        if start < stop:
            yield [None if t is None else t[start:stop] for t in flat]


def _step_tails(tails, rates, betas, eps) -> None:
    sizes = [tail[0].numel() for tail in tails]
    padding = tails[0][0].new_zeros(-sum(sizes) % CPU_LINE)
    padded: list[Any] = []
    ends: list[Any] = []  # of tensors that the step changes, and what it makes of them
    for i, stream in enumerate(zip(*tails, strict=True)):
        if stream[0] is None:
            padded.append(None)
            continue
        flat = [t.view(-1) for t in stream]
        padded.append(torch.cat([*flat, padding.to(flat[0].dtype)]))
        if i != 1:  # the gradients stay
            ends.append((flat, padded[-1][: sum(sizes)].split(sizes)))
    _step_torch([padded], None, rates, betas, eps)
    for flat, values in ends:
        torch._foreach_copy_(flat, values)


def _step_group(group, rates, betas, eps) -> None:
    p, g, m, v, low, *averages = (list(t) for t in zip(*group, strict=True))
    g = [t.to(p[0].dtype) for t in g]
    if rates.grad_scale != 1.0:
        g = list(torch._foreach_mul(g, rates.grad_scale))
    # ATen's bias corrections come from the step, and are 1 at infinity. Ours are in the rates:
    # step_size m / (sqrt(v) rsqrt + eps) is lr m / (sqrt(v) + eps / rsqrt) with this lr.
    lr = rates.step_size / rates.bias2_rsqrt
    steps = [torch.full((), torch.inf, device=p[0].device)] * len(p)
    torch._fused_adamw_(
        p, g, m, v, [], steps, lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=(1 - rates.decay_factor) / lr if lr else 0.0, eps=eps / rates.bias2_rsqrt,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    for e, weight in zip(averages, rates.ema_weights, strict=True):
        torch._foreach_lerp_(e, p, weight)
    if low[0] is not None:
        torch._foreach_copy_(low, p)


def _rates(step, lr, betas, weight_decay, grad_scale, decays) -> _Rates:
    return _Rates(
        grad_scale=grad_scale,
        decay_factor=1 - lr * weight_decay,
        step_size=lr / (1 - betas[0] ** step),
        bias2_rsqrt=1 / math.sqrt(1 - betas[1] ** step),
        ema_weights=tuple(1 - d for d in decays),
    )


def _control(device, step, lr, betas, weight_decay, grad_scale, decays, skip) -> Tensor:
    """Return [keep, *_Rates], flat, in fp32 on the device, from device scalars without a sync.

    Computed in float64: 1 - b2^t cancels to a thousandth at t = 1.
    """

    def scalar(value) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().reshape(()).to(device, torch.float64)
        return torch.full((), float(value), dtype=torch.float64, device=device)

    t = scalar(step)
    rate = scalar(lr) if isinstance(lr, Tensor) else lr
    return torch.stack(
        [
            scalar(1.0 if skip is None else skip == 0),
            scalar(grad_scale),
            scalar(1 - rate * weight_decay),
            rate / (1 - betas[0] ** t),  # a number's power of a tensor is one launch
            (1 - betas[1] ** t).rsqrt(),
            *(scalar(1 - d) for d in decays),
        ]
    ).to(torch.float32)


def _decays(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _tensors(value: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)


def _check(lists: dict[str, list[Tensor]]) -> None:
    params = lists["params"]
    for argument, tensors in lists.items():
        if len(tensors) != len(params) and (tensors or argument != "low_precision"):
            raise ValueError(
                f"adamw_ema_: {argument} must have {len(params)} tensors, as params; "
                f"got {len(tensors)}"
            )
        for i, (t, p) in enumerate(zip(tensors, params, strict=False)):
            if t.shape != p.shape or t.device != p.device:
                raise ValueError(
                    f"adamw_ema_: {argument}[{i}] must be {tuple(p.shape)} on {p.device}; "
                    f"got {tuple(t.shape)} on {t.device}"
                )
            if not t.is_contiguous():
                raise ValueError(f"adamw_ema_: {argument}[{i}] must be contiguous")
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"adamw_ema_: params[{i}] must be float32; got {p.dtype}")
            if argument in ("grads", "low_precision"):
                if not t.is_floating_point():
                    raise ValueError(
                        f"adamw_ema_: {argument}[{i}] must be floating point; got {t.dtype}"
                    )
            elif t.dtype != p.dtype:
                raise ValueError(
                    f"adamw_ema_: {argument}[{i}] must be {p.dtype}, as params; got {t.dtype}"
                )


@torch.no_grad()
def adamw_ema_(
    params: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    ema: Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]] | None,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    ema_decay: float | Tensor | Sequence[float | Tensor] = 0.9999,
    grad_scale: float | Tensor | None = None,
    skip: Tensor | None = None,
    low_precision: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Take one AdamW step (decoupled weight decay, as torch.optim.AdamW) and its EMAs, in place.

    params, exp_avg, exp_avg_sq, ema: [...] or a list of such, fp32, contiguous; ema may be None.
    With a list of up to MAX_EMAS decays, ema is a list of as many of these.
    grads: the same shapes, any floating dtype, multiplied by `grad_scale` (the clip factor, the
    inverse loss scale). step: the number of this step, from 1. skip: a one-element tensor; nonzero
    leaves everything as it is (the caller then also keeps its step counter: with skip, give step
    as a device tensor). low_precision: written with the new params, cast.
    On CUDA a list costs one launch per tensor: hand over flat tensors where there are many.
    Raises ValueError where shapes, dtypes, devices or the step do not fit.
    """
    several = isinstance(ema_decay, list | tuple)
    decays = [] if ema is None else _decays(ema_decay)
    averages: list[Any] = list(ema) if several and ema is not None else [ema] * len(decays)
    if len(averages) != len(decays) or len(decays) > MAX_EMAS:
        raise ValueError(
            f"adamw_ema_: ema must have an entry for each of at most {MAX_EMAS} decays; "
            f"got {len(averages)} for {len(decays)}"
        )
    emas = {f"ema[{i}]" if several else "ema": _tensors(e) for i, e in enumerate(averages)}
    lists = {
        "params": _tensors(params), "grads": _tensors(grads), "exp_avg": _tensors(exp_avg),
        "exp_avg_sq": _tensors(exp_avg_sq), "low_precision": _tensors(low_precision), **emas,
    }  # fmt: skip
    _check(lists)
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"adamw_ema_: step counts from 1; got {step}")
    if skip is not None and skip.numel() != 1:
        raise ValueError(f"adamw_ema_: skip must have one element; got {tuple(skip.shape)}")
    if not lists["params"]:
        return
    scale = 1.0 if grad_scale is None else grad_scale
    control, rates = None, _Rates(1.0, 1.0, 0.0, 1.0, (0.0,) * len(decays))
    if skip is not None or any(isinstance(v, Tensor) for v in (step, lr, scale, *decays)):
        device = lists["params"][0].device
        control = _control(device, step, lr, betas, weight_decay, scale, decays, skip)
    else:
        rates = _rates(step, lr, betas, weight_decay, scale, decays)
    _adamw_ema_(
        lists["params"], lists["grads"], lists["exp_avg"], lists["exp_avg_sq"],
        [t for tensors in emas.values() for t in tensors], lists["low_precision"], control,
        [*rates[:4], *rates.ema_weights], list(betas), eps,
    )  # fmt: skip


def adamw_ema_cost(n: int, *, grad_itemsize: int = 4, low_itemsize: int = 0, emas: int = 1) -> Cost:
    """Count n elements: p, m, v and each EMA read and written, grad read, the low copy written."""
    return Cost(flops=(13 + 3 * emas) * n, bytes=n * (24 + 8 * emas + grad_itemsize + low_itemsize))


def _aot_cases() -> list[AotCase]:
    fp, bf, f = "*fp32", "*bf16", "fp32"
    floats = (
        "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "grad_scale", "decay_factor",
        "step_size", "bias2_rsqrt", *(f"ema_weight{i}" for i in range(MAX_EMAS)),
    )  # fmt: skip
    emas = [f"e{i}_ptr" for i in range(MAX_EMAS)]
    types = {
        "p_ptr": fp, "g_ptr": bf, "m_ptr": fp, "v_ptr": fp, "low_ptr": bf,
        **dict.fromkeys(emas, fp), "control_ptr": fp, **dict.fromkeys(floats, f),
    }  # fmt: skip
    cases = []
    for generation in launch.GENERATIONS:
        flat = launch.FLAT["optimiser"][generation]
        for label, count, absent in (
            ("device flag", 1, {}),
            ("host", 1, {"control_ptr": None}),
            (f"{MAX_EMAS} EMAs", MAX_EMAS, {}),
        ):
            given = ("p_ptr", "g_ptr", "m_ptr", "v_ptr", "low_ptr", *emas[:count])
            cases.append(AotCase(
                _adamw_ema_kernel, f"{label} block {flat.block}", generation, types,
                {"BLOCK": flat.block, **absent, **dict.fromkeys(emas[count:])}, flat.num_warps,
                registers=80, shared=8192, wide_loads=3 + count, long_offsets=given,
                traffic=Traffic((14 + 4 * count) * flat.block, (14 + 4 * count) * flat.block),
            ))  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
