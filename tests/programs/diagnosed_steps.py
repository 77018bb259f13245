"""Run as a program, in one process or under torchrun: a bad step's diagnosis in many settings.

    diagnosed_steps.py FOLDER OVERRIDES [OVERRIDES ...]

Each OVERRIDES is one trainer's settings, separated by "; ". It takes a step of noise in which the
last rank's sample number 1 of every micro-batch is NaN. The first rank prints a JSON line of each:
the error, and what is in its file.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastrepa.config import load_config
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.runtime.world import destroy_world, init_world
from fastrepa.training.diagnosis import diagnosis
from fastrepa.training.trainer import Trainer
from tests.runs import ROOT, SMALL


def one(world, group, run, overrides):
    config = load_config(ROOT / "configs/quickstart.yaml", [f"run={run}", *SMALL, *overrides])
    trainer = Trainer(config, world)
    latents = trainer.codec.latents

    def poisoned(*args):
        z = latents(*args).clone()
        z[1, 0, 0, 0] = torch.nan if world.rank == world.size - 1 else 0
        return z

    trainer.codec.latents = poisoned
    assert trainer.train_step(RandomBatches(trainer, world.device, trainer.micro))["skipped"] == 1
    run.mkdir(exist_ok=True)
    step = trainer.step
    error = diagnosis(
        trainer.engine.module, trainer.repeats(),
        lambda forward: [f"{forward}-{i}" for i in range(trainer.micro)],
        run=run, step=step, in_row=3, good=run / "checkpoints/step_0000007", world=world,
        group=group,
    )  # fmt: skip
    trainer.engine.destroy()
    return str(error)


def not_json(word):
    raise ValueError(word)


def main():
    folder, *settings = sys.argv[1:]
    world = init_world()
    group = dist.new_group(backend="gloo")
    for number, overrides in enumerate(settings):
        run = Path(folder) / str(number)
        error = one(world, group, run, overrides.split("; "))
        gc.collect()
        everyone = [None] * world.size
        dist.all_gather_object(everyone, error)
        assert set(everyone) == {error}
        if world.is_rank_0:
            (file,) = run.iterdir()
            told = json.loads(file.read_text(), parse_constant=not_json)
            print(json.dumps({"error": error, "file": file.name, **told}), flush=True)
    destroy_world()


if __name__ == "__main__":
    main()
