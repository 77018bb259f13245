"""Run under torchrun: every process's part of a sampling into each FOLDER, from a fake run.

sampling_ranks.py REPORT FOLDER [FOLDER ...]: the lines of rank N are left in REPORT + N, as a
shared pipe mixes lines.
"""

import os
import sys

from fastrepa.checkpoint import choice
from fastrepa.errors import FastrepaError
from fastrepa.generation import sample as room
from tests.generation.tiny import fake_run

plain, drawn = room.generate, []


def counting(*args, sample_ids, **kwargs):
    drawn.extend(sample_ids.tolist())
    return plain(*args, sample_ids=sample_ids, **kwargs)


def answer(out):
    try:
        result = room.sample_run("run", out, num=10, batch_size=4, npz=True, seed=7)
    except FastrepaError as error:
        return f"refused: {error}"
    return f"{result.is_rank_0} {drawn} {result.npz}"


if __name__ == "__main__":
    report, *folders = sys.argv[1:]
    choice.load_ema_model = fake_run
    choice.fingerprint = lambda run, step: f"{run} {step}"
    room.generate = counting
    with open(report + os.environ["RANK"], "w") as file:
        print(*map(answer, folders), sep="\n", file=file)
