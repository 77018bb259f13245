"""The generator's fused operations and their eager twins: one model, two sets of functions.

`fused` is fastrepa_kernels (Triton on CUDA, an efficient torch path elsewhere); `eager` is their
specification in plain torch, statement by statement what the paper's implementation does. Both give
the same numbers up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrepa_kernels
from fastrepa_kernels.adaln_linear import adaln_linear_reference, adaln_mlp_reference
from fastrepa_kernels.projector_alignment import projector_alignment_reference, projector_reference


@dataclass(frozen=True)
class Operations:
    """The operations that a SiT is made of beside attention; shapes as in fastrepa_kernels.

    adaln_linear(x, shift, scale, weight, bias, residual=None) -> out, or with one (x', out)
    adaln_mlp(x, shift, scale, (w1, b1, w2, b2), residual=None, keep_h=False) -> the same
    projector_alignment(x, weights, target) -> -mean cosine
    """

    adaln_linear: Callable[..., Any]
    adaln_mlp: Callable[..., Any]
    projector_alignment: Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]


def per_sample_alignment(x: Tensor, weights: Sequence[Tensor], target: Tensor) -> Tensor:
    """Return the same loss as REPA takes it, in a Python loop over the batch: a rival.

    x [B,T,D], target [B,T,Z] -> []; weights as projector_alignment's.
    """
    projected = projector_reference(x, weights)  # [B,T,Z]
    wide = torch.promote_types(projected.dtype, torch.float32)
    loss = torch.zeros((), device=x.device, dtype=wide)
    for ours, theirs in zip(projected, target, strict=True):
        a, b = F.normalize(ours.to(wide), dim=-1), F.normalize(theirs.to(wide), dim=-1)  # [T,Z]
        loss = loss - (a * b).sum(-1).mean()
    return loss / x.shape[0]


EAGER = Operations(adaln_linear_reference, adaln_mlp_reference, projector_alignment_reference)
FUSED = Operations(
    fastrepa_kernels.adaln_linear, fastrepa_kernels.adaln_mlp, fastrepa_kernels.projector_alignment
)
OPERATIONS = {"eager": EAGER, "fused": FUSED}


def use_operations(model: nn.Module, operations: Operations) -> None:
    """Make every part of `model` that holds operations hold these."""
    for part in model.modules():
        if isinstance(getattr(part, "operations", None), Operations):
            part.operations = operations  # type: ignore[assignment]
