"""The compact table that a call prints last: failures, then what was measured, and where it is long
the end is cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.gpu_suite.plan import Record

MOST = 11_000
"""Characters: a caller may see no more of the end of what is printed."""
ALIKE = 2e-2
"""By how much the losses of contenders in bf16 may differ, as `fastrepa bench` has it."""


def table(records: list[Record]) -> str:
    """Return the table of the latest record of everything of the last record's commit and device,
    cut to what a caller sees.
    """
    last = records[-1] if records else {}
    records = [r for r in records if all(r.get(k) == last.get(k) for k in ("git", "device"))]
    sections = (
        _failures(records), _device(records), _steps(records), _stages(records), _tests(records),
        _correct(records), _decoding(records), _products(records), _sustained(records),
        _launch_rows(records),
        _operations(records),
    )  # fmt: skip
    text = "\n".join(line for section in sections for line in section)
    return text if len(text) <= MOST else text[: MOST - 4] + "\n..."


def _latest(records: Iterable[Record], has: str, *keys: str) -> list[Record]:
    """The last record of each value of `keys`, of those that have them all and `has`."""
    found: dict[tuple[str, ...], Record] = {}
    for record in records:
        if all(key in record for key in (has, *keys)):
            values = tuple(str(record[key]) for key in keys)
            found.pop(values, None)
            found[values] = record
    return list(found.values())


def _failures(records: list[Record]) -> Iterator[str]:
    failed = [r for r in _latest(records, "seconds", "stage", "item") if r["failed"]]
    for record in failed:
        name = f"{record['stage']}: {record['item'] or 'its start'}"
        yield f"FAILED {name}: {record['problem'][:160]}"


def _device(records: list[Record]) -> Iterator[str]:
    for record in _latest(records, "bytes_per_second", "device"):
        yield (
            f"{record['device']}, torch {record['torch']}, triton {record['triton']}, commit "
            f"{record['git'][:12]}{' (modified)' if record['dirty'] else ''}: copy "
            f"{record['bytes_per_second'] / 1e12:.2f} TB/s, products "
            f"{record['flops_per_second'] / 1e12:.0f} TFLOP/s"
        )


def _products(records: list[Record]) -> Iterator[str]:
    by_layer: dict[str, dict[str, float]] = {}
    for r in _latest(records, "tflops", "recipe", "layer", "way"):
        by_layer.setdefault(f"{r['layer']} {r['way']}", {})[r["recipe"]] = r["tflops"]
    if by_layer:
        recipes = list(dict.fromkeys(recipe for row in by_layer.values() for recipe in row))
        yield f"{'product, TFLOP/s':18}" + "".join(f"{recipe:>16}" for recipe in recipes)
    for name, row in by_layer.items():
        yield f"{name:18}" + "".join(
            f"{row[recipe]:16.0f}" if recipe in row else f"{'-':>16}" for recipe in recipes
        )


def _sustained(records: list[Record]) -> Iterator[str]:
    found = [r for r in records if "sustained_tflops" in r]
    if found:
        last = found[-1]
        at = f" at {last['sm_mhz']:.0f} MHz, {last['watts']:.0f} W" if "sm_mhz" in last else ""
        turns = " ".join(f"{r['sustained_tflops']:.0f}" for r in found)
        yield f"fc1's product, sustained, TFLOP/s: {turns}{at}"


def _correct(records: list[Record]) -> Iterator[str]:
    found = [r for r in records if r["stage"] == "correct"]
    checked = _latest(found, "error", "item")
    if checked:
        wrong = [r for r in checked if "problem" in r]
        worst = max(checked, key=lambda r: r["error"] / max(r["eager_error"], 1e-30))
        yield (
            f"operations right: {len(checked) - len(wrong)} of {len(checked)}; largest error over "
            f"eager's: {worst['error'] / max(worst['eager_error'], 1e-30):.2f}, {worst['item']}"
        )


def _operations(records: list[Record]) -> Iterator[str]:
    found = _latest(records, "p50_ms", "case", "provider", "direction", "shape", "dtype")
    for r in found:
        share = f"{r['share_of_floor']:5.0%}" if "share_of_floor" in r else "    -"
        yield (
            f"{r['case']:33} {r['shape']:18} {r['provider']:10} {r['direction']:8} "
            f"{r['p50_ms']:8.3f} ms {share}"
        )


def _launch_rows(records: list[Record]) -> Iterator[str]:
    by_row: dict[str, list[Record]] = {}
    for r in _latest(records, "now", "row", "launched_with"):
        by_row.setdefault(r["row"], []).append(r)
    for row, tried in by_row.items():
        timed = [r for r in tried if "p50_ms" in r]
        now = next((r["p50_ms"] for r in timed if r["now"]), None)
        if timed:
            best = min(timed, key=lambda r: r["p50_ms"])
            yield (
                f"launch row {row}: now {f'{now:.4f} ms' if now else 'refused'}, best "
                f"{best['p50_ms']:.4f} ms by {best['launched_with']}, of {len(tried)}"
            )


def _steps(records: list[Record]) -> Iterator[str]:
    found = _latest(records, "item", "name", "contender", "batch")
    losses = {(r["name"], r["batch"]): r["last_loss"] for r in reversed(found) if "last_loss" in r}
    for r in found:
        name = f"{r['name']:26} {r['contender']:14} b{r['batch']:<4}"
        if "p50_ms" not in r:
            yield f"{name} {(r.get('did_not_fit') or r['problem'])[:80]}"
            continue
        loss = losses[r["name"], r["batch"]]
        off = abs(r["last_loss"] - loss) / max(abs(loss), 1e-12)
        unlike = "" if off <= ALIKE else f"  loss {r['last_loss']:.4g} is not {loss:.4g}"
        yield (
            f"{name} {r['images_per_s']:8.1f} images/s {r['p50_ms']:8.1f} ms "
            f"{r.get('peak_bytes', 0) / 1e9:6.1f} GB{unlike}"
        )


def _tests(records: list[Record]) -> Iterator[str]:
    for r in _latest(records, "passed", "item"):
        counts = ", ".join(f"{r[how]} {how}" for how in ("passed", "failed", "skipped"))
        yield f"{r['item']}: {counts}"


def _decoding(records: list[Record]) -> Iterator[str]:
    for r in _latest(records, "p50_images_per_s", "decode"):
        yield f"decoding, {r['decode']}: {r['p50_images_per_s']:.0f} images/s"
    for r in _latest(records, "seconds_a_step", "case"):
        times = ", ".join(f"{k} {1000 * s:.1f} ms" for k, s in r["seconds_a_step"].items())
        yield f"a step at batch {r['batch']} fed by: {times}"


def _stages(records: list[Record]) -> Iterator[str]:
    ends = {r["stage"]: r for r in records if "took" in r}
    for stage, r in ends.items():
        left = f", left for a later call: {len(r['left'])}" if r["left"] else ""
        yield f"stage {stage}: {r['took']:.0f} s, {len(r['due'])} items{left}"
