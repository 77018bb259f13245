"""The kit on a CPU, at toy shapes, with what can go wrong; `make gpu-rehearsal`.

    python -m benchmarks.gpu_suite.rehearsal [--seed 0] [--kills 3] [--wheels FOLDER]

Runs `python -m benchmarks.gpu_suite --rehearse` as a borrowed machine would: on a copy of the tree
without .git, with no git to be found, and what the wheels bring installed into a folder. Then with
everything killed at random moments and resumed; with a stage's own process killed; without
DeepSpeed. In each a contender fails and one takes longer than it may. After each the records that
were due must be there: of every item one end, and where it failed all that it said.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from benchmarks.common import command_line
from benchmarks.gpu_suite import records
from benchmarks.gpu_suite.plan import STAGES, TOY, Record
from benchmarks.gpu_suite.wheels import INSTALL
from benchmarks.provenance import CODE, COMMIT, ROOT, WHEELS, provenance

MARK = "FASTREPA_REHEARSAL"
"""In the environment of every process of a rehearsal, so that all of them can be killed."""
FAILING = "ours, tiny attention.backend=sdpa-cudnn"
LATE = "ours, tiny seed=1"
LIKE_ANOTHER = ("others", "operations")
"""Stages whose control flow another has too: once is enough."""
LONGEST = 900.0


class Rehearsal:
    """One call of the kit after another, in a tree and an environment as a borrowed machine has."""

    def __init__(self, work: Path, stages: Sequence[str], wheels: Path | None) -> None:
        self.work, self.stages = work, list(stages)
        self.tree = work / "tree"
        for name in (*CODE, "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                junk = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(source, self.tree / name, ignore=junk)
            else:
                shutil.copy(source, self.tree / name)
        (self.tree / WHEELS).mkdir()
        (self.tree / COMMIT).write_text(json.dumps(provenance()))
        self.site = work / "site"
        self.site.mkdir()
        if wheels is not None:
            files = map(str, sorted(wheels.glob("*.whl")))
            subprocess.run([sys.executable, "-m", "pip", *INSTALL, self.site, *files], check=True)

    def environment(self) -> dict[str, str]:
        """Return this environment, with no git to be found and one thread a process."""
        programs = self.work / "programs"
        if not programs.exists():
            programs.mkdir()
            python = str(Path(sys.executable).parent)
            for folder in (python, *os.environ["PATH"].split(os.pathsep)):
                for program in Path(folder).glob("*"):
                    if program.name != "git" and not (programs / program.name).exists():
                        (programs / program.name).symlink_to(program)
        return os.environ | {
            "PATH": str(programs), "PYTHONPATH": str(self.site), MARK: str(self.work),
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip

    def start(self, out: Path, *options: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--rehearse", "--out", str(out)]
        command += ["--cache", str(self.work / "cache"), "--minutes", "15", *options]
        return subprocess.Popen(
            [*command, "--only", *self.stages], cwd=self.tree, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=self.environment() | variables,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Return what it printed. Raises AssertionError where it does not end well."""
        try:
            said = process.communicate(timeout=LONGEST)[0]
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"not over after {LONGEST:g} s") from None
        assert process.returncode == 0, f"ended with {process.returncode}:\n{said}"
        return said

    def processes(self) -> Iterator[int]:
        """All that this rehearsal started and that run, whoever is their parent now."""
        mark = f"{MARK}={self.work}".encode()
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and mark in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)
            except OSError:  # over in the meantime, or another user's
                continue

    def kill_all(self) -> None:
        """Kill everything at once, with no chance to write, as the end of a machine's time does."""
        while found := list(self.processes()):
            for pid in found:
                kill(pid)
            time.sleep(0.05)

    def stage_processes(self) -> Iterator[int]:
        """Return the processes of the stage that runs, and of the next, which waits."""
        for pid in self.processes():
            with suppress(OSError):
                if b"benchmarks.gpu_suite.child\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield pid

    def wait_for(self, process: subprocess.Popen[str], out: Path, items: int) -> None:
        """Wait until so many items have begun, or it is over."""
        while process.poll() is None and _begun(out) < items:
            time.sleep(0.02)


def _begun(out: Path) -> int:
    log = out / records.LOG
    return log.read_text(errors="replace").count("\n---- ") if log.exists() else 0


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def check(out: Path, stages: Sequence[str], *, also_failed: Sequence[str] = ()) -> list[Record]:
    """Every due item of `stages` has an end, a failure all that it said; return the records.

    also_failed: items that had to fail beside those that always do.
    """
    found = records.load(out)
    ends = {(r["stage"], r["item"]): r for r in found if "seconds" in r}
    for stage in stages:
        summary = [r for r in found if r["stage"] == stage and "took" in r]
        assert summary, f"{stage}: has no end"
        due = {item for r in summary for item in r["due"]} | {
            item for s, item in ends if s == stage and item
        }
        assert due, f"{stage}: nothing was due"
        missing = [item for item in due if (stage, item) not in ends]
        assert not missing, f"{stage}: no record of {missing}"
    failed = {item for (_, item), r in ends.items() if r["failed"] and item}
    expected = {*also_failed, *((FAILING, LATE) if "rivals" in stages else ())}
    assert failed == expected, f"failed: {sorted(failed)}; expected: {sorted(expected)}"
    for (stage, item), end in ends.items():
        assert end["git"] == provenance()["git"], f"{stage}: {item}: commit {end['git']}"
        if end["failed"] and item != LATE and "SIGKILL" not in end["problem"]:
            told = [r for r in found if r["stage"] == stage and r.get("item") == item]
            assert any(len(r.get("stderr", "")) > 20 for r in told), f"{item}: said nothing"
    files = [p for p in out.rglob("*") if p.is_file()]
    assert len(files) <= 8, files
    assert max(len(p.relative_to(out).parts) for p in files) <= 2, files
    return found


def whole(rehearsal: Rehearsal) -> None:
    """One undisturbed call; a second that resumes it measures nothing again."""
    out, again = rehearsal.work / "whole", rehearsal.work / "again"
    said = rehearsal.finish(rehearsal.start(out))
    found = check(out, rehearsal.stages)
    assert "FAILED rivals: " + FAILING in said
    rehearsal.finish(rehearsal.start(again, "--resume", str(out)))
    repeated = Counter((r["stage"], r["item"]) for r in check(again, rehearsal.stages)
                       if "seconds" in r)  # fmt: skip
    assert set(repeated.values()) == {1}, repeated
    assert len(repeated) == len({(r["stage"], r["item"]) for r in found if "seconds" in r})


def killed(rehearsal: Rehearsal, kills: int, chance: random.Random) -> None:
    """Everything killed `kills` times, each at a random moment, and resumed."""
    items = _number_of_items(rehearsal.stages)
    before: Path | None = None
    for number in range(kills):
        out = rehearsal.work / f"killed{number}"
        process = rehearsal.start(out, *(["--resume", str(before)] if before else []))
        rehearsal.wait_for(process, out, chance.randrange(1, 1 + items // (kills + 1)))
        time.sleep(chance.uniform(0, 2))
        rehearsal.kill_all()
        process.communicate()
        had = records.load(before) if before else []
        kept = records.load(out)
        assert all(record in kept for record in had), "a kill lost records of before"
        print(f"  killed with {len(kept)} records", flush=True)
        before = out
    out = rehearsal.work / "killed"
    rehearsal.finish(rehearsal.start(out, *(["--resume", str(before)] if before else [])))
    ends = Counter((r["stage"], r["item"]) for r in check(out, rehearsal.stages) if "seconds" in r)
    assert set(ends.values()) == {1}, f"measured again though recorded: {ends.most_common(3)}"


def _number_of_items(stages: Sequence[str]) -> int:
    return sum(
        len(list(import_module(f"benchmarks.gpu_suite.{s.module}").items(s.name, TOY, Path())))
        for s in STAGES if s.name in stages
    )  # fmt: skip


def one_process_killed(rehearsal: Rehearsal, chance: random.Random) -> None:
    """A stage's process dies in the middle of an item, as of a fault of the driver."""
    out = rehearsal.work / "one"
    process = rehearsal.start(out)
    died: list[Record] = []
    while process.poll() is None and not died:
        begun = _begun(out)
        rehearsal.wait_for(process, out, begun + chance.randrange(1, 8))
        for pid in rehearsal.stage_processes():
            kill(pid)
        time.sleep(0.5)
        died = [r for r in records.load(out) if r.get("item") and "SIGKILL" in r.get("problem", "")]
    rehearsal.finish(process)
    died = [r for r in records.load(out) if "SIGKILL" in r.get("problem", "")]
    check(out, rehearsal.stages, also_failed=[r["item"] for r in died if r["item"]])
    print(f"  killed in: {[r['item'] or r['stage'] for r in died]}")


def without_deepspeed(rehearsal: Rehearsal) -> None:
    """The training steps cannot run; everything else does, and they say why."""
    hidden = rehearsal.work / "hidden"
    (hidden / "deepspeed").mkdir(parents=True)
    (hidden / "deepspeed/__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'deepspeed'\")\n"
    )
    out = rehearsal.work / "without"
    path = os.pathsep.join((str(hidden), str(rehearsal.site)))
    rehearsal.finish(rehearsal.start(out, PYTHONPATH=path))
    turns = [t.key for s in rehearsal.stages for t in TOY.turns.get(s, ())]
    found = check(out, rehearsal.stages, also_failed=turns)
    ends = [r for r in found if r.get("item") in turns and "seconds" in r]
    assert len(ends) == len(turns)
    assert all("No module named 'deepspeed'" in r["problem"] for r in ends), ends


def rehearse(work: Path, stages: Sequence[str], wheels: Path | None, kills: int, seed: int) -> None:
    """Everything, one after another; raises AssertionError where a record is missing."""
    rehearsal, chance = Rehearsal(work, stages, wheels), random.Random(seed)
    try:
        for name, part in (
            ("whole, then resumed", lambda: whole(rehearsal)),
            (f"killed {kills} times", lambda: killed(rehearsal, kills, chance)),
            ("one process killed", lambda: one_process_killed(rehearsal, chance)),
            ("without DeepSpeed", lambda: without_deepspeed(rehearsal)),
        ):
            began = time.monotonic()
            print(name, flush=True)
            part()
            rehearsal.stages = [s for s in stages if s not in LIKE_ANOTHER]
            print(f"  as it should be, {time.monotonic() - began:.0f} s", flush=True)
    finally:
        rehearsal.kill_all()


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("gpu_suite.rehearsal", __doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install beside the tree")
    options = parser.parse_args(arguments)
    stages = [stage.name for stage in STAGES]
    with tempfile.TemporaryDirectory(prefix="fastrepa-rehearsal-") as folder:
        rehearse(Path(folder), stages, options.wheels, options.kills, options.seed)
    print("the rehearsal went well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
