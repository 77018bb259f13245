"""The generator's fused operations and their eager twins: one model, two sets of functions.

`fused` is fastrepa_kernels (Triton on CUDA, an efficient torch path elsewhere); `eager` is plain
torch, statement by statement what the paper's implementation does. Both give the same numbers up to
the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrepa_kernels

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Operations:
    """What a SiT is made of beside its matrix products; shapes as in fastrepa_kernels.

    layernorm_modulate(x, shift, scale) -> y
    gated_residual_layernorm_modulate(x, branch, gate, shift, scale) -> (x_new, y)
    linear_gelu(x, weight, bias) -> GELU(x weight^T + bias), tanh form
    projector_alignment(x, weights, target) -> -mean cosine
    """

    layernorm_modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_residual_layernorm_modulate: Callable[..., tuple[Tensor, Tensor]]
    linear_gelu: Callable[[Tensor, Tensor, Tensor], Tensor]
    projector_alignment: Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]


def _layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    y = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    y = y * (1 + scale[:, None].to(x.dtype)) + shift[:, None].to(x.dtype)
    return y.to(shift.dtype)


def _gated_residual_layernorm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    x = x + gate[:, None].to(x.dtype) * branch.to(x.dtype)
    return x, _layernorm_modulate(x, shift, scale)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _projector_alignment(x: Tensor, weights: Sequence[Tensor], target: Tensor) -> Tensor:
    w1, b1, w2, b2, w3, b3 = weights
    h = F.silu(F.linear(x.to(w1.dtype), w1, b1))
    z = F.linear(F.silu(F.linear(h, w2, b2)), w3, b3)
    wide = torch.promote_types(z.dtype, torch.float32)
    unit = F.normalize(z.to(wide), dim=-1, eps=1e-12)
    return -(unit * F.normalize(target.to(wide), dim=-1, eps=1e-12)).sum(-1).mean()


EAGER = Operations(
    _layernorm_modulate,
    _gated_residual_layernorm_modulate,
    _linear_gelu,
    _projector_alignment,
)
FUSED = Operations(
    fastrepa_kernels.layernorm_modulate,
    fastrepa_kernels.gated_residual_layernorm_modulate,
    fastrepa_kernels.linear_gelu,
    fastrepa_kernels.projector_alignment,
)
OPERATIONS = {"eager": EAGER, "fused": FUSED}
