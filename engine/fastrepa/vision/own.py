"""A frozen encoder from a file of the user's own: FILE.py:CLASS as its name.

The class is a torch module: `forward(x [B,3,S,S] float in [0, 1]) -> tokens [B,T,Z]`, T a square
number in rows, or a map [B,Z,h,w]. Attributes it may have: `input_side` (S; by default the image's
side, and `input` in the configuration wins), `mean` and `std` (of the [0, 1] image, three numbers
each). A parameter `weights` of its constructor is given what the configuration has there.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastrepa.config import EncoderConfig
from fastrepa.errors import ConfigError, shown
from fastrepa.reading.own_code import failed_in, own_code
from fastrepa.vision.registry import Recipe, Triple

KEY = "vision.encoders"
SEED = 0  # of what a class draws: every rank has the same network


class OwnNetwork(nn.Module):
    """The user's module, asked for its tokens in the way that timm's networks are."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.name, self.inner = name, inner

    def forward_intermediates(self, x: Tensor, **_: Any) -> tuple[Tensor]:
        """Return the map [B,Z,h,w] of x [B,3,S,S]. Raises ConfigError where there is none."""
        try:
            found = self.inner(x)
        except Exception as e:
            raise ConfigError(f"{KEY}: {self.name}: {_failed(self.name, e)}") from e
        if isinstance(found, Tensor) and found.dim() == 3:
            side = math.isqrt(found.shape[1])
            if side * side == found.shape[1]:
                found = found.transpose(1, 2).unflatten(2, (side, side))
        square = isinstance(found, Tensor) and found.dim() == 4 and found.shape[2] == found.shape[3]
        if not square or len(found) != len(x) or not found.is_floating_point():
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"{KEY}: {self.name}: forward of {list(x.shape)} gives {got}; tokens [B,T,Z], T a "
                f"square number, or a square map [B,Z,h,w] are expected"
            )
        return (found,)


def own_recipe(name: str) -> Recipe:
    """Return how images are prepared for it; the file is read. Raises ConfigError."""
    found = own_code(KEY, name, "class")
    return Recipe(
        name, "", mean=_three(found, "mean", 0.0), std=_three(found, "std", 1.0), own=True
    )


def _three(found: Any, key: str, default: float) -> Triple:
    given = getattr(found, key, (default,) * 3)
    try:
        red, green, blue = (float(value) for value in given)
    except (TypeError, ValueError):
        raise ConfigError(f"{KEY}: {key} is {shown(given)}, three numbers are expected") from None
    return red, green, blue


def own_network(name: str, weights: str) -> OwnNetwork:
    """Build it, float32 on the CPU, in eval mode. Raises ConfigError."""
    make = own_code(KEY, name, "class")
    try:
        given = {"weights": weights} if "weights" in inspect.signature(make).parameters else {}
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            inner = make(**given)
    except Exception as e:
        raise ConfigError(f"{KEY}: {name}: {_failed(name, e)}") from e
    if not isinstance(inner, nn.Module):
        raise ConfigError(f"{KEY}: {name}: is no torch.nn.Module but a {type(inner).__name__}")
    return OwnNetwork(name, inner.eval())


@cache
def own_shape(config: EncoderConfig, resolution: int) -> tuple[int, int, int]:
    """Return (input side in pixels, side of the token grid, width Z) for images of `resolution`."""
    network = own_network(config.name, config.weights)
    side = config.input or int(getattr(network.inner, "input_side", resolution))
    with torch.no_grad():
        (found,) = network.forward_intermediates(torch.zeros(1, 3, side, side))
    return side, found.shape[2], found.shape[1]


def _failed(name: str, error: BaseException) -> str:
    return failed_in(name.rpartition(":")[0], error)
