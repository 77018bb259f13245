"""Measures operations: are they right at SiT-XL/2's shapes, how near are the row kernels to a copy,
would other rows of the launch tables be nearer, and how do they all stand against their rivals.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import tune
from benchmarks.cases import CASES, OperationCase, Shape
from benchmarks.gpu_suite.ceilings import ceilings
from benchmarks.gpu_suite.plan import Item, Record, SuiteSize
from benchmarks.run import DTYPES, PROVIDERS, gate, measure, milliseconds, spread
from fastrepa_kernels import launch


def items(stage: str, size: SuiteSize, out: Path) -> Iterator[Item]:
    device, dtype = torch.device(size.device), DTYPES[size.dtype]
    if stage == "correct":
        for batch in size.batches:
            shape = Shape(size.model, batch, size.tokens)
            for case in CASES.values():
                key, run = f"{case.name} {shape}", partial(_correct, case, shape, dtype, device)
                yield Item(key, run, limit=40)
        return
    shape = Shape(size.model, size.batches[-1], size.tokens)
    for case in CASES.values():
        if case.row_kernels or stage == "operations":
            names = PROVIDERS if stage == "operations" and size.device == "cuda" else size.rivals
            run = partial(_measured, case, shape, size, out, names)
            yield Item(f"{case.name} {shape}", run, limit=60, estimate=10)
    if stage == "rows":
        for family in size.families:
            yield Item(f"launch rows, {family}", partial(_swept, family, size), limit=80)


def _correct(
    case: OperationCase, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Iterator[Record]:
    """Ours against float64, held to eager's error in the same dtype (tests/kernels/accuracy.py)."""
    errors, wrong = gate(case, shape, dtype, device, ["ours"])
    record = {
        "case": case.name, "shape": str(shape), "dtype": str(dtype).removeprefix("torch."),
        "error": errors["ours"], "eager_error": errors["eager"],
    }  # fmt: skip
    yield record | ({"problem": f"wrong: {wrong['ours']}"} if wrong else {})


def _measured(
    case: OperationCase, shape: Shape, size: SuiteSize, out: Path, names: tuple[str, ...]
) -> Iterator[Record]:
    device = torch.device(size.device)
    top = ceilings(out, device, DTYPES[size.dtype])
    yield from measure(case, shape, size.dtype, device, top, list(names), size.repeats)


def _swept(family: str, size: SuiteSize) -> Iterator[Record]:
    """Every candidate for the rows of launch tables that `family` begins, by the operation."""
    device = torch.device(size.device)
    for sweep in sweeps(family, size):
        now = sweep.table[sweep.key]
        for candidate in (now, *(c for c in sweep.candidates if c != now)):
            record: Record = {"row": sweep.label, "launched_with": str(candidate)}
            record["now"] = candidate == now
            try:
                with tune.using(sweep.table, sweep.key, candidate):
                    record |= spread(milliseconds(sweep.work, device, size.repeats))
            except tune.DO_NOT_LAUNCH as error:
                record["refused"] = f"{type(error).__name__}: {error}"
            yield record


def sweeps(family: str, size: SuiteSize) -> Iterator[tune.Sweep]:
    """The sweeps of `family`. Raises ValueError where no row of a launch table begins so."""
    of = tune.LARGE if size.device == "cuda" else tune.SweepSize("cpu", 1, size.tokens, 1024)
    found = False
    for sweep in tune.sweeps(launch.generation(torch.device(size.device)), [family], of):
        found = True
        yield sweep
    if not found:
        raise ValueError(f"benchmarks.tune: no row of a launch table begins with {family!r}")
