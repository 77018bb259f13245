"""The alignment of REPA (Yu et al. 2025, eq. 8): a projector per encoder and a cosine loss.

Shapes: B batch, T tokens, D generator width, P projector width, Z encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build_projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """The reference's three-layer MLP: Linear(D,P) SiLU Linear(P,P) SiLU Linear(P,Z)."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, out),
    )


def negative_cosine(projected: Tensor, target: Tensor, eps: float = 1e-12) -> Tensor:
    """-mean over [B,T] of the cosine between projected and target [B,T,Z]; float32 or wider."""
    dtype = torch.promote_types(projected.dtype, torch.float32)
    projected = F.normalize(projected.to(dtype), dim=-1, eps=eps)
    target = F.normalize(target.to(dtype), dim=-1, eps=eps)
    return -(projected * target).sum(-1).mean()


def alignment_loss(hidden: Tensor, projectors: nn.ModuleList, targets: Sequence[Tensor]) -> Tensor:
    """The mean over encoders of `negative_cosine`; hidden [B,T,D], targets[k] [B,T,Z_k]."""
    if len(targets) != len(projectors):
        raise ValueError(f"targets: got {len(targets)} for {len(projectors)} projectors")
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for k, (projector, target) in enumerate(zip(projectors, targets, strict=True)):
        assert isinstance(projector, nn.Sequential)
        first, last = projector[0], projector[-1]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        expected = (*hidden.shape[:2], last.out_features)
        if target.shape != expected:
            raise ValueError(f"targets[{k}]: expected {expected}, got {tuple(target.shape)}")
        total = total + negative_cosine(projector(hidden.to(first.weight.dtype)), target)
    return total / len(projectors)
