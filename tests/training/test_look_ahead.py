"""Targets made ahead: the same bits, the same resume, in the order that lets a GPU overlap them."""

from contextlib import nullcontext

import pytest
import torch

from fastrepa.config import load_config
from fastrepa.errors import ConfigError
from fastrepa.model.compilation import check_compile
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.training.look_ahead import LookAhead
from fastrepa.training.targets import Targets
from fastrepa.training.trainer import Trainer
from tests.runs import ROOT, SMALL, metrics, tensors, train

CPU = torch.device("cpu")
LOSSES = ("loss", "velocity_loss", "alignment_loss", "grad_norm")


def built(world, *overrides, steps=3):
    sizes = ("training.micro_batch=4", f"training.steps={steps}")
    config = load_config(
        ROOT / "configs/quickstart.yaml", ["run=nowhere", *SMALL, *sizes, *overrides]
    )
    return Trainer(config, world)


def test_a_run_ahead_ends_with_the_same_bits(tmp_path):
    """Stopped and continued besides: what was drawn ahead of a stop is drawn again."""
    plain, ahead = tmp_path / "plain", tmp_path / "ahead"
    given = ("training.micro_batch=4", "vision.encoders.0.spatial_norm=0.5")
    train(plain, *given, "training.steps=4")
    for steps in (2, 4):
        done = train(ahead, *given, f"training.steps={steps}", "vision.look_ahead=true")
    assert "px, ahead" in done.stdout and "continuing" in done.stdout
    for a, b in zip(metrics(plain), metrics(ahead), strict=True):
        assert [a[name] for name in LOSSES] == [b[name] for name in LOSSES]
    before, after = tensors(plain, 4), tensors(ahead, 4)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_encoder_runs_between_forward_and_backward(world, monkeypatch):
    trainer = built(world, "vision.look_ahead=true")
    happened, source = [], RandomBatches(trainer, CPU, trainer.micro)
    backward, targets = trainer.engine.backward, Targets.__call__

    class Source:
        def __next__(self):
            happened.append("draw")
            return next(source)

    def note(what, work):
        def call(*args):
            happened.append(what)
            return work(*args)

        return call

    monkeypatch.setattr(Targets, "__call__", note("encode", targets))
    monkeypatch.setattr(trainer.engine, "backward", note("backward", backward))
    trainer.engine.module.register_forward_hook(lambda *_: happened.append("forward"))
    batches = Source()
    for _ in range(trainer.config.training.steps):
        trainer.train_step(batches)
    micro = ["forward", "draw", "encode", "backward"]
    # Nothing is drawn beyond the last step: what lies there, damaged perhaps, is no part of it.
    assert happened == ["draw", "encode", *5 * micro, "forward", "backward"]


def test_what_was_begun_from_other_batches_is_dropped(world):
    trainer = built(world, "vision.look_ahead=true")
    ahead, first, second = trainer.look_ahead, iter(["a", "b"]), iter(["c"])

    def region(_):
        return nullcontext()

    ahead.targets = lambda batch: [batch + "!"]
    assert ahead.take(first, region) == ("a", None)
    ahead.begin(first, region)
    assert ahead.take(first, region) == ("b", ["b!"])
    ahead.begin(first, region)  # there is no more
    ahead.begin(second, region)
    with pytest.raises(StopIteration):
        ahead.take(first, region)
    assert not LookAhead(trainer.targets, "auto", CPU).active
    assert not LookAhead(built(world, "vision.encoders=[]").targets, True, CPU).active


def test_graphs_need_a_gpu():
    for key, allowed in (("training", "'none' or 'blocks'"), ("vision", "'none'")):
        key += ".compile"
        with pytest.raises(ConfigError, match=rf"{key}: 'graphs' .* on cpu; use {allowed}$"):
            check_compile(key, "graphs", CPU)
        check_compile(key, "graphs", torch.device("cuda"))
        check_compile(key, "none", CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("vision", ["none", "graphs"])
def test_a_side_stream_and_graphs_change_no_loss(world, vision):
    curves = []
    for overrides in (
        ("vision.look_ahead=false",),
        ("vision.look_ahead=true", f"vision.compile={vision}"),
    ):
        trainer = built(world, *overrides, steps=6)
        batches = RandomBatches(trainer, world.device, trainer.micro)
        curves.append([trainer.train_step(batches)["loss"].item() for _ in range(6)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6 if vision == "none" else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_graphs_of_the_generator_accumulate(world, stage):
    curves = []
    for way in ("none", "graphs"):
        trainer = built(world, f"training.compile={way}", f"zero.stage={stage}", steps=6)
        batches = RandomBatches(trainer, world.device, trainer.micro)
        curves.append([trainer.train_step(batches)["loss"].item() for _ in range(6)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
