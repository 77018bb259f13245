"""Heat maps of a probe's record (RUN/probe/probe.json): every panel on one scale of colours.

The scale goes from what unrelated features or guessing reach to what the encoder itself does, and
so a colour means the same in any panel, of any run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrepa.drawing import shortened

COLOURS = "YlGnBu"
LOWEST, HIGHEST = "unrelated, or guessing", "the encoder itself"
"""Words for the scale's two ends."""


@dataclass(frozen=True)
class HeatMap:
    """Values [blocks, steps], nan where there is none, with the two ends of their scale.

    form: how a value is written. reference: the ends, in words.
    """

    title: str
    values: np.ndarray[Any, Any]
    lowest: float
    highest: float
    form: str
    reference: str

    @property
    def shares(self) -> np.ndarray[Any, Any]:
        """Places on the scale [blocks, steps], 0 to 1; nan where there is no value."""
        return np.clip((self.values - self.lowest) / max(self.highest - self.lowest, 1e-9), 0, 1)


def heat_maps(record: Mapping[str, Any]) -> list[HeatMap]:
    """CKNNA and CKA of each encoder, and the linear probe where there are classes.

    Raises KeyError, TypeError, ValueError or AttributeError for what is no record of a run's probe.
    """
    encoders = [str(name) for name in record["encoders"]]
    unrelated = float(record.get("unrelated_cknna") or 0.0)
    maps = []
    for name in encoders:
        to = f", {shortened(name, 26)}" if len(encoders) > 1 else ""
        for title, key, lowest, said in (
            ("CKNNA", "cknna", unrelated, f"unrelated: about {unrelated:.2g}"),
            ("linear CKA", "linear_cka_debiased", 0.0, "debiased; unrelated: 0"),
        ):
            values = _table(record, record[key][name])
            words = f"{said}, the encoder: 1"
            maps.append(HeatMap(f"{title}{to}", values, lowest, 1.0, "{:.2f}", words))
    accuracy = _table(record, record["linear_probe"])
    if np.isfinite(accuracy).any():
        of_encoders = [float(record["linear_probe_of_encoder"][name]) for name in encoders]
        chance = float(record["guessing"])
        own = ", ".join(f"{a:.0%}" for a in of_encoders)
        words = f"guessing: {100 * chance:.3g}%, the encoder: {own}"
        title = "linear probe, balanced accuracy, %"
        ends = (100 * chance, 100 * max(of_encoders))
        maps.append(HeatMap(title, 100 * accuracy, *ends, "{:.0f}", words))
    return maps


def _table(record: Mapping[str, Any], rows: Any) -> np.ndarray[Any, Any]:
    values = np.array(rows, dtype=np.float64)  # null becomes nan
    if values.shape != (len(record["blocks"]), len(record["steps"])):
        raise ValueError(f"a table of {values.shape}")
    return values


def heat_colours(shares: np.ndarray[Any, Any]) -> list[list[tuple[str, str]]]:
    """The colour of each cell and that of text on it, "#rrggbb"; "" and "" where there is nan."""
    from matplotlib import colormaps

    return [
        [_colours(colormaps[COLOURS](share)) if np.isfinite(share) else ("", "") for share in row]
        for row in shares
    ]


def _colours(rgba: tuple[float, ...]) -> tuple[str, str]:
    """The nearest colour, and black or white, whichever stands out more from it."""
    rgb = [round(255 * c) for c in rgba[:3]]
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    light = float(np.dot((0.2126, 0.7152, 0.0722), linear))
    return "#{:02x}{:02x}{:02x}".format(*rgb), "#000000" if light > 0.179 else "#ffffff"
