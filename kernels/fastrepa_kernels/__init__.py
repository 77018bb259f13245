"""Fused operations for representation-aligned diffusion transformers: torch and triton only.

Without triton (CPU wheels, macOS) everything but the Triton paths is here.

The engine runs `adaln_linear`, `adaln_mlp`, `attention`, `projector_alignment`, `adamw_ema_` and
`keyed_random`. The rest, `layernorm_modulate`, `gated_residual_layernorm_modulate`,
`gated_residual` and `linear_gelu`, are only a library for other training scripts: they replace
single parts of a block, as `patch_reference` does.
"""

from fastrepa_kernels.adaln import (
    gated_residual,
    gated_residual_layernorm_modulate,
    layernorm_modulate,
)
from fastrepa_kernels.adaln_linear import adaln_linear, adaln_mlp
from fastrepa_kernels.adamw_ema import adamw_ema_
from fastrepa_kernels.attention import attention
from fastrepa_kernels.drop_in import patch_reference
from fastrepa_kernels.keyed_random import keyed_random
from fastrepa_kernels.mlp import linear_gelu
from fastrepa_kernels.projector_alignment import projector_alignment

__all__ = [
    "adaln_linear", "adaln_mlp", "adamw_ema_", "attention", "gated_residual",
    "gated_residual_layernorm_modulate", "keyed_random", "layernorm_modulate", "linear_gelu",
    "patch_reference", "projector_alignment",
]  # fmt: skip
