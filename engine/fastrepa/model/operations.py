"""The generator's fused operations and their eager twins: one model, two sets of functions.

`fused` is fastrepa_kernels (Triton on CUDA, an efficient torch path elsewhere); `eager` is plain
torch, statement by statement what the paper's implementation does. Both give the same numbers up to
the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrepa_kernels

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Operations:
    """What a SiT is made of beside attention; shapes as in fastrepa_kernels.

    adaln_linear(x, shift, scale, weight, bias, residual=None) -> out, or with one (x', out)
    adaln_mlp(x, shift, scale, (w1, b1, w2, b2), residual=None, keep_h=False) -> the same
    projector_alignment(x, weights, target) -> -mean cosine
    """

    adaln_linear: Callable[..., Any]
    adaln_mlp: Callable[..., Any]
    projector_alignment: Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]


def _norm(
    x: Tensor, shift: Tensor, scale: Tensor, residual: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    if residual is not None:
        branch, gate = residual
        x = x + gate[:, None].to(x.dtype) * branch.to(x.dtype)
    y = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    y = y * (1 + scale[:, None].to(x.dtype)) + shift[:, None].to(x.dtype)
    return x, y.to(shift.dtype)


def _adaln_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    x, y = _norm(x, shift, scale, residual)
    out = F.linear(y, weight, bias)
    return out if residual is None else (x, out)


def _adaln_mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weights: Sequence[Tensor],
    *,
    residual: tuple[Tensor, Tensor] | None = None,
    keep_h: bool = False,  # autograd keeps it anyway
) -> Tensor | tuple[Tensor, Tensor]:
    w1, b1, w2, b2 = weights
    x, y = _norm(x, shift, scale, residual)
    out = F.linear(F.gelu(F.linear(y, w1, b1), approximate="tanh"), w2, b2)
    return out if residual is None else (x, out)


def _projection(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    w1, b1, w2, b2, w3, b3 = weights
    h = F.silu(F.linear(x.to(w1.dtype), w1, b1))
    return F.linear(F.silu(F.linear(h, w2, b2)), w3, b3)


def _projector_alignment(x: Tensor, weights: Sequence[Tensor], target: Tensor) -> Tensor:
    z = _projection(x, weights)
    wide = torch.promote_types(z.dtype, torch.float32)
    unit = F.normalize(z.to(wide), dim=-1, eps=1e-12)
    return -(unit * F.normalize(target.to(wide), dim=-1, eps=1e-12)).sum(-1).mean()


def per_sample_alignment(x: Tensor, weights: Sequence[Tensor], target: Tensor) -> Tensor:
    """The same loss as the reference takes it, in a Python loop over the batch: a rival."""
    projected = _projection(x, weights)
    wide = torch.promote_types(projected.dtype, torch.float32)
    loss = torch.zeros((), device=x.device, dtype=wide)
    for ours, theirs in zip(projected, target, strict=True):
        a, b = F.normalize(ours.to(wide), dim=-1), F.normalize(theirs.to(wide), dim=-1)
        loss = loss - (a * b).sum(-1).mean()
    return loss / x.shape[0]


EAGER = Operations(_adaln_linear, _adaln_mlp, _projector_alignment)
FUSED = Operations(
    fastrepa_kernels.adaln_linear,
    fastrepa_kernels.adaln_mlp,
    fastrepa_kernels.projector_alignment,
)
OPERATIONS = {"eager": EAGER, "fused": FUSED}


def use_operations(model: nn.Module, operations: Operations) -> None:
    """Make every part of `model` that holds operations hold these."""
    for part in model.modules():
        if isinstance(getattr(part, "operations", None), Operations):
            part.operations = operations  # type: ignore[assignment]
