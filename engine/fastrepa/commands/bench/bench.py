"""`fastrepa bench`: the training step against its rivals, same weights and batch, in one run.

Contenders, each turn a process of its own, the turns alternating round by round:
    ours             the configuration as it is
    ours+recompute   with training.recompute=1
    ours+compile     with training.compile=blocks
    ours+graphs      with training.compile=graphs and vision.compile=graphs, on a GPU
    eager            the eager twins of our kernels, in the same engine
    eager+compile    those under torch.compile
    plain+compile    a compiled loop without our engine (plain_step.py): what a good engineer writes
    reference        the published algorithm (reference_step.py), under autocast in fp16 and bf16
Batches are noise, made once and held in memory, and weights are random: what is read and what is
drawn does not change what a step costs. No time is reported for a contender whose losses are not
those of the others. Sampling is measured with the generator alone.

Every turn is a line of TURNS as soon as it ends, so that a kill loses at most the turn in progress;
`gather` makes results of such lines, which FILE has when all turns are done. A turn that fails is a
line with its `problem` and its whole `stderr`, and the others go on.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from fastrepa.commands.bench.turn import DOES_NOT_FIT, MARK
from fastrepa.config import Config
from fastrepa.data.datasets import with_classes
from fastrepa.errors import ConfigError, DataError, nearest, writing
from fastrepa.reading.text import parse_json
from fastrepa.runtime.files import append_lines
from fastrepa.runtime.world import outside_the_world
from fastrepa.training.telemetry import git_state, versions

RIVALS = (
    "ours+recompute", "ours+compile", "ours+graphs", "eager", "eager+compile", "plain+compile",
    "reference",
)  # fmt: skip
DEFAULT_RIVALS = RIVALS[3:]
ALONE = ("plain+compile", "reference")  # loops of one process
TRAIN_ONLY = ("ours+recompute", *ALONE)  # they sample as another contender does
PRECISIONS = ("fp32", "bf16", "fp16")
SAMPLERS = {"ode": 50, "sde": 250}
GUIDANCE = 1.8
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Of the losses, relative to the first contender's in float32, or in the lowest precision run."""
FILE, TURNS = "bench.jsonl", "bench.turns.jsonl"
PROGRAM = "fastrepa.commands.bench.turn"
GRACE = 10.0
"""Seconds between the request to end and the kill: torchrun ends its ranks in them."""


@dataclass(frozen=True)
class BenchCase:
    """One turn's contender and setting; sampler is '' for training, else as `ode-50`."""

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
    """One case's measures over its turns; bytes are of the fullest moment of a step.

    seconds: of each step or, where `timing` says so, the mean of each turn. problem, '' where there
    is none: why it has no time; unfinished: why it has nothing but that; stderr: all that the turn
    said which failed.
    """

    case: BenchCase
    seconds: list[float] = field(default_factory=list)
    timing: str = ""
    losses: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    line: str = ""
    problem: str = ""
    unfinished: str = ""
    stderr: str = ""

    @property
    def failed(self) -> bool:
        """Tell whether something broke; what does not fit into memory is a measurement."""
        return bool(self.problem) and self.problem != DOES_NOT_FIT

    def milliseconds(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    @property
    def median(self) -> float:
        """The median time, in milliseconds."""
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
    """Run all cases, `rounds` turns each; what each turn gave is appended to out/bench.turns.jsonl
    as it ends, and the cases' records to out/bench.jsonl.

    A case whose turn failed has its `problem` and takes no further turns. Raises ConfigError for
    options that are not allowed.
    """
    cases = plan_cases(against, precisions, batches, ranks, sampling)
    for option, value in (("--rounds", rounds), ("--steps", steps), ("--warmup", warmup)):
        if value < 1:
            raise ConfigError(f"{option}: {value} is not 1 or more")
    config = with_classes(config)
    with writing(f"--out: {out}"):
        out.mkdir(parents=True, exist_ok=True)
    turns: list[dict[str, Any]] = []
    failed: set[BenchCase] = set()
    for number in range(rounds):
        for place, case in enumerate(cases):
            progress(label(case), (number * len(cases) + place) / (rounds * len(cases)))
            if case in failed:
                continue
            turn = run_turn(config, case, steps=steps, warmup=warmup, memory=number == 0)
            if "problem" in turn:
                failed.add(case)
            turns.append(asdict(case) | turn)
            append_lines(out / TURNS, turns[-1:])
    results = gather(turns)
    described = context() | {"run": results[0].line}
    append_lines(out / FILE, [record(result) | described for result in results])
    return results


def gather(turns: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Results of turns, each what `run_turn` gave beside its case's fields (a line of TURNS), in
    the order in which their cases come first; contenders that compute something else are marked.
    """
    results: dict[BenchCase, Result] = {}
    for turn in turns:
        case = BenchCase(**{f.name: turn[f.name] for f in fields(BenchCase)})
        result = results.setdefault(case, Result(case))
        if "problem" in turn:
            result.problem, result.stderr = turn["problem"], turn["stderr"]
            continue
        if "unfinished" in turn:
            result.unfinished, result.stderr = turn["unfinished"], turn["stderr"]
        result.seconds += turn["seconds"]
        result.timing = turn["timing"]
        result.line = turn["line"] or result.line
        result.losses = turn.get("losses", [])
        result.memory |= {k: v for k, v in turn.items() if k.endswith(("bytes", "parameters"))}
    finished = list(results.values())
    mark_wrong(finished)
    return finished


def context() -> dict[str, Any]:
    """Return what every record of a bench says of where and when it was made."""
    return {
        **versions(),
        **{f"git_{key}": value for key, value in git_state().items()},
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": _device(),
        "threads": torch.get_num_threads(),
    }


def plan_cases(
    against: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
    ranks: Sequence[int],
    sampling: bool,
) -> list[BenchCase]:
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
                    if name in ALONE and world > 1:
                        continue
                    if name != "reference" and precision == "fp16":
                        continue  # the engine trains in fp32 or bf16
                    cases.append(BenchCase(name, precision, batch, world))
    if sampling:
        named = ["ours", *(n for n in against if n not in TRAIN_ONLY)]
        cases += [
            BenchCase(name, precision, batches[0], 1, f"{sampler}-{steps}")
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
        if not result.losses or result.problem:
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
        return tree | {"problem": result.problem, "stderr": result.stderr}
    if result.unfinished:
        tree |= {"unfinished": result.unfinished, "stderr": result.stderr}
    tree |= {"timing": result.timing}
    tree |= {f"p{q}_ms": result.milliseconds(q / 100) for q in (20, 80)}
    tree |= {"p50_ms": result.median, "n": len(result.seconds)}
    tree |= {"images_per_s": result.images_per_s, **result.memory}
    if result.above_weights is not None:
        tree["peak_above_weights_bytes"] = result.above_weights
    return tree | ({"last_loss": result.losses[-1]} if result.losses else {})


def run_turn(
    config: Config,
    case: BenchCase,
    *,
    steps: int,
    warmup: int,
    memory: bool = False,
    profile: bool = False,
    timeout: float | None = None,
) -> dict[str, Any]:
    """One turn of one contender, in a process (or ranks) of its own; what it measured.

    steps are timed after `warmup` of them. memory: also `peak_bytes`, of one more step; profile:
    also `profile`, of PROFILED more (profiling/activity.py); neither while sampling. A turn that
    fails, or takes more than `timeout` seconds and is ended with all that it started, is
    {"problem": one line, "stderr": all of it}; where its times were known by then, these, with
    "unfinished" for "problem".
    """
    task = {"config": _turn_config(config, case), **asdict(case), "steps": steps}
    task |= {"warmup": warmup, "memory": memory, "profile": profile}
    start = [sys.executable]
    if case.ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    start += ["-m", PROGRAM, json.dumps(task)]
    environment = outside_the_world() | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    # Files, not pipes: what a turn leaves running cannot keep them from being read.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        turn = subprocess.Popen(
            start, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment,
            start_new_session=True,
        )  # fmt: skip
        late = ""
        try:
            turn.wait(timeout)
        except subprocess.TimeoutExpired:
            late = f"ended after {timeout:g} s"
        finally:
            _end(turn)
        out.seek(0)
        err.seek(0)
        said, stderr = (file.read().decode(errors="replace") for file in (out, err))
    results = list(_results(said))
    result = results[-1] if results else {}
    if result and not turn.returncode and not late:
        return result
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    problem = late or result.get("problem") or (lines[-1] if lines else "no output")
    if turn.returncode < 0 and not late:
        problem = f"killed by signal {-turn.returncode}"
    timed = next((r for r in reversed(results) if "seconds" in r), None)
    if timed is not None:
        return timed | {"unfinished": problem, "stderr": stderr}
    return {"problem": problem, "stderr": stderr}


def _results(said: str) -> Iterator[dict[str, Any]]:
    for line in said.splitlines():
        if line.startswith(MARK):
            with suppress(DataError):  # a kill cut it in two
                yield parse_json(line.removeprefix(MARK), PROGRAM)


def _turn_config(config: Config, case: BenchCase) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    tree["training"] |= {"global_batch": case.batch, "micro_batch": None}
    if case.sampler:
        sampler, steps = case.sampler.split("-")
        tree["sample"] |= {"sampler": sampler, "steps": int(steps), "cfg": GUIDANCE}
    return tree


def _end(turn: subprocess.Popen[bytes]) -> None:
    """End a turn that still runs, and what its group has left."""
    if turn.poll() is None:
        os.killpg(turn.pid, signal.SIGTERM)  # torchrun ends its ranks, which are not of its group
        with suppress(subprocess.TimeoutExpired):
            turn.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(turn.pid, signal.SIGKILL)
    turn.wait()
    assert turn.stdin is not None
    turn.stdin.close()


def label(case: BenchCase) -> str:
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
