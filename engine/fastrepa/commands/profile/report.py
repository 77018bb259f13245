"""A profile on the screen: the step by region, part and kernel, idle gaps, what stands out."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from fastrepa.commands.profile.profile import (
    OperationGroup,
    Profile,
    ProfileReport,
    by_operation,
    by_part,
    findings,
    mfu_of_ceiling,
    report_as_dict,
)
from fastrepa.errors import decoration, writing
from fastrepa.runtime.files import write_whole
from fastrepa.runtime.regions import NAMES
from fastrepa.runtime.terminal import Terminal, print_table, say, say_json

SHOWN = 16  # operations in the table; profile.json has them all
KERNELS = 2  # of an operation's kernels
GAPS = 6


def print_profile(report: ProfileReport, *, as_json: bool = False) -> None:
    """Print the profile; write profile.json and both pictures into its folder."""
    from fastrepa.commands.profile.picture import save_roofline, save_step

    tree = report_as_dict(report)
    files = [report.folder / "profile.json"]
    with writing(f"--out: {report.folder}"):
        write_whole(files[0], json.dumps(tree, indent=1).encode())
    for name, save in (("roofline.png", save_roofline), ("step.png", save_step)):
        with decoration(report.folder / name):
            save(report, report.folder / name)
            files.insert(0, report.folder / name)
    if as_json:
        say_json(tree, indent=1)
        return
    console = Terminal()

    say(report.first_line)
    say(" · ".join(report.said))
    c = report.ceilings
    say(
        f"ceilings measured here: {_rate(c.flops_per_second, 'FLOP')} in matrix products, "
        f"{_rate(c.bytes_per_second, 'B')} copied"
    )
    print_table(console, _by_region(report))
    print_table(console, _by_part(report))
    print_table(console, _by_operation(report))
    print_table(console, _gaps(report))
    said = findings(report)
    say("what stands out:" if said else "nothing stands out")
    for line in said:
        say(f"  {line}")
    traces = [p.file for p in report.profiles]
    say(f"written: {', '.join(str(f) for f in (*files, *traces))} (traces: ui.perfetto.dev)")


def _by_region(report: ProfileReport) -> Table:
    ours, *rivals = report.profiles
    how = f"the median of {report.steps}" if report.device == "cpu" else f"of {report.steps} steps"
    title = f"one step by region, {how}, undisturbed"
    numbers = _right(f"{ours.kernels}, ms", "share", *_rivals(rivals))
    table = Table("region", *numbers, title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in NAMES:
        if any(p.regions[name] > 0 for p in report.profiles):
            table.add_row(
                name.replace("_", " "),
                _ms(ours.regions[name]),
                f"{ours.line[name]:.1%}",
                *_against(ours.regions[name], [p.regions[name] for p in rivals]),
            )
    table.add_section()
    table.add_row(
        "step", _ms(ours.seconds), "", *_against(ours.seconds, [p.seconds for p in rivals]),
        style="bold",
    )  # fmt: skip

    def also(label: str, values: list[str]) -> None:
        first, *rest = values
        table.add_row(label, first, "", *(cell for value in rest for cell in (value, "")))

    every = report.profiles
    if report.device == "cpu":
        also("fastest to slowest", [f"{_ms(p.fastest)} .. {_ms(p.slowest)}" for p in every])
    also("images/s", [f"{p.line['images_per_s']:,.1f}" for p in every])
    also("model FLOP/s a device", [_rate(p.line["model_flops_per_s"], "FLOP") for p in every])
    also("MFU, of the ceiling", [f"{mfu_of_ceiling(report, p):.1%}" for p in every])
    if "mfu" in ours.line:
        also("MFU, of the datasheet", [f"{p.line['mfu']:.1%}" for p in every])
    if "frozen_flops_per_s" in ours.line:
        also(
            "encoders, codec: FLOP/s", [_rate(p.line["frozen_flops_per_s"], "FLOP") for p in every]
        )
    also("peak memory, GB", [f"{p.line['peak_memory_bytes'] / 1e9:.2f}" for p in every])
    return table


def _by_part(report: ProfileReport) -> Table:
    ours, *rivals = report.profiles
    table = _operations_table(report, "the generator by part, under the profiler")
    others = [{row.name: row.seconds for row in by_part(p)} for p in rivals]
    for row in by_part(ours):
        against = _against(row.seconds, [other.get(row.name, 0.0) for other in others])
        table.add_row(row.name, *_measures(report, ours, row), *against)
    return table


def _by_operation(report: ProfileReport) -> Table:
    ours = report.profiles[0]
    table = _operations_table(report, "by kernel, under the profiler", compared=False)
    shown, hidden = by_operation(ours)[:SHOWN], by_operation(ours)[SHOWN:]
    for row in shown:
        table.add_row(row.name.removeprefix("aten::"), *_measures(report, ours, row))
        for name, seconds in list(row.kernels.items())[:KERNELS]:
            table.add_row(f"  {name}", "", _ms(seconds), style="dim")
    if hidden:
        seconds = sum(row.seconds for row in hidden)
        share = f"{seconds / ours.trace.seconds:.1%}"
        table.add_row(f"{len(hidden)} others", "", _ms(seconds), share, style="dim")
    table.add_section()
    idle = ours.trace.seconds - ours.trace.busy_seconds
    table.add_row("nothing ran", "", _ms(idle), f"{idle / ours.trace.seconds:.1%}")
    table.add_row("step", "", _ms(ours.trace.seconds), "", style="bold")
    return table


def _operations_table(report: ProfileReport, title: str, *, compared: bool = True) -> Table:
    name = report.profiles[0].kernels
    rivals = report.profiles[1:] if compared else []
    numbers = _right("calls", "ms", "share", "GFLOP/s", "GB/s", "roofline")
    return Table(
        name, *numbers, *_right(*_rivals(rivals)), title=title, title_justify="left",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip


def _rivals(rivals: Sequence[Profile]) -> list[str]:
    return [heading for p in rivals for heading in (f"{p.kernels}, ms", "speed-up")]


def _right(*headings: str) -> list[Column]:
    return [Column(heading, justify="right") for heading in headings]


def _measures(report: ProfileReport, profile: Profile, row: OperationGroup) -> list[str]:
    floor = row.floor(report.ceilings)
    return [
        f"{row.calls:,.0f}",
        _ms(row.seconds),
        f"{row.seconds / profile.trace.seconds:.1%}",
        f"{row.flops_per_second / 1e9:,.1f}" if row.cost.flops else "",
        f"{row.bytes_per_second / 1e9:,.1f}" if row.cost.bytes else "",
        f"{floor / row.seconds:.0%}" if row.seconds and row.cost.bytes else "",
    ]


def _gaps(report: ProfileReport) -> Table:
    trace = report.profiles[0].trace
    what = "no operation" if report.device == "cpu" else "no kernel"
    texts = (Column(name, overflow="fold") for name in ("region", "after", "before"))
    table = Table(
        *texts, *_right("a step", "ms"), title=f"idle gaps ({what} ran), under the profiler",
        title_justify="left", box=SIMPLE_HEAD,
    )  # fmt: skip
    for gap in trace.gaps[:GAPS]:
        table.add_row(
            gap.region.replace("_", " "), gap.after.removeprefix("aten::")[:60],
            gap.before.removeprefix("aten::")[:60], f"{gap.count:,.1f}", _ms(gap.seconds),
        )  # fmt: skip
    return table


def _against(ours: float, others: list[float]) -> list[str]:
    cells = []
    for other in others:
        cells += [_ms(other), f"{other / ours:.2f}x" if ours and other else ""]
    return cells


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.{2 if seconds < 0.01 else 1}f}"


def _rate(value: float, unit: str) -> str:
    for prefix in ("G", "T", "P"):
        value /= 1e3 if prefix != "G" else 1e9
        if value < 1000:
            break
    return f"{value:.3g} {prefix}{unit}/s"
