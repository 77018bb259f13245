"""Kills placed at every write of a run: in a step, in a save, in its start and its end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults.processes import ROOT, TINY
from fastrepa.runtime.world import outside_the_world

LIBRARY, HOOKS = "a library loaded before libc", "audit hooks of Python: no C compiler was found"


def compiled(folder: Path) -> str:
    """Compile placed.c; returns the library's path, "" where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    library = folder / "placed.so"
    if not compiler or sys.platform != "linux":
        return ""
    source = Path(__file__).with_name("placed.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return str(library)


def placed(
    folder: Path,
    *,
    ranks: int = 1,
    most: int = 0,
    each_call_once: bool = False,
    together: float = 0.75,
    jobs: int = 1,
    seed: int = 0,
    hooks: bool = False,
) -> dict[str, Any]:
    """Kill a small run at the writes of its first rank, and of its last; what came of each.

    most: so many places of both together, spread evenly; 0 for every one. together: the share of
    kills that all ranks die of. hooks: do without the library. Raises RuntimeError where the run
    itself fails.
    """
    began = time.monotonic()
    folder.mkdir(parents=True)
    library = "" if hooks else compiled(folder)
    ask, result = folder / "ask.json", folder / "result.json"
    ask.write_text(json.dumps({
        "arguments": [*TINY, *(["zero.stage=2"] if ranks > 1 else [])], "ranks": ranks,
        "victims": sorted({0, ranks - 1}), "library": library, "most": most, "seed": seed,
        "each_call_once": each_call_once, "together": together, "jobs": jobs,
    }))  # fmt: skip
    environment = outside_the_world() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults.lives", str(ask), str(result)], cwd=ROOT,
        env=environment | ({"LD_PRELOAD": library} if library else {}),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found = json.loads(result.read_text())
    lives = found["lives"]
    resumed = [life for life in lives if not any(life["codes_again"])]
    return {
        "by": LIBRARY if library else HOOKS,
        "ranks": ranks,
        "places": sum(map(len, found["writes"])),
        "calls": dict(Counter(line.split()[0] for rank in found["writes"] for line in rank)),
        "count": len(lives),
        "right": sum(life["right"] for life in lives),
        "reached": sum(life["reached"] for life in lives),
        "resumed": len(resumed),
        "same_bits": sum(not life["different"] and life["same_losses"] for life in resumed),
        "steps_lost_most": max(life["step"] - life["saved"] for life in lives),
        "left": sorted({name for life in resumed for name in life["left"]}),
        "tensors": found["tensors"],
        "seconds": time.monotonic() - began,
        "lives": lives,
    }
