"""Model FLOPs: what one image costs by the shapes of a configuration. Nothing is built.

The convention is that of PaLM (Chowdhery et al. 2022, appendix B): the matrix products that the
algorithm needs, a multiply and an add being two FLOPs. What is computed a second time to save
memory does not count, nor do normalisations, activations and the optimiser. Encoders and codec,
which are only looked at, are counted apart (`counted_flops`): MFU is the generator's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastrepa.config import AlignmentConfig, ModelConfig
from fastrepa_kernels.cost import diffusion_transformer_flops
from fastrepa_kernels.projector_alignment import projector_alignment_cost

FREQUENCIES = 256  # of the time embedding


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per image.

    transformer: the generator's forward, projectors left out: what sampling runs.
    blocks: of it, the blocks, which recomputation runs again.
    forward: transformer and projectors. training: forward and backward.
    """

    transformer: int
    blocks: int
    forward: int
    training: int


def model_flops(
    model: ModelConfig,
    alignment: AlignmentConfig,
    *,
    side: int,
    channels: int,
    encoder_widths: Sequence[int],
) -> ModelFlops:
    """Count the generator; side and channels are the latent's, as SiT.from_config's."""
    tokens, values = (side // model.patch) ** 2, model.patch**2 * channels
    transformer = diffusion_transformer_flops(
        1, tokens, model.width, model.depth, patch_values=values
    )
    ends = diffusion_transformer_flops(1, tokens, model.width, 0, patch_values=values)
    projectors = sum(
        projector_alignment_cost(
            tokens, model.width, alignment.projector_width, z, 2, x_grad=False, weight_grad=False
        ).flops
        for z in encoder_widths
    )
    forward = transformer + projectors
    # Nobody wants the gradient of the noisy latent or of the time's sines.
    unwanted = 2 * model.width * (tokens * values + FREQUENCIES)
    return ModelFlops(transformer, transformer - ends, forward, 3 * forward - unwanted)


def counted_flops(
    build: Callable[[], nn.Module], run: Callable[[Any], object]
) -> tuple[int, nn.Module]:
    """Return (FLOPs of `run(network)` by torch's counter, the network on the meta device)."""
    with torch.device("meta"), torch.no_grad():
        network = build().eval()
        # The counter knows attention's products best where they are written out.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run(network)
    return int(counter.get_total_flops()), network
