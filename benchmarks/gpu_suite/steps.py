"""Whole training steps, ours and rivals', each a turn of `fastrepa bench` in its own process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

from benchmarks.gpu_suite import records
from benchmarks.gpu_suite.plan import Item, Record, SuiteSize, Turn
from benchmarks.provenance import ROOT

with suppress(ImportError):  # now, while another stage runs; where it fails, each turn says so
    import_module("fastrepa.commands.bench.bench")

SHARE = 2.5
"""A turn may take so many times its estimate."""
STATES = 16e9
"""Bytes of SiT-XL/2's weights, gradients and optimiser; of SiT-B/2's it is too many."""
PER_IMAGE = dict.fromkeys(("ours", "ours+graphs"), 0.22e9) | dict.fromkeys(
    ("plain+compile", "eager+compile"), 0.32e9
)
EAGER_PER_IMAGE = 0.55e9
"""Estimated bytes that backward needs of an image, to begin with a batch that may fit."""


def items(stage: str, size: SuiteSize, out: Path) -> Iterator[Item]:
    for turn in size.turns[stage]:
        limit = turn.limit or max(SHARE * turn.estimate, 60)
        run = partial(_turn, turn, size, limit, out)
        # run_turn ends a turn that takes too long; the item's limit is for what cannot be ended.
        yield Item(turn.key, run, limit=limit + 30, estimate=turn.estimate)


def _turn(turn: Turn, size: SuiteSize, limit: float, out: Path) -> Iterator[Record]:
    """The record of the first batch that fits, after those that do not."""
    from fastrepa.commands.bench import bench
    from fastrepa.config import load_config

    ends = time.monotonic() + limit
    config = load_config(ROOT / turn.config, turn.overrides)
    batches = _batches(turn, out)
    for batch in batches:
        case = bench.BenchCase(turn.contender, size.dtype, batch)
        found = bench.run_turn(
            config, case, steps=size.steps, warmup=size.warmup, memory=True,
            profile=turn.profile, timeout=max(ends - time.monotonic(), 1),
        )  # fmt: skip
        profile = found.pop("profile", None)
        if profile is not None:
            of = {"name": turn.name, "batch": batch, "device": bench.context()["device"]}
            text = json.dumps(of | profile, indent=1)
            (out / records.PROFILE).write_text(text)
        (result,) = bench.gather([vars(case) | found])
        record = {"name": turn.name, **bench.record(result), "run": result.line}
        if result.unfinished:  # the item failed, its times count
            record["problem"] = f"after its times: {result.unfinished}"
        if result.problem != bench.DOES_NOT_FIT or batch == batches[-1]:
            yield record
            return
        yield record | {"did_not_fit": record.pop("problem")}


def _batches(turn: Turn, out: Path) -> tuple[int, ...]:
    """Return the batches to try, without those that cannot fit into the free memory recorded."""
    free = [r["free_bytes"] for r in records.load(out) if "free_bytes" in r]
    if not free:
        return turn.batches
    image = PER_IMAGE.get(turn.contender, EAGER_PER_IMAGE)
    fitting = [b for b in turn.batches if STATES + b * image < free[-1]]
    return tuple(fitting) or turn.batches[-1:]
