"""`fastrepa` with a fault planted in one rank: FAULT="KIND RANK STEP [STEP ...]", steps from 0.

nan: the first sample's latent. loss: the loss, not its gradients. raise: an error in mid-step;
kill, stop, usr1: that signal to itself. sleep: half a minute.
"""

import os
import signal
import time

import torch

from fastrepa.cli import main
from fastrepa.training.trainer import Trainer

kind, rank, *steps = os.environ["FAULT"].split()


def act(trainer, z):
    if trainer.world.rank != int(rank) or str(trainer.step) not in steps:
        return z
    if kind == "nan":
        z = z.clone()
        z[0, 0, 0, 0] = torch.nan
    elif kind == "raise":
        raise ValueError("planted")
    elif kind == "sleep":
        time.sleep(30)
    elif kind in ("kill", "stop", "usr1"):
        numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "usr1": signal.SIGUSR1}
        os.kill(os.getpid(), numbers[kind])
    return z


def plant(trainer, *args, **kwargs):
    forward, latents = trainer.forward_losses, trainer.codec.latents

    def faulty_forward(batch, samples):
        losses = forward(batch, samples)
        if kind == "loss" and trainer.world.rank == int(rank) and str(trainer.step) in steps:
            # Infinite itself, with every gradient as it was.
            losses["loss"] = losses["loss"] + torch.tensor(torch.inf)
        return losses

    trainer.forward_losses = faulty_forward
    trainer.codec.latents = lambda *a: act(trainer, latents(*a))
    return train(trainer, *args, **kwargs)


train, Trainer.train = Trainer.train, plant
main()
