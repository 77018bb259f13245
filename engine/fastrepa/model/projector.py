"""The alignment of REPA (Yu et al. 2025, eq. 8): a projector per encoder and a cosine loss.

Shapes: B batch, T tokens, D generator width, P projector width, Z encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrepa.model.operations import Operations


class Projector(nn.Sequential):
    """The reference's three-layer MLP, Linear(D,P) SiLU Linear(P,P) SiLU Linear(P,Z), and its loss.

    Its weights are read inside its own forward, where ZeRO-3 has them whole.
    """

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, out),
        )
        self.out_features = out

    def forward(self, hidden: Tensor, target: Tensor, operations: Operations) -> Tensor:  # type: ignore[override]
        """-mean cosine [] of the projection of hidden [B,T,D] with target [B,T,Z]."""
        layers = [layer for layer in self if isinstance(layer, nn.Linear)]
        weights = [p for layer in layers for p in (layer.weight, layer.bias)]
        return operations.projector_alignment(hidden, weights, target)


def alignment_loss(
    hidden: Tensor, projectors: nn.ModuleList, targets: Sequence[Tensor], operations: Operations
) -> Tensor:
    """The mean over encoders of -mean cosine(projector(hidden), target), float32 or wider.

    hidden [B,T,D], targets[k] [B,T,Z_k] -> []. Raises ValueError where they do not fit.
    """
    if len(targets) != len(projectors):
        raise ValueError(f"targets: got {len(targets)} for {len(projectors)} projectors")
    losses = []
    for k, (projector, target) in enumerate(zip(projectors, targets, strict=True)):
        assert isinstance(projector, Projector)
        expected = (*hidden.shape[:2], projector.out_features)
        if target.shape != expected:
            raise ValueError(f"targets[{k}]: expected {expected}, got {tuple(target.shape)}")
        losses.append(projector(hidden, target, operations))
    return torch.stack(losses).mean()
