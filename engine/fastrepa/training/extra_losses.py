"""Further terms of the loss, from files of the user's own (`training.extra_losses`).

A term is a function of one `Prediction` that returns a mean over its samples, []: it is averaged
over micro-batches and ranks like every other, and only through the prediction does it reach the
weights, which ZeRO may have anywhere. B batch, C channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrepa.config import TrainingConfig
from fastrepa.data.pipeline import Batch
from fastrepa.errors import ConfigError
from fastrepa.reading.own_code import failed_in, own_code

KEY = "training.extra_losses"
_TAKEN = ("loss", "velocity_loss", "alignment_loss")


@dataclass(frozen=True)
class Prediction:
    """All that a term is given of a micro-batch.

    velocity [B,C,h,w] float32: the generator's, with its gradient; target: what it should be.
    x_t, z, noise [B,C,h,w]: its input, and the clean latent and noise that were mixed at time
    t [B] (0 data, 1 noise). label [B] int64; dropped [B] bool: where the generator did not see it.
    image_u8 [B,3,R,R]: None where the set's latents are stored. features: the frozen encoders'
    tokens, [B,T,Z] each. step: updates taken so far.
    """

    velocity: Tensor
    target: Tensor
    x_t: Tensor
    z: Tensor
    noise: Tensor
    t: Tensor
    label: Tensor
    dropped: Tensor
    image_u8: Tensor | None
    features: list[Tensor]
    step: int


class ExtraLosses:
    """The terms of a configuration, by the names that metrics have."""

    def __init__(self, config: TrainingConfig) -> None:
        """Raises ConfigError for a term that cannot be read, or that is called as another one."""
        self.terms: dict[str, tuple[str, float, Callable[[Prediction], Tensor]]] = {}
        for term in config.extra_losses:
            function = term.use.rpartition(":")[2]
            name = function if function.endswith("_loss") else f"{function}_loss"
            if name in self.terms or name in _TAKEN:
                raise ConfigError(f"{KEY}: {name} is there already; rename {function}")
            self.terms[name] = (term.use, term.weight, own_code(KEY, term.use, "function"))

    def __call__(
        self,
        velocity: Tensor,
        target: Tensor,
        x_t: Tensor,
        z: Tensor,
        noise: Tensor,
        t: Tensor,
        batch: Batch,
        dropped: Tensor,
        features: list[Tensor],
        step: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return their weighted sum [], and each [] by name, of what `Prediction` describes.

        Raises ConfigError for a term that fails, or gives anything but a real number [] with a
        gradient.
        """
        prediction = Prediction(
            velocity, target, x_t, z, noise, t, batch.label, dropped, batch.image_u8, features, step
        )
        total = prediction.velocity.new_zeros(())
        values: dict[str, Tensor] = {}
        for name, (use, weight, function) in self.terms.items():
            try:
                value = function(prediction)
            except Exception as e:
                file = use.rpartition(":")[0]
                raise ConfigError(f"{KEY}: {use}: {failed_in(file, e)}") from e
            if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(f"{KEY}: {use}: a float tensor [] is expected, got {got}")
            if torch.is_grad_enabled() and not value.requires_grad:
                raise ConfigError(f"{KEY}: {use}: does not depend on the prediction's velocity")
            values[name] = value
            total = total + weight * value
        return total, values
