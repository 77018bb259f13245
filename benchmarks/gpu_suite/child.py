"""A stage's process: runs its items one by one and records each as it ends (supervise.py).

    python -m benchmarks.gpu_suite.child STAGE PIPE

Its task comes as a line of JSON on stdin, once the stage before is over.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite import records
from benchmarks.gpu_suite.plan import DALI, SIZES, STAGES, Item, Record
from benchmarks.gpu_suite.supervise import POISONED

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """An orphan would measure beside its successor."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(stage: str, pipe: int) -> int:
    die_with_parent()

    def tell(**message: Any) -> None:
        os.write(pipe, (json.dumps(message) + "\n").encode())

    module = next(s.module for s in (*STAGES, DALI) if s.name == stage)
    items_of = importlib.import_module(f"benchmarks.gpu_suite.{module}").items
    line = sys.stdin.readline()
    if not line:
        return 0
    task = json.loads(line)
    out, size, context = Path(task["out"]), SIZES[task["size"]], task["context"]
    print(f"==== {stage}", flush=True)
    if not context:
        import torch

        from benchmarks.run import environment

        context = environment(torch.device(size.device))
        tell(context=context)
    known = records.ended(records.load(out), stage, context, task["since"])
    due: list[Item] = [item for item in items_of(stage, size, out) if item.key not in known]
    tell(due=[item.key for item in due])
    for item in due:
        if task["ends"] - time.monotonic() < item.estimate:
            tell(left=item.key)
            continue
        tell(begin=item.key, limit=item.limit, logged=os.fstat(2).st_size)
        went_well = run_item(item, out, {"stage": stage, "item": item.key}, context)
        tell(end=item.key)
        if size.device == "cuda" and not clean_device(went_well):
            return POISONED
    return 0


def run_item(item: Item, out: Path, name: Record, context: Record) -> bool:
    """Record what an item yields, then its end with how long it took and, where it failed, why;
    return whether it went well.
    """
    began, problem = time.monotonic(), {}
    print(f"---- {item.key}", flush=True)
    try:
        for record in item.run():
            records.append(out, [name | record | context | {"utc": records.now()}])
            if "problem" in record:
                problem = {"problem": record["problem"]}
    except Exception as error:
        traceback.print_exc()
        problem = {
            "problem": f"{type(error).__name__}: {error}".split("\n")[0],
            "stderr": traceback.format_exc(),
        }
    end = {"failed": bool(problem), **problem, "seconds": round(time.monotonic() - began, 2)}
    records.append(out, [name | end | context | {"utc": records.now()}])
    return not problem


def clean_device(went_well: bool) -> bool:
    """Give back what an item held; False where CUDA answers with an error for ever after."""
    if "torch" not in sys.modules:
        return True
    import torch

    gc.collect()
    torch._dynamo.reset()  # or the recompile limit turns the next rival into eager
    if not torch.cuda.is_initialized():
        return True
    with contextlib.suppress(RuntimeError):
        if not went_well:
            torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
