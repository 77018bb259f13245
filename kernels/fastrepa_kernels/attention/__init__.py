"""Self-attention on packed projections: softmax(q k^T / sqrt(d)) v behind one call.

Shapes: B batch, T tokens, H heads, d head dimension; qkv [B,T,3,H,d] is what one Linear gives, seen
as a view. q and k may be normalised over d first (LayerNorm with weight and bias: qk-norm).
Saved for backward: qkv, the output and one log-sum per row; `math` keeps the T x T probabilities.

A backend is chosen, called without copying q, k or v, and never silently. choice.py says which one
runs and why not the others; backends.py has their names and their calls.

On an H200 with torch 2.11 sdpa-cudnn, sdpa-flash, sdpa-efficient, math and sdpa ran and were right
at SiT-XL/2's shape. cuDNN was the fastest: 1.74 ms forward and backward of 256 images of 256 tokens
and 16 heads of 72; flash took 2.59, efficient 3.56 (benchmarks/records/gpu_suite_h200.jsonl).
flash-attn 2, 3, 4 and xformers have not run. Their calls follow the sources of flash-attn
2.8.3.post2 (its hopper/ folder is flash-attn 3), flash-attn-4 4.0.0b36 and xformers 0.0.35, and are
tested against stand-ins with those signatures; torch's own are tested against its shape functions
(2.11 and 2.15), too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastrepa_kernels import launch
from fastrepa_kernels.attention.backends import (
    BACKENDS,
    FLASH,
    MODULES,
    PACKED,
    SDPA,
    Norm,
    _stacked,
    attention_reference,
    run,
)
from fastrepa_kernels.attention.choice import PRIORITY, Choice, choose, order, refusal
from fastrepa_kernels.cost import Cost

__all__ = [
    "BACKENDS", "FLASH", "MODULES", "PACKED", "PRIORITY", "SDPA", "Choice", "_stacked", "attention",
    "attention_cost", "attention_reference", "choose", "order", "refusal",
]  # fmt: skip


@torch.compiler.assume_constant_result
def _resolved(
    backend: str, kind: str, index: int | None, dtype: torch.dtype, head_dim: int, strict: bool
) -> str:
    """Return the backend's name; while torch.compile traces it is found out once."""
    device = torch.device(kind) if index is None else torch.device(kind, index)
    return choose(device, dtype, head_dim, backend=backend, deterministic=strict).backend


def _check(qkv: Tensor, q_norm: Norm | None, k_norm: Norm | None) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise ValueError(
            f"attention: qkv must be a floating-point [B, T, 3, H, d]; "
            f"got {tuple(qkv.shape)} {qkv.dtype}"
        )
    for argument, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        for part in norm or ():
            if part.shape != qkv.shape[-1:] or part.device != qkv.device:
                raise ValueError(
                    f"attention: {argument} must be two [{qkv.shape[-1]}] on {qkv.device}; got "
                    f"{tuple(part.shape)} on {part.device} "
                    "(under ZeRO-3, call this inside the owning module's forward)"
                )


def attention(
    qkv: Tensor,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
    bias: Tensor | None = None,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v over every head: qkv [B,T,3,H,d] -> [B,T,H,d].

    No mask. q_norm, k_norm: (weight [d], bias [d]) of a LayerNorm with `eps`. backend: of BACKENDS,
    or "auto" (see `choose`); under torch.use_deterministic_algorithms only those that are. Under
    torch.autocast qkv is cast to its dtype. bias [3 H d]: what was added, detached, to make qkv; it
    is not added again, but its gradient, the column sums of qkv's, is given here, by backends of
    PACKED and without norms only. Source: Vaswani et al. 2017, section 3.2.1.
    Raises ValueError where shapes do not fit or the backend cannot run here.
    """
    cast = launch.autocast_dtype(qkv)
    if cast is not None:
        qkv = qkv.to(cast)
    _check(qkv, q_norm, k_norm)
    if bias is not None and bias.shape != (qkv.shape[2:].numel(),):
        raise ValueError(
            f"attention: bias must be [{qkv.shape[2:].numel()}]; got {tuple(bias.shape)} "
            "(under ZeRO-3, call this inside the owning module's forward)"
        )
    deterministic = torch.are_deterministic_algorithms_enabled()
    device = qkv.device
    name = _resolved(backend, device.type, device.index, qkv.dtype, qkv.shape[-1], deterministic)
    return run(name, qkv, bias, q_norm, k_norm, eps, deterministic)


def attention_cost(
    batch: int, tokens: int, heads: int, head_dim: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """Count two T x T products forward, five backward (the scores are made again, as flash does).

    Forward reads qkv, writes the output and the fp32 log-sums; backward reads all of it and the
    output's gradient, and writes qkv's.
    """
    product = 2 * batch * heads * tokens * tokens * head_dim
    rows, sums = batch * tokens * heads * head_dim, 4 * batch * heads * tokens
    if backward:
        return Cost(flops=5 * product, bytes=itemsize * 8 * rows + sums)
    return Cost(flops=2 * product, bytes=itemsize * 4 * rows + sums)


def _counted(qkv: Sequence[int], backward: bool) -> int:
    b, t, _, h, d = qkv
    return attention_cost(b, t, h, d, 1, backward=backward).flops


# torch's counter sees neither op's inside.
register_flop_formula(torch.ops.fastrepa.packed_attention)(
    lambda qkv, *_, **__: _counted(qkv, backward=False)
)
register_flop_formula(torch.ops.fastrepa.packed_attention_backward)(
    lambda grad, qkv, *_, **__: _counted(qkv, backward=True)
)
