"""A bench on the screen and as a picture: time and memory against every rival."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from fastrepa.commands.bench.bench import FILE, TURNS, Result, label, record
from fastrepa.drawing import INK, PALETTE, axes_title, heading, new_figure, save_figure
from fastrepa.errors import decoration
from fastrepa.runtime.terminal import Terminal, print_table, say_json

PICTURE = "bench.png"
ENOUGH = 3  # times that have a spread
COLOURS = {
    "ours": PALETTE["green"], "ours+recompute": PALETTE["mint"], "ours+compile": "#4f9d80",
    "ours+graphs": "#1d5c47",
    "eager": PALETTE["blue"], "eager+compile": PALETTE["sky"],
    "plain+compile": PALETTE["purple"], "reference": PALETTE["orange"],
}  # fmt: skip


def print_bench(results: Sequence[Result], out: Path, *, as_json: bool = False) -> None:
    """Print the table, write the picture into `out`."""
    files = [FILE, TURNS]
    with decoration(out / PICTURE):
        save_bench_picture(results, out / PICTURE)
        files.append(PICTURE)
    if as_json:
        say_json([record(result) for result in results], indent=1)
        return
    console = Terminal()
    if results[0].line:
        console.print(results[0].line, soft_wrap=True)
    headings = ("images/s", "ms", "p20 .. p80", "ours is", "GB*", "ours")
    numbers = (Column(heading, justify="right", no_wrap=True) for heading in headings)
    table = Table("contender", *numbers, box=SIMPLE_HEAD, pad_edge=False)
    group = None
    for result in results:
        ours, case = _ours(results, result), result.case
        if case.group != group:
            group = case.group
            table.add_section()
            table.add_row(_title(result), style="bold")
        if result.problem:
            table.add_row(case.contender, "no time")
            continue
        rival = ours is not None and result is not ours
        above, smaller = result.above_weights, ""
        if rival and above and ours is not None and ours.above_weights is not None:
            smaller = f"{ours.above_weights / above:.2f}x"
        table.add_row(
            case.contender,
            f"{result.images_per_s:.4g}",
            f"{result.median:.4g}",
            f"{result.milliseconds(0.2):.4g} .. {result.milliseconds(0.8):.4g}",
            _faster(ours, result) if rival and ours is not None else "",
            "" if above is None else f"{above / 1e9:.3g}",
            smaller,
        )
    print_table(console, table)
    for result in results:
        if result.problem:
            said = f"{label(result.case)}: {result.problem}"
            console.print(said, soft_wrap=True, style="red" if result.failed else "")
        elif result.unfinished:
            said = f"{label(result.case)}, after its times: {result.unfinished}"
            console.print(said, soft_wrap=True, style="red")
    for line in (
        "ms: median of a step, or of a batch of images; "
        "ours is: as fast as that rival, so many times; ~ within their spread",
        "*fullest moment of a step above the fp32 weights; ours: its share of that rival's",
    ):
        console.print(line)
    console.print(f"{out}/: {', '.join(files)}", soft_wrap=True)


def _faster(ours: Result, rival: Result) -> str:
    """Say how many times as fast ours is; "~" where p20 .. p80 of both meet or are unknown."""
    apart = min(len(ours.seconds), len(rival.seconds)) >= ENOUGH and (
        ours.milliseconds(0.8) < rival.milliseconds(0.2)
        or rival.milliseconds(0.8) < ours.milliseconds(0.2)
    )
    return f"{'' if apart else '~'}{rival.median / ours.median:.2f}x"


def _title(result: Result) -> str:
    case = result.case
    title = f"{case.sampler or 'training step'}, {case.precision}, batch {case.batch}"
    return title + (f", {case.ranks} ranks" if case.ranks > 1 else "")


def _ours(results: Sequence[Result], like: Result) -> Result | None:
    for result in results:
        same = result.case.group == like.case.group
        if same and result.case.contender == "ours" and not result.problem:
            return result
    return None


def save_bench_picture(results: Sequence[Result], path: Path) -> None:
    """Bars of every group: time of a step (or of the images), and memory above the weights."""
    good = [result for result in results if not result.problem]
    groups = list(dict.fromkeys(result.case.group for result in good))
    rows = len(good) + len(groups)
    height = 1.5 + 0.3 * rows
    figure = new_figure(10, height)
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(
        left=0.13, right=0.98, top=1 - 1.2 / height, bottom=0.2 / height, wspace=0.06
    )
    line = next((result.line for result in good if result.line), "")
    what = " · ".join(line.split(" · ")[:2]) or "no contender has a time"
    heading(
        figure, "One step of each contender, beside the others of its group",
        f"{what}\nshorter is better; within a group all bars share one scale; line: p20 to p80",
    )  # fmt: skip
    place, ticks, names = 0.0, [], []
    for group in groups:
        members = [result for result in good if result.case.group == group]
        title = _title(members[0])
        left.text(0, place, title, fontsize=9, fontweight="bold", color=INK, va="center")
        place += 1
        slowest = max(result.median for result in members)
        memories = [result.above_weights or 0 for result in members]
        largest = max([*memories, 1])
        for result, memory in zip(members, memories, strict=True):
            colour = COLOURS[result.case.contender]
            left.barh(place, result.median / slowest, color=colour, height=0.72)
            spread = [result.milliseconds(0.2) / slowest, result.milliseconds(0.8) / slowest]
            left.plot(spread, [place, place], color=INK, linewidth=1)
            left.text(
                0.01, place, f"{result.images_per_s:.4g} images/s", fontsize=8, color="white",
                va="center",
            )  # fmt: skip
            if memory:
                right.barh(place, memory / largest, color=colour, height=0.72)
                right.text(
                    0.01, place, f"{memory / 1e9:.3g} GB", fontsize=8, color="white", va="center"
                )
            ticks.append(place)
            names.append(result.case.contender)
            place += 1
    left.set_yticks(ticks, names, fontsize=8)
    left.set_ylim(place - 0.4, -0.6)
    for axes, name in (
        (left, "time"),
        (right, "fullest moment above the fp32 weights"),
    ):
        axes_title(axes, name, pad=6)
        axes.set_xlim(0, 1.08)
        axes.set_xticks([])
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
    save_figure(figure, path)
