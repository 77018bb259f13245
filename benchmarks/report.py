"""Tables (markdown) and a bar chart from benchmarks/records/*.jsonl: never typed, always generated.

    python -m benchmarks.report [--device NAME] [--plot times.png]

Of several records of one measurement the latest is shown. The last columns compare with eager.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import command_line
from benchmarks.faults import rows

RECORDS = Path(__file__).resolve().parent / "records"
Record = dict[str, Any]
CASES = ("faults", "effect", "cpu_threads")
_MEASURED = ("device", "case", "shape", "dtype", "provider", "direction")
_CONTENDED = ("device", "case", "run", "precision", "batch", "ranks", "sampler", "contender")
"""`fastrepa bench` writes these; `run` is the first line of the run that was measured."""


def load(folder: Path) -> list[Record]:
    """The latest record of each thing measured, which _MEASURED or _CONTENDED tell apart; what
    else benchmarks/gpu_suite records has no table here.
    """
    latest: dict[tuple, Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            named: Sequence[str] = _CONTENDED if "contender" in record else _MEASURED
            if not record.keys() >= set(named):
                continue
            if named is _CONTENDED and "stage" in record:
                # The kit's: a rival's first line names its own kernels, its batch is what fits.
                record["run"] = record["name"]
                named = [k for k in named if k != "batch"]
            key = tuple(record[k] for k in named)
            if key not in latest or record["utc"] >= latest[key]["utc"]:
                latest[key] = record
    return list(latest.values())


def _groups(
    records: list[Record], keys: Sequence[str] = ("device", "case", "shape", "dtype")
) -> dict[tuple, list[Record]]:
    """Records by their values of `keys`; a list is a tuple in the group's."""
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for r in records:
        values = (r[k] for k in keys)
        groups[tuple(tuple(v) if isinstance(v, list) else v for v in values)].append(r)
    return groups


def _dated(record: Record) -> str:
    """Say when a record was made, and of which code; `fastrepa bench` has other keys for it."""
    modified = " (modified)" if record.get("git_dirty") or record.get("dirty") else ""
    commit = record.get("git_sha", record.get("git", "unknown"))[:12]
    return f"{record['utc']}, commit {commit}{modified}"


def _row(record: Record, eager: Record | None) -> str:
    share = f"{record['share_of_floor']:.0%}" if "share_of_floor" in record else ""
    speed = f"{eager['p50_ms'] / record['p50_ms']:.2f}x" if eager else ""
    memory = f"{record['peak_bytes'] / eager['peak_bytes']:.2f}x" if eager else ""
    cells = (
        record["provider"], record["direction"], f"{record['p50_ms']:.3f}",
        f"{record['p20_ms']:.3f} .. {record['p80_ms']:.3f}", share,
        f"{record['peak_bytes'] / 2**20:.1f}", f"{record['saved_bytes'] / 2**20:.1f}",
        f"{record['error']:.1e}", speed, memory,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def markdown(records: list[Record]) -> str:
    head = (
        "| provider | direction | p50 ms | p20 .. p80 | share of floor | peak MiB | saved MiB "
        "| error | speed vs eager | peak vs eager |\n|" + "---|" * 10
    )
    parts = []
    for (device, case, shape, dtype), group in _groups(records).items():
        eager = {r["direction"]: r for r in group if r["provider"] == "eager"}
        first = group[0]
        parts.append(f"### {case}, {shape}, {dtype}\n")
        parts.append(
            f"{device}, torch {first['torch']}, triton {first['triton']}, {_dated(first)}\n"
        )
        parts.append(head)
        parts += [_row(r, eager.get(r["direction"])) for r in group]
        parts.append("")
    return "\n".join(parts)


def operations(records: list[Record]) -> str:
    """A line for each operation on a GPU: ours, torch.compile and eager, forward and backward."""
    shown = ("ours", "compile", "eager")
    of_gpu = [r for r in records if r.get("driver") and r["provider"] in shown]
    parts = []
    for (device, shape, dtype), group in _groups(of_gpu, ("device", "shape", "dtype")).items():
        rows = []
        for (case,), of_case in _groups(group, ("case",)).items():
            found = {r["provider"]: r for r in of_case if r["direction"] == "both"} or {
                r["provider"]: r for r in of_case
            }
            if found.keys() != set(shown):
                continue
            times = [found[name]["p50_ms"] for name in shown]
            share, gain = found["ours"].get("share_of_floor"), times[1] / times[0]
            cells = (f"`{case}`", *(f"{t:.2f}" for t in times), f"{gain:.2f}x")
            rows.append(f"| {' | '.join(cells)} | {f'{share:.0%}' if share else ''} |")
        if rows:
            parts += [
                f"### Operations at {shape}, {dtype}, {device}\n",
                "| forward and backward, ms | ours | torch.compile | eager | compile over ours "
                "| ours: share of the floor |\n|" + "---|" * 6,
                *rows, "",
            ]  # fmt: skip
    return "\n".join(parts)


def rates(records: list[Record]) -> str:
    """Samples per second (benchmarks/data.py), against the best of ours' rivals."""
    parts = []
    for (device, case, shape, _), group in _groups(records).items():
        first = group[0]
        versions = ", ".join(f"{k} {first[k]}" for k in ("torch", "dali", "webdataset", "pillow"))
        rivals = [r["p50_images_per_s"] for r in group if r["provider"] != "ours"]
        parts.append(f"### {case}, {shape}\n")
        parts.append(f"{device}, {versions}, {_dated(first)}\n")
        parts.append("| provider | samples/s p50 | p20 .. p80 | vs best rival |\n|---|---|---|---|")
        for r in group:
            speed = f"{r['p50_images_per_s'] / max(rivals):.2f}x" if rivals else ""
            parts.append(
                f"| {r['provider']} | {r['p50_images_per_s']:.0f} | "
                f"{r['p20_images_per_s']:.0f} .. {r['p80_images_per_s']:.0f} | {speed} |"
            )
        parts.append("")
    return "\n".join(parts)


def training_steps(records: list[Record]) -> str:
    """Time and memory of a step, or of a batch of images, by `fastrepa bench`."""
    parts = []
    for of, group in _groups(records, _CONTENDED[:-1]).items():
        device, _, run, precision, batch, ranks, sampler = of
        first = group[0]
        title = sampler or "training step"
        parts.append(f"### {title}, {precision}, batch of {batch}, {ranks} ranks\n")
        parts.append(f"{device}, torch {first['torch']}, {_dated(first)}\n\n{run}\n")
        parts.append(
            "| contender | p50 ms | p20 .. p80 | images/s | ours takes | GB above weights "
            "| ours needs |\n|" + "---|" * 7
        )
        ours = next((r for r in group if r["contender"] == "ours" and "p50_ms" in r), None)
        for r in group:
            if "p50_ms" not in r:
                parts.append(f"| {r['contender']} | {r['problem']} | | | | | |")
                continue
            above, rival = r.get("peak_above_weights_bytes"), ours is not None and r is not ours
            time = f"{ours['p50_ms'] / r['p50_ms']:.2f}x" if ours and rival else ""
            share = ""
            if ours and rival and above and "peak_above_weights_bytes" in ours:
                share = f"{ours['peak_above_weights_bytes'] / above:.2f}x"
            parts.append(
                f"| {r['contender']} | {r['p50_ms']:.0f} | {r['p20_ms']:.0f} .. {r['p80_ms']:.0f} "
                f"| {1e3 * batch / r['p50_ms']:.4g} | {time} "
                f"| {f'{above / 1e9:.2f}' if above else ''} | {share} |"
            )
        parts.append("")
    return "\n".join(parts)


KERNELS = {
    "products (cuBLAS)": ("nvjet", "cublas"),
    "attention (cuDNN)": ("cudnn",),
    "norms and sums over rows, ours": ("_norm_", "_sums_kernel"),
    "GELU and SiLU, ours": ("_activation",),
    "attention's gradients in one, ours": ("_stack",),
    "AdamW and averages, ours": ("_adamw",),
}
"""What a kernel's name contains -> its line of a profile's table."""


def profile(record: Record) -> str:
    """The busy time of a traced step on a GPU by what its kernels are (the kit's profile.json)."""
    milliseconds = dict.fromkeys([*KERNELS, "everything else"], 0.0)
    for kernel in record["names"]:
        within = (
            line for line, marks in KERNELS.items() if any(m in kernel["name"] for m in marks)
        )
        milliseconds[next(within, "everything else")] += kernel["us"] / 1e3
    busy = 1e3 * record["busy_seconds"]
    milliseconds["everything else"] += busy - sum(milliseconds.values())
    rows = [f"| {line} | {ms:.1f} | {ms / busy:.1%} |" for line, ms in milliseconds.items()]
    idle = 1e3 * record["seconds"] - busy
    return "\n".join([
        f"### A step of {record['name']}, batch of {record['batch']}, traced\n",
        "| kernels | ms | share of busy |\n|---|---|---|",
        *rows, f"| nothing runs | {idle:.1f} | |", "",
    ])  # fmt: skip


def effect(records: list[Record]) -> str:
    """Tabulate what alignment bought a generator (benchmarks/effect.py), with 95% intervals; a
    table for each setting.
    """
    return "\n".join(_effect(group) for group in _groups(records, ("setting", "seeds")).values())


def _effect(records: list[Record]) -> str:
    first = records[0]
    parts = [
        f"### effect of alignment, {first['shape']}, {first['dtype']}, seeds {first['seeds']}\n",
        f"{first['device']}, torch {first['torch']}, {_dated(first)}; after "
        f"{first['steps'][-1]} steps, and after {first['equal_seconds']:.0f} s of training\n",
        "| measure | arm | after equal steps | less than `none` | after equal seconds "
        "| less than `none` | speed-up, steps | speed-up, seconds |\n|" + "---|" * 8,
    ]
    for r in records:
        cells = [r["direction"], r["provider"]]
        for when in ("", "_at_equal_seconds"):
            cells.append(_interval(r["last" + when], 4))
            cells.append(_interval(r.get("less" + when), 2))
        cells += [_interval(r.get(f"speed_up_{unit}"), 3, "x") for unit in ("steps", "seconds")]
        parts.append("| " + " | ".join(cells) + " |")
    return "\n".join([*parts, ""])


def _interval(pair: list[float | None] | None, digits: int, unit: str = "") -> str:
    """A mean and half its interval, to so many significant digits."""
    if pair is None or pair[0] is None:
        return ""
    mean, half = pair
    return f"{mean:.{digits}g}{unit}" + ("" if half is None else f" ± {half:.2g}")


def faults(records: list[Record]) -> str:
    """Tabulate faults: what was injected, how often, what came of it (benchmarks/faults/)."""
    first = records[0]
    parts = [
        f"### faults, {first['shape']}\n",
        f"{first['device']}, torch {first['torch']}, {_dated(first)}\n",
        "| injected | times | what happened | what was lost |\n|---|---|---|---|",
    ]
    parts += filter(None, map(rows.row, records))
    parts.append(f"\n{rows.in_short(records)}.")
    for r in records:
        if r["provider"] == "save":
            seconds = r["seconds"]
            parts.append(
                f"\nA save of {r['shape']} ({r['bytes'] / 1e9:.1f} GB, {r['count']} saves): "
                f"{_middle([s['save'] for s in seconds]):.1f} s. The step waits for "
                f"{_middle([s['copy'] for s in seconds]):.2f} s of it ({r['share_copied']:.1%}); "
                f"with what it slows the steps beside it ({r['step_seconds']:.1f} s each), "
                f"{_middle(r['cost_seconds']):.2f} s ({r['share']:.1%}; "
                f"{min(r['cost_seconds']):.1f} to {max(r['cost_seconds']):.1f} s)."
            )
    return "\n".join([*parts, ""])


def threads(records: list[Record]) -> str:
    """Tabulate the quickstart's images/s by CPU threads, machine by machine (cpu_threads.py)."""
    first = records[0]
    rates = {(r["provider"], r["direction"]): r for r in records}
    titles = {
        "idle": "idle", "busy": f"beside {first['busy_processes']} busy processes",
        "quota": f"quota of {first['quota_cores']:g}",
    }  # fmt: skip
    shown = {key: title for key, title in titles.items() if ("chosen", key) in rates}
    names = {
        "spinning": "a thread a core, libgomp's spin", "one": "one thread",
        "passive": "a thread a core, passive", "chosen": "chosen by the run",
    }  # fmt: skip
    parts = [
        f"### The quickstart's images/s by CPU threads, {first['cores']} cores\n",
        f"{first['device']}, torch {first['torch']}, {_dated(first)}\n",
        f"| threads | {' | '.join(shown.values())} |\n|" + "---|" * (1 + len(shown)),
    ]
    for provider, name in names.items():
        cells = [f"{rates[provider, key]['images_per_s']:.0f}" for key in shown]
        parts.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*parts, ""])


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def plot(records: list[Record], path: Path) -> None:
    """Median milliseconds of every provider, one group of bars per case and shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widest = {"both": 0, "forward": 1}
    groups = _groups([r for r in records if r["direction"] in widest])
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(8, 0.8 + 1.3 * len(groups)), squeeze=False, layout="constrained"
    )
    for axis, ((_, case, shape, dtype), group) in zip(axes[:, 0], groups.items(), strict=True):
        best = min(widest[r["direction"]] for r in group)
        bars = [r for r in group if widest[r["direction"]] == best]
        axis.barh([r["provider"] for r in bars], [r["p50_ms"] for r in bars], color="#4c78a8")
        axis.invert_yaxis()
        axis.set_title(f"{case}, {shape}, {dtype} ({bars[0]['direction']}, ms)", fontsize=9)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("report", __doc__)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--device", default="", help="only devices whose name contains this")
    parser.add_argument("--plot", type=Path, default=None, help="write a bar chart (matplotlib)")
    options = parser.parse_args(arguments)
    records = [r for r in load(options.records) if options.device in r["device"]]
    if not records:
        print(f"no records under {options.records.name}/")
        return 1
    contended = [r for r in records if "contender" in r]
    timed = [r for r in records if "p50_ms" in r and "contender" not in r]
    counted = [r for r in records if "p50_images_per_s" in r]
    of_case = {name: [r for r in records if r["case"] == name] for name in CASES}
    parts = (
        (operations, timed),
        (markdown, timed),
        (training_steps, contended),
        (rates, counted),
        (faults, of_case["faults"]),
        (effect, of_case["effect"]),
        (threads, of_case["cpu_threads"]),
    )
    print("\n".join(make(part) for make, part in parts if part))
    for path in sorted(options.records.glob("*_profile.json")):
        traced = json.loads(path.read_text())
        if options.device in traced.get("device", ""):
            print(f"{path.name}\n\n{profile(traced)}")
    if options.plot is not None and timed:
        plot(timed, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
