"""An evaluation on the screen, and as a record for programs."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from fastrepa.commands.evaluate.evaluate import Evaluation
from fastrepa.commands.evaluate.evaluator import Kind, Metric
from fastrepa.commands.evaluate.record import evaluation_record
from fastrepa.runtime.terminal import Terminal, print_table, say_json

TITLES: dict[Kind, str] = {
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception Score",
    "clip_score": "CLIP score",
    "own": "of one's own",
}
NAMES = {"fid": "FID", "sfid": "sFID", "kid": "KID"}


def print_evaluation(done: Evaluation, *, as_json: bool = False) -> None:
    """A table of the metrics and what is to be known of them, or one JSON object."""
    if as_json:
        say_json(evaluation_record(done))
        return
    console = Terminal()
    values = Column("value", no_wrap=True, justify="right")
    table = Table(Column("metric", no_wrap=True), values, "better", "what it is", box=SIMPLE_HEAD)
    for metric in done.metrics:
        value, spread = done.scores[metric.name], done.scores.get(f"{metric.name}_std", math.nan)
        shown = f"{value:.5g}" if math.isnan(spread) else f"{value:.5g} ± {spread:.2g}"
        better = "higher" if metric.higher_is_better else "lower"
        table.add_row(metric.name, shown, better, described(metric))
    console.print(f"samples    {done.samples}{_counted(done.num_samples)}", soft_wrap=True)
    console.print(f"reference  {done.reference}{_counted(done.num_reference)}", soft_wrap=True)
    if done.settings:
        shown = ", ".join(f"{k} {v}" for k, v in done.settings.items())
        console.print(f"generated  {shown}", soft_wrap=True)
    print_table(console, table)
    for note in done.notes:
        console.print(f"warning: {note}", soft_wrap=True)


def described(metric: Metric) -> str:
    """Describe a metric in words; its name says in which space."""
    if metric.kind == "clip_score":
        return f"{TITLES[metric.kind]}, class-named prompts"
    return NAMES.get(metric.name, TITLES[metric.kind])


def _counted(num: int | None) -> str:
    return ": statistics" if num is None else f": {num:,} images"
