"""A metric from a file of the user's own: FILE.py:CLASS among the metrics.

The class is made without arguments, once on every rank. `features(images [B,3,H,W] uint8) ->
[B,D]` is called on batches, on the device of the rank; `score(samples [N,D], reference [M,D]) ->
float` once, on the first rank, with those of at most 50,000 images of each side, float32. It may
say `higher_is_better = True`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrepa.errors import ConfigError
from fastrepa.reading.own_code import failed_in
from fastrepa.runtime.files import sha256_of


class OwnMetric(nn.Module):
    """The user's object as an extractor of features [B,D] by the name `values`."""

    def __init__(self, name: str, make: Callable[[], Any], spec: str) -> None:
        """Raises ConfigError where it cannot be made."""
        super().__init__()
        self.name, self.spec = name, spec
        file = spec.rpartition(":")[0]
        self.identity = f"own {spec.rpartition(':')[2]} {sha256_of(Path(file))}"
        self.own = self._called(make)
        self.widths: dict[str, int] = {"values": 0}  # what it is, only its features know

    @torch.no_grad()
    def forward(self, image_u8: Tensor) -> dict[str, Tensor]:
        found = self._called(self.own.features, image_u8)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(image_u8):
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"evaluation.metrics: {self.spec}: features of {list(image_u8.shape)} gives {got}, "
                f"a tensor [B,D] is expected"
            )
        return {"values": found.float()}

    def score(self, samples: Tensor, reference: Tensor) -> float:
        """Return the metric of features [N,D] and [M,D]. Raises ConfigError for what is none."""
        found = self._called(self.own.score, samples, reference)
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(
                f"evaluation.metrics: {self.spec}: score gives a {type(found).__name__}, a number "
                f"is expected"
            ) from None

    def _called(self, function: Callable[..., Any], *given: Any) -> Any:
        try:
            return function(*given)
        except Exception as e:
            where = failed_in(self.spec.rpartition(":")[0], e)
            raise ConfigError(f"evaluation.metrics: {self.spec}: {where}") from e
