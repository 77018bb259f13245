"""Run as a program under torchrun: the same run without evaluation and with it, one after another.

evaluated_runs.py FOLDER: leaves FOLDER/plain and FOLDER/evaluated, both under ZeRO stage 3,
FOLDER/validation.statistics, and FOLDER/stopped, whose second rank has a signal while it measures.
"""

import signal
import sys
from pathlib import Path

import torch

from fastrepa.commands.evaluate.during_training import RunEvaluator
from fastrepa.commands.evaluate.metrics import Moments
from fastrepa.config import load_config
from fastrepa.runtime.exit_codes import REQUEUE
from fastrepa.runtime.signals import StopSignals
from fastrepa.runtime.survival import watched
from fastrepa.runtime.world import destroy_world, init_world
from fastrepa.training.run import Run
from tests.runs import ROOT, SMALL

STEPS, NUM = 6, 10
EVALUATED = [
    "evaluation.every=2", f"evaluation.num={NUM}", "evaluation.batch_size=4",
    "evaluation.encoders=[{name: resnet10t, weights: random, input: 32}]",
    "evaluation.metrics=[fd_resnet10t, kd_resnet10t]", "training.tensorboard=true",
    "training.keep_checkpoints=1", "training.keep_best={metric: fd_resnet10t, mode: max}",
    "training.checkpoint_every=0",  # so what is kept beside the last was saved as the best
]  # fmt: skip


def merge_moments(world):
    """Sets of unlike size and place on two ranks are the moments of all of them on both."""
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double() + 40
    parts = [x[:20], x[20:] + 3]
    moments = Moments.empty(5)
    moments.update(parts[world.rank])
    moments.merge_ranks()
    whole = torch.cat(parts)
    assert moments.count == 30
    assert torch.allclose(moments.covariance, torch.cov(whole.T), rtol=1e-9)
    assert torch.allclose(moments.mean, whole.mean(0), rtol=1e-12)


SIGNALS = StopSignals()


class Signalled(RunEvaluator):
    def scores(self, model, *, alive):
        if self.world.rank == 1:
            SIGNALS.asked = signal.SIGTERM
        return super().scores(model, alive=alive)


def main(folder):
    world = init_world()
    merge_moments(world)
    if world.is_rank_0:
        (folder / "validation").symlink_to(ROOT / "configs/quickstart/emoji/validation")
    for name, settings in (("plain", []), ("evaluated", EVALUATED), ("stopped", EVALUATED)):
        config = load_config(ROOT / "configs/quickstart.yaml", [
            f"run={folder / name}", *SMALL, f"training.steps={STEPS}", "zero.stage=3",
            "training.log_every=3", f"evaluation.reference={folder / 'validation'}", *settings,
        ])  # fmt: skip
        with watched(Path(config.run), config.survival, world) as watch:
            evaluator, signals = RunEvaluator, None
            if name == "stopped":
                evaluator, signals = Signalled, SIGNALS
            code = Run(config, world, watch.group, evaluator=evaluator).train(watch, signals)
            assert code == (REQUEUE if signals else 0)
    destroy_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
