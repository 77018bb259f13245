"""A step's draws: a few launches on a GPU, and the same bits on every path."""

import pytest
import torch

from fastrepa.config import load_config
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.training.trainer import Trainer
from fastrepa_kernels import launch
from tests.launches import SYNC, counted, interpreted
from tests.runs import ROOT, SMALL

MOST = 12  # launches of all random draws of a micro-batch
KERNEL = "_keyed_random_kernel"


@pytest.fixture(scope="module")
def trainer(world):
    config = load_config(
        ROOT / "configs/quickstart.yaml",
        ["run=nowhere", *SMALL, "training.micro_batch=4", "kernels=eager", "vision.encoders=[]"],
    )
    return Trainer(config, world)


@interpreted
@pytest.mark.parametrize(
    "time",
    [
        {"time": "uniform"},
        {"time": "lognormal", "path": "linear", "time_mean": -0.3},
        {"time": "lognormal", "path": "cosine", "time_std": 1.5},
    ],
)
def test_the_draws_are_few_launches_with_the_bits_of_the_cpu(trainer, monkeypatch, time):
    objective = trainer.config.objective.model_copy(update=time)
    config = trainer.config.model_copy(update={"objective": objective})
    monkeypatch.setattr(trainer, "config", config)
    monkeypatch.setattr(trainer.codec, "stochastic", True)
    monkeypatch.setattr(trainer, "step", 123_456)
    expected = trainer.draws(trainer.sample_numbers(1))
    with launch.backend("triton"), counted() as launches:
        draws = trainer.draws(trainer.sample_numbers(1))
    assert len(launches) <= MOST, launches
    assert launches.count(KERNEL) == 4
    assert SYNC not in launches
    assert all(map(torch.equal, draws, expected))


@interpreted
def test_a_forward_draws_nothing_else_and_reads_nothing(trainer):
    batch = next(RandomBatches(trainer, trainer.world.device, trainer.micro))
    with launch.backend("triton"), counted() as launches:
        trainer.forward_losses(batch, trainer.sample_numbers(0))
    drawn = [name for name in launches if "rand" in name or "bernoulli" in name]
    assert drawn == [KERNEL] * 3  # pixels are no sample of a posterior
    assert SYNC not in launches
