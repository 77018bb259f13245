"""`fastrepa bench`: the training step against its rivals, same weights and batch, in one run.

Contenders, each turn a process of its own, the turns alternating round by round:
    ours             the configuration as it is
    ours+recompute   with training.recompute=1
    ours+compile     with training.compile=blocks
    ours+graphs      with training.compile=graphs and vision.compile=graphs, on a GPU
    eager            the eager twins of our kernels, in the same engine
    eager+compile    those under torch.compile: what a good engineer would try first
    reference        the published algorithm (reference_step.py), under autocast in fp16 and bf16
Batches are noise, made once and held in memory, and weights are random: what is read and what is
drawn does not change what a step costs. No time is reported for a contender whose losses are not
those of the others. Sampling is measured with the generator alone.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastrepa.config import Config
from fastrepa.errors import ConfigError, FastrepaError, nearest
from fastrepa.insight.bench_turn import MARK
from fastrepa.training.launch import outside_the_world
from fastrepa.training.telemetry import git_state, versions

RIVALS = (
    "ours+recompute", "ours+compile", "ours+graphs", "eager", "eager+compile", "reference",
)  # fmt: skip
PRECISIONS = ("fp32", "bf16", "fp16")
SAMPLERS = {"ode": 50, "sde": 250}
GUIDANCE = 1.8
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Of the losses, relative to the first contender's in float32, or in the lowest precision run."""
FILE = "bench.jsonl"
"""Of this process; a turn is a world of its own."""


@dataclass(frozen=True)
class Case:
    """What one turn runs; sampler is '' for training, else as `ode-50`."""

    contender: str
    precision: str
    batch: int
    ranks: int = 1
    sampler: str = ""

    @property
    def group(self) -> tuple[str, str, int, int]:
        """Cases of one group are compared with each other."""
        return self.sampler, self.precision, self.batch, self.ranks


@dataclass
class Result:
    """What the turns of one case gave; bytes are of the fullest moment of a step."""

    case: Case
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    line: str = ""
    problem: str = ""

    def milliseconds(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    @property
    def median(self) -> float:
        """Milliseconds."""
        return 1000 * statistics.median(self.seconds)

    @property
    def images_per_s(self) -> float:
        return 1000 * self.case.batch / self.median

    @property
    def above_weights(self) -> int | None:
        """Bytes of the fullest moment beside the float32 weights that every contender trains."""
        if "peak_bytes" not in self.memory:
            return None
        return self.memory["peak_bytes"] - 4 * self.memory["parameters"]


def bench(
    config: Config,
    *,
    against: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
    ranks: Sequence[int] = (1,),
    sampling: bool = False,
    rounds: int = 3,
    steps: int = 3,
    warmup: int = 1,
    out: Path,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[Result]:
    """Run all cases, `rounds` turns each, and append their records to out/bench.jsonl.

    Raises ConfigError for options that are not allowed, FastrepaError where a turn fails.
    """
    cases = plan_cases(against, precisions, batches, ranks, sampling)
    for option, value in (("--rounds", rounds), ("--steps", steps), ("--warmup", warmup)):
        if value < 1:
            raise ConfigError(f"{option}: {value} is not 1 or more")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out: {out}: cannot be written ({e.strerror})") from None
    results = {case: Result(case) for case in cases}
    for number in range(rounds):
        for place, case in enumerate(cases):
            progress(_label(case), (number * len(cases) + place) / (rounds * len(cases)))
            result = results[case]
            if result.problem:
                continue
            timed = {"steps": steps, "warmup": warmup, "memory": number == 0}
            turn = _turn(config, case, timed)
            if turn.get("does_not_fit"):
                result.problem = "does not fit"
                continue
            result.seconds += turn["seconds"]
            result.line = turn["line"] or result.line
            result.losses = turn.get("losses", [])
            result.memory |= {k: v for k, v in turn.items() if k.endswith(("bytes", "parameters"))}
    finished = list(results.values())
    mark_wrong(finished)
    context = {
        **versions(),
        **{f"git_{key}": value for key, value in git_state().items()},
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "run": finished[0].line,
    }
    with (out / FILE).open("a", encoding="utf-8") as file:
        for result in finished:
            file.write(json.dumps(record(result) | context) + "\n")
    return finished


def plan_cases(
    against: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
    ranks: Sequence[int],
    sampling: bool,
) -> list[Case]:
    """All turns of a round, in their order."""
    for option, given, allowed in (
        ("--against", against, RIVALS),
        ("--precision", precisions, PRECISIONS),
    ):
        for value in given:
            if value not in allowed:
                raise ConfigError(
                    f"{option}: {value!r} is not one of {', '.join(allowed)}"
                    f"{nearest(value, allowed)}"
                )
    if "ours+graphs" in against and not torch.cuda.is_available():
        raise ConfigError("--against: 'ours+graphs' needs a GPU, which is not here")
    for option, numbers in (("--batch", batches), ("--ranks", ranks)):
        for number in numbers:
            if number < 1:
                raise ConfigError(f"{option}: {number} is not 1 or more")
    for batch in batches:
        for world in ranks:
            if batch % world:
                raise ConfigError(f"--batch: {batch} is not divisible by {world} ranks")
    cases = []
    for precision in dict.fromkeys(precisions):
        for batch in dict.fromkeys(batches):
            for world in dict.fromkeys(ranks):
                for name in ("ours", *dict.fromkeys(against)):
                    if name == "reference" and world > 1:
                        continue  # it is one process
                    if name != "reference" and precision == "fp16":
                        continue  # the engine trains in fp32 or bf16
                    cases.append(Case(name, precision, batch, world))
    if sampling:
        named = ["ours", *(n for n in against if n not in ("ours+recompute", "reference"))]
        cases += [
            Case(name, precision, batches[0], 1, f"{sampler}-{steps}")
            for precision in precisions
            if precision != "fp16"
            for sampler, steps in SAMPLERS.items()
            for name in named
        ]
    return cases


def mark_wrong(results: Sequence[Result]) -> None:
    """A contender that computes something else gets no time: `problem` says how far off it is."""
    groups: dict[int, float] = {}
    for result in sorted(results, key=lambda r: PRECISIONS.index(r.case.precision)):
        if not result.losses:
            continue
        last = result.losses[-1]
        truth = groups.setdefault(result.case.batch, last)
        off = abs(last - truth) / max(abs(truth), 1e-12)
        if not off <= TOLERANCES[result.case.precision]:
            result.problem = f"wrong: its loss is {last:.6g}, not {truth:.6g}"


def record(result: Result) -> dict[str, Any]:
    """One JSON line; times in milliseconds."""
    tree: dict[str, Any] = {"case": "sampling" if result.case.sampler else "training_step"}
    tree |= asdict(result.case)
    if result.problem:
        return tree | {"problem": result.problem}
    tree |= {f"p{q}_ms": result.milliseconds(q / 100) for q in (20, 80)}
    tree |= {"p50_ms": result.median, "n": len(result.seconds)}
    tree |= {"images_per_s": result.images_per_s, **result.memory}
    if result.above_weights is not None:
        tree["peak_above_weights_bytes"] = result.above_weights
    return tree | ({"last_loss": result.losses[-1]} if result.losses else {})


def _turn(config: Config, case: Case, timed: dict[str, Any]) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    tree["training"] |= {"global_batch": case.batch, "micro_batch": None}
    if case.sampler:
        sampler, steps = case.sampler.split("-")
        tree["sample"] |= {"sampler": sampler, "steps": int(steps), "cfg": GUIDANCE}
    task = {"config": tree, **asdict(case), **timed}
    start = [sys.executable]
    if case.ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    environment = outside_the_world() | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*start, "-m", "fastrepa.insight.bench_turn", json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise FastrepaError(f"{_label(case)}: the turn failed: {said[-1] if said else 'no output'}")
    return dict(json.loads(lines[-1].removeprefix(MARK)))


def _label(case: Case) -> str:
    what = f"{case.contender} {case.precision} b{case.batch}"
    return (
        what
        + (f" {case.sampler}" if case.sampler else "")
        + (f" x{case.ranks}" if case.ranks > 1 else "")
    )


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()
