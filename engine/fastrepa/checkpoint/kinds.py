"""The kinds of tensors that a checkpoint holds, and what it asks of the engine they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fastrepa.config import EmaConfig

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"
KINDS = (WEIGHT, *MOMENTS, EMA)  # of every run; Whole.kinds has those of one


def ema_keys(emas: Sequence[EmaConfig]) -> tuple[str, ...]:
    """The states' names, in order: `ema` for the first."""
    return (EMA, *(f"ema_{_words(e)}" for e in emas[1:]))


def _words(ema: EmaConfig) -> str:
    return f"decay_{ema.decay}" if ema.sigma_rel is None else f"sigma_rel_{ema.sigma_rel}"


class Whole(Protocol):
    """Whole float32 tensors of a sharded engine, by parameter name and kind.

    Every method that moves a whole tensor is collective: all ranks call it, in the same order.
    """

    optimizer_step: int
    """Updates that the optimiser has really taken."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The trained parameters, by name."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds: weight, exp_avg, exp_avg_sq, ema and the states of further EMAs."""

    @property
    def emas(self) -> Sequence[EmaConfig]:
        """The moving averages, in the order of their kinds (`ema_keys`)."""

    @property
    def ema_since(self) -> dict[str, int]:
        """Updates taken before an average began, of those that began later."""

    def get(self, name: str, kind: str) -> Tensor:
        """The whole tensor [...], of the parameter's shape, on the engine's device."""

    def set(self, name: str, kind: str, value: Tensor) -> None:
        """Overwrite the whole tensor from `value` [...], float32, the parameter's shape."""

    def local(self, name: str, kind: str) -> tuple[int, Tensor]:
        """Return this rank's fragment: its start in the flattened whole, and its values [n]."""

    def release(self) -> None:
        """Free what get, set and local hold: after the last of them and before the next step."""
