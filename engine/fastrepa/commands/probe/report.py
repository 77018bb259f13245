"""A probe on the screen, and as a record for programs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fastrepa.commands.probe.data import PIXELS, RANDOM, DataProbe, Measured
from fastrepa.commands.probe.run import RunProbe
from fastrepa.commands.probe.similarity import NEIGHBOURS
from fastrepa.errors import printable
from fastrepa.runtime.terminal import print_table

STEPS = 8  # columns of the table on the screen
COLOURS = {"helps": "green", "unclear": "yellow", "no better than raw pixels": "red"}


def run_record(probe: RunProbe) -> dict[str, Any]:
    """Return a run's probe.json; nan is null."""
    return {
        "run": str(probe.run),
        "encoders": probe.encoders,
        "steps": probe.steps,
        "blocks": list(range(1, len(probe.accuracy) + 1)),
        "aligned_block": probe.block,
        "time": probe.time,
        "seed": probe.seed,
        "fitted_images": probe.fitted,
        "measured_images": probe.held_out,
        "unrelated_cknna": round(NEIGHBOURS / probe.held_out, 6),
        "cknna": dict(zip(probe.encoders, map(_numbers, probe.cknna), strict=True)),
        "linear_cka_debiased": dict(zip(probe.encoders, map(_numbers, probe.cka), strict=True)),
        "linear_probe": _numbers(probe.accuracy),
        "linear_probe_of_encoder": dict(
            zip(probe.encoders, _numbers(probe.encoder_accuracy), strict=True)
        ),
        "guessing": _numbers(np.array(probe.chance)),
        "said": probe.said,
    }


def print_run_probe(probe: RunProbe, console: Console) -> None:
    """A table for each measure: blocks by steps, the first and last step among them."""
    for line in probe.said:
        console.print(line, soft_wrap=True)
    tables = []
    for number, name in enumerate(probe.encoders):
        chance = NEIGHBOURS / probe.held_out
        tables.append((f"CKNNA to {name} (unrelated: about {chance:.2g})", probe.cknna[number]))
        tables.append((f"linear CKA to {name}, debiased (unrelated: 0)", probe.cka[number]))
    if np.isfinite(probe.accuracy).any():
        best = ", ".join(
            f"{name} {accuracy:.3f}"
            for name, accuracy in zip(probe.encoders, probe.encoder_accuracy, strict=True)
        )
        title = f"linear probe, balanced accuracy (guessing {probe.chance:.3f}; {best})"
        tables.append((title, probe.accuracy))
    last = len(probe.steps) - 1
    shown = sorted({round(i * last / (STEPS - 1)) for i in range(STEPS)})
    for title, values in tables:
        console.print(title, style="bold", soft_wrap=True)
        table = _table("block", *(f"step {probe.steps[i]:,}" for i in shown))
        for block, row in enumerate(values, start=1):
            aligned = block == probe.block
            place = Text(f"{block} (aligned)", "bold") if aligned else str(block)
            table.add_row(place, *("-" if math.isnan(row[i]) else f"{row[i]:.3f}"
                                  for i in shown))  # fmt: skip
        print_table(console, table)
    console.print(
        f"averaged weights, {probe.held_out:,} images at t = {probe.time:g} under the null class, "
        f"pooled tokens; the probe was fitted to {probe.fitted:,} images of the run's own set",
        soft_wrap=True,
    )


def data_record(probe: DataProbe) -> dict[str, Any]:
    """Return a data set's probe.json."""
    sample = probe.sample
    return {
        "data": str(probe.data),
        "images": len(sample.names),
        "resolution": sample.resolution,
        "classes": sample.classes,
        "no_labels": sample.no_labels or None,
        "seed": probe.seed,
        "device": probe.device,
        "said": probe.said,
        "duplicates_by_hash": [list(pair) for pair in probe.duplicates],
        "groups": probe.groups,
        "missing": [{"encoder": name, "reason": reason} for name, reason in probe.missing],
        "ranking": [
            {
                **e.config.model_dump(mode="json", exclude={"grid"}),
                "input": e.input_side,
                "verdict": e.verdict,
                "why": e.why,
                "gains": {
                    name: {"balanced_accuracy": by, "standard_error": error}
                    for name, (by, error) in e.gains.items()
                },
                "features": _measured(e.features),
                "random_weights": _measured(e.random),
                "raw_pixels": _measured(e.pixels),
                "duplicates_by_features": e.duplicates,
                "images_per_second": e.images_per_second,
                "cache_bytes_per_image": e.cache_bytes,
            }
            for e in probe.encoders
        ],
    }


def print_data_probe(probe: DataProbe, console: Console) -> None:
    """The ranking, each encoder beside its controls, and the verdicts in words."""
    sample = probe.sample
    kinds = f", {len(sample.classes)} classes" if sample.labels is not None else ""
    console.print(
        f"{probe.data}: {len(sample.names):,} images at {sample.resolution} px{kinds}, on "
        f"{probe.device}", soft_wrap=True,
    )  # fmt: skip
    for line in probe.said:
        console.print(line, soft_wrap=True)
    table = _table(
        "features", "tokens", "LDS", "RMSC", "linear", "k-NN", "layout", "rank", "mean share",
        "cosine", "images/s", "B an image",
    )  # fmt: skip
    shown: set[int] = set()
    for rank, e in enumerate(probe.encoders, start=1):
        table.add_row(
            Text(f"{rank}. {e.features.name}", "bold"), *_cells(e.features),
            f"{e.images_per_second:,.0f}", f"{e.cache_bytes:,}",
        )  # fmt: skip
        table.add_row(f"   {RANDOM}", *_cells(e.random))
        if e.pixels.grid not in shown:
            table.add_row(f"   {PIXELS}", *_cells(e.pixels))
        shown.add(e.pixels.grid)
    print_table(console, table)
    for rank, e in enumerate(probe.encoders, start=1):
        colour = COLOURS[e.verdict]
        verdict = Text(e.verdict, f"bold {colour}")
        console.print(
            Text.assemble(f"{rank}. {printable(e.features.name)}: ", verdict, f": {e.why}"),
            soft_wrap=True,
        )
        if e.gains:
            margins = (f"{by:+.3f} ± {error:.3f} {what}" for what, (by, error) in e.gains.items())
            console.print(f"   {', '.join(margins)}", style="dim", soft_wrap=True)
    for name, reason in probe.missing:
        console.print(f"-  {name}: left out: {reason}", soft_wrap=True)
    if sample.no_labels:
        console.print(f"separability left out: {sample.no_labels}", soft_wrap=True)
    pairs = ", ".join(f"{e.duplicates} by {e.features.name}" for e in probe.encoders)
    console.print(
        f"nearly identical pairs: {len(probe.duplicates)} by hash, {pairs}; none was split",
        soft_wrap=True,
    )
    console.print(
        "LDS: how much more adjacent tokens are alike than distant ones; RMSC: their spread; "
        "linear, k-NN: balanced accuracy from the tokens' mean, layout: from their map; rank: "
        "effective; mean share, cosine: near 1 the features have collapsed; B an image: the int8 "
        "cache. Better is by more than two standard errors; ranked by verdict, then LDS.",
        style="dim",
        soft_wrap=True,
    )


def _table(first: str, *numbers: str) -> Table:
    columns = (Column(heading, justify="right", no_wrap=True) for heading in numbers)
    return Table(first, *columns, box=SIMPLE_HEAD, pad_edge=False)


def _cells(m: Measured) -> list[str]:
    s = m.separability
    accuracies = ["-"] * 3 if s is None else [f"{a:.3f}" for a in (s.linear, s.neighbours,
                                                                 s.layout)]  # fmt: skip
    return [
        f"{m.grid}x{m.grid}x{m.width}", f"{m.lds:.3f}", f"{m.rmsc:.3f}", *accuracies,
        f"{m.rank:.0f}", f"{m.mean_share:.2f}", f"{m.mean_cosine:.2f}",
    ]  # fmt: skip


def _measured(m: Measured) -> dict[str, Any]:
    s = m.separability
    return {
        "grid": m.grid,
        "width": m.width,
        "lds": m.lds,
        "lds_standard_error": m.lds_error,
        "rmsc": m.rmsc,
        "effective_rank": m.rank,
        "mean_share": m.mean_share,
        "mean_cosine": m.mean_cosine,
        "linear_probe": None if s is None else s.linear,
        "knn": None if s is None else s.neighbours,
        "layout_probe": None if s is None else s.layout,
    }


def _numbers(values: np.ndarray) -> Any:
    """Nested lists with null for nan, to six digits."""
    if values.ndim:
        return [_numbers(np.asarray(v)) for v in values]
    return None if np.isnan(values) else round(float(values), 6)
