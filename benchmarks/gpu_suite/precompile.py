"""Compiles the candidates of the launch tables' sweeps into the cache, while others are checked.

    python -m benchmarks.gpu_suite.precompile SIZE NUMBER OF

One of several processes: it launches every OF-th candidate once. What does not launch is the
sweep's to record (operations.py).
"""

from __future__ import annotations

import contextlib
import sys

import torch

from benchmarks import tune
from benchmarks.gpu_suite.child import die_with_parent
from benchmarks.gpu_suite.operations import sweeps
from benchmarks.gpu_suite.plan import SIZES


def main(name: str, number: int, of: int) -> int:
    die_with_parent()
    size = SIZES[name]
    for family in size.families:
        for sweep in sweeps(family, size):
            for candidate in sweep.candidates[number::of]:
                with (
                    contextlib.suppress(*tune.DO_NOT_LAUNCH),
                    tune.using(sweep.table, sweep.key, candidate),
                ):
                    sweep.work()
            if size.device == "cuda":
                torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
