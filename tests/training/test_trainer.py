"""The recipe in closed form: rates, times, dropped labels, the loss, and which keys change it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastrepa.config import config_from_dict, load_config, save_config
from fastrepa.errors import ConfigError
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.training.messages import warn_of_changes
from fastrepa.training.schedule import learning_rate
from fastrepa.training.trainer import Trainer
from tests.runs import ROOT, SMALL

QUICKSTART = ROOT / "configs/quickstart.yaml"
MANY = torch.arange(8192)  # samples
SIGMAS = 4.5  # the draws are keyed: what passes once passes always


@pytest.fixture(scope="module")
def trainer(world):
    """A trainer of 4 x 4 pixels, aligned to stored features: nothing of an encoder is built."""
    config = load_config(
        QUICKSTART,
        ["run=nowhere", *SMALL, "training.micro_batch=4", "kernels=eager", "data.codec.side=4",
         "model.patch=2", "vision.targets=cached", "vision.encoders.0.grid=area"],
    )  # fmt: skip
    return Trainer(config, world)


def changed(config, section, **values):
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


# The rate ---------------------------------------------------------------------------------------


def rates(steps, **schedule):
    tree = {
        "run": "nowhere",
        "data": {"path": "nowhere"},
        "model": {"name": "SiT-B/2"},
        "training": {"steps": 110, "optimizer": {"lr": 0.5}, "schedule": schedule},
    }
    config = config_from_dict(tree)
    return [learning_rate(config.training, step) for step in steps]


def test_a_constant_rate_after_its_warm_up():
    steps = (0, 1, 8, 9, 10, 60, 109)  # 0, ..., warmup - 1, warmup, ..., last
    expected = [0.05, 0.1, 0.45, 0.5, 0.5, 0.5, 0.5]
    assert rates(steps, name="constant", warmup=10) == pytest.approx(expected, rel=1e-12)
    assert rates((0, 109), name="constant") == [0.5, 0.5]


def test_half_a_cosine_after_its_warm_up():
    """Its phase counts from the warm-up's end: half way is step 60 of 10..110."""
    steps = (0, 9, 10, 35, 60, 85, 109, 110, 500)

    def cosine(share):
        return 0.5 * (0.2 + 0.8 * (1 + math.cos(math.pi * share)) / 2)

    expected = [0.05, 0.5, 0.5, cosine(0.25), 0.3, cosine(0.75), cosine(0.99), 0.1, 0.1]
    assert rates(steps, name="cosine", warmup=10, final=0.2) == pytest.approx(expected, rel=1e-12)
    without = rates((0, 55, 109), name="cosine")
    assert without == pytest.approx([0.5, 0.25, 0.25 * (1 + math.cos(math.pi * 109 / 110))])


def test_a_schedule_that_starts_at_a_step():
    """Another warm-up and cosine, of the steps that are added: the end of a run proposes it."""
    steps = (3, 40, 48, 50, 80, 110)
    expected = [0.05, 0.05, 0.45, 0.5, 0.3, 0.1]  # before it the first rate
    shape = {"name": "cosine", "warmup": 10, "final": 0.2, "start": 40}
    assert rates(steps, **shape) == pytest.approx(expected, rel=1e-12)
    assert rates((0, 40, 49), name="constant", warmup=10, start=40)[1:] == [0.05, 0.5]
    with pytest.raises(
        ConfigError, match=r"schedule\.start: 110 is not before training\.steps 110"
    ):
        rates((0,), start=110)


# What is drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5), (-0.4, 1.7)])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_log_noise_ratio_has_the_mean_and_the_deviation_asked_for(
    trainer, monkeypatch, path, mean, std
):
    objective = {"path": path, "time": "lognormal", "time_mean": mean, "time_std": std}
    monkeypatch.setattr(trainer, "config", changed(trainer.config, "objective", **objective))
    t = trainer.draws(MANY).time.double()
    ratio = t / (1 - t) if path == "linear" else torch.tan(math.pi / 2 * t)
    error = std / math.sqrt(len(MANY))
    assert abs(float(ratio.log().mean()) - mean) < SIGMAS * error
    assert abs(float(ratio.log().std()) - std) < SIGMAS * error / math.sqrt(2)


def test_uniform_times_are_uniform(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "config", changed(trainer.config, "objective", time="uniform"))
    t = trainer.draws(MANY).time.double()
    assert abs(float(t.mean()) - 0.5) < SIGMAS * math.sqrt(1 / 12 / len(MANY))
    counts = torch.histc(t, bins=20, min=0, max=1)
    expected = len(MANY) / 20
    assert float((counts - expected).abs().max()) < SIGMAS * math.sqrt(expected)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_dropped_labels(trainer, monkeypatch, share):
    monkeypatch.setattr(trainer, "config", changed(trainer.config, "model", label_dropout=share))
    dropped = trainer.draws(MANY).drop.double().mean()
    error = SIGMAS * math.sqrt(share * (1 - share) / len(MANY))
    assert abs(float(dropped) - share) <= error


def test_every_step_draws_anew(trainer, monkeypatch):
    first = trainer.draws(MANY[:64])
    monkeypatch.setattr(trainer, "step", trainer.step + 1)
    second = trainer.draws(MANY[:64])
    assert not torch.isin(first.time, second.time).any()
    assert (first.noise == second.noise).double().mean() < 1e-3


# The loss ---------------------------------------------------------------------------------------


class Scripted:
    """An engine whose velocity is off by `error` everywhere and whose alignment is given."""

    def __init__(self, error, alignment):
        self.error, self.alignment, self.seen = error, torch.tensor(alignment), None

    def __call__(self, x, t, labels, targets, drop):
        self.seen = labels, drop
        velocity = self.wanted + self.error
        return velocity if targets is None else (velocity, self.alignment)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 2.0])
@pytest.mark.parametrize("encoders", [True, False])
def test_the_loss_is_the_velocitys_plus_weight_times_the_alignments(
    trainer, monkeypatch, weight, encoders
):
    engine = Scripted(error=0.5, alignment=-0.8)
    interpolate = trainer.objective.interpolate

    class Objective:
        velocity_loss = staticmethod(trainer.objective.velocity_loss)

        def interpolate(self, z, noise, t):
            x, engine.wanted = interpolate(z, noise, t)
            return x, engine.wanted

    monkeypatch.setattr(trainer, "objective", Objective())
    monkeypatch.setattr(trainer, "engine", engine)
    monkeypatch.setattr(trainer, "config", changed(trainer.config, "alignment", weight=weight))
    batch = next(RandomBatches(trainer, trainer.world.device, trainer.micro))
    samples = trainer.sample_numbers(0)
    losses = trainer.forward_losses(batch, samples, None if encoders else [])
    assert float(losses["velocity_loss"]) == pytest.approx(0.25, rel=1e-5)
    expected = 0.25 - 0.8 * weight if encoders else 0.25
    assert float(losses["loss"]) == pytest.approx(expected, rel=1e-5)
    assert ("alignment_loss" in losses) == encoders
    if encoders:
        assert float(losses["alignment_loss"]) == pytest.approx(-0.8)
    labels, drop = engine.seen
    assert torch.equal(labels, batch.label)
    assert torch.equal(drop, trainer.draws(samples).drop)


# What a continuation may change -----------------------------------------------------------------

CURVE = {
    "seed", "data.resolution", "data.codec.name", "data.codec.weights", "data.codec.side",
    "data.latents", "data.window", "data.flip", "data.remainder", "vision.encoders",
    "vision.targets", "vision.precision", "model.name", "model.width", "model.depth",
    "model.heads", "model.patch", "model.num_classes", "model.label_dropout", "model.qk_norm",
    "alignment.weight", "alignment.block", "alignment.projector_width", "objective.path",
    "objective.prediction", "objective.time", "objective.time_mean", "objective.time_std",
    "training.global_batch", "training.precision", "training.optimizer.lr",
    "training.optimizer.betas", "training.optimizer.eps", "training.optimizer.weight_decay",
    "training.schedule.name", "training.schedule.warmup", "training.schedule.final",
    "training.schedule.start", "training.clip", "training.extra_losses",
}  # fmt: skip


def test_what_changes_the_curve_is_warned_of_and_nothing_else(tmp_path, capsys):
    """Every key there is, changed alone: a new one is to be put on one side or the other."""
    config = load_config(QUICKSTART, [f"run={tmp_path}"])
    save_config(config, tmp_path / "config.yaml")
    warned, keys = set(), set()

    def change(tree, whole, prefix=""):
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict):
                change(value, whole, f"{key}.")
                continue
            keys.add(key)
            tree[name] = "changed"
            now = SimpleNamespace(model_dump=lambda: whole, training=config.training)
            warn_of_changes(tmp_path, now, 5)
            tree[name] = value
            if said := capsys.readouterr().out:
                assert said == (
                    f"warning: {key} was {value!r} and is now 'changed': this run's curve changes\n"
                )
                warned.add(key)

    tree = config.model_dump()
    change(tree, tree)
    assert warned == CURVE
    assert keys > CURVE


def test_a_first_start_and_an_unchanged_one_warn_of_nothing(tmp_path, capsys):
    config = load_config(QUICKSTART, [f"run={tmp_path}"])
    warn_of_changes(tmp_path, config, 0)
    save_config(config, tmp_path / "config.yaml")
    warn_of_changes(tmp_path, config, 800)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("step", "overrides", "words"),
    [
        (1600, [], "the finished cosine is opened again, and the rate goes from 2.19e-09 to "
         "0.00105 at once; for a new one say training.schedule.start=1600 and a lower"),
        (1000, [], "the cosine is stretched, and the rate goes from 0.000691 to 0.00161 at once"),
        (60, [], ""),  # in the warm-up it is the same
        (1600, ["training.schedule.start=1600"], ""),
        (1600, ["training.steps=1600"], ""),
    ],
)  # fmt: skip
def test_a_cosine_that_more_steps_move_is_warned_of(tmp_path, capsys, step, overrides, words):
    save_config(load_config(QUICKSTART, [f"run={tmp_path}"]), tmp_path / "config.yaml")
    more = ["training.steps=3200", "training.schedule.warmup=100", *overrides]
    warn_of_changes(tmp_path, load_config(QUICKSTART, [f"run={tmp_path}", *more]), step)
    said = capsys.readouterr().out
    assert said.count("training.steps was 1600 and is now 3200: ") == bool(words)
    assert words in said
