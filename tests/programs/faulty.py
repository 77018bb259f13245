"""`fastrepa` with faults planted in it: FAULT="KIND RANK WHEN [WHEN ...][; ...]".

WHEN is a step, from 0; `build`, while the engine is built; or `last`, as the last save begins.
nan: the first sample's latent. loss: the loss, not its gradients. raise: an error; kill, stop,
usr1: that signal to itself. sleep: six seconds.
"""

import os
import signal
import time

import torch

from fastrepa.cli import main
from fastrepa.training import trainer as training
from fastrepa.training.run import Run

FAULTS = [fault.split() for fault in os.environ["FAULT"].split(";")]
NUMBERS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "usr1": signal.SIGUSR1}


def due(rank, when):
    return [kind for kind, at, *times in FAULTS if int(at) == rank and str(when) in times]


def act(rank, when):
    for kind in due(rank, when):
        if kind == "raise":
            raise ValueError("planted")
        if kind == "sleep":
            time.sleep(6)
        if kind in NUMBERS:
            os.kill(os.getpid(), NUMBERS[kind])


def plant(run, *args, **kwargs):
    trainer = run.trainer
    forward, latents, save = trainer.forward_losses, trainer.codec.latents, run.save
    rank = trainer.world.rank

    def faulty_latents(*a):
        act(rank, trainer.step)
        z = latents(*a)
        if "nan" in due(rank, trainer.step):
            z = z.clone()
            z[0, 0, 0, 0] = torch.nan
        return z

    def faulty_forward(batch, samples, targets=None):
        losses = forward(batch, samples, targets)
        if "loss" in due(rank, trainer.step):
            # Infinite itself, with every gradient as it was.
            losses["loss"] = losses["loss"] + torch.tensor(torch.inf)
        return losses

    def faulty_save(**options):
        if options.get("wait"):
            act(rank, "last")
        return save(**options)

    trainer.forward_losses, trainer.codec.latents = faulty_forward, faulty_latents
    run.save = faulty_save
    return train(run, *args, **kwargs)


def faulty_start(model, config, world):
    act(world.rank, "build")
    return start_engine(model, config, world)


train, Run.train = Run.train, plant
start_engine, training.start_engine = training.start_engine, faulty_start
main()
