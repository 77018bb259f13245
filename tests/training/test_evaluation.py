"""Evaluation during training: what it measures, what it leaves alone, which checkpoint it keeps."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrepa.commands.evaluate.during_training import RunEvaluator
from fastrepa.commands.evaluate.evaluate import evaluate
from fastrepa.config import EncoderConfig, config_from_dict, load_config
from fastrepa.errors import ConfigError, FastrepaError
from fastrepa.training import evaluation
from fastrepa.training.run import Run
from tests.programs.evaluated_runs import NUM, STEPS
from tests.runs import ROOT, SMALL, metrics, said_by, tensors

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of evaluated_runs: one launch of two processes, two runs of 6 steps."""
    folder = tmp_path_factory.mktemp("evaluated")
    said = said_by("tests.programs.evaluated_runs", folder)
    assert f"step 2, {NUM} images: fd_resnet10t" in said
    assert f"fd_resnet10t: {NUM} images are few for 512 dimensions" in said
    assert said.count("step 2: the evaluation is given up for the signal") == 1
    return folder


def test_a_signal_to_one_rank_ends_an_evaluation_and_its_step_is_saved(folder):
    (line,) = metrics(folder / "stopped")
    assert line["step"] == 2 and "fd_resnet10t" not in line
    saved, whole = (tensors(folder / name, 2) for name in ("stopped", "evaluated"))
    assert saved and all(torch.equal(whole[n], v) for n, v in saved.items())


def test_a_run_ends_with_the_same_bits_whether_evaluated_or_not(folder):
    """Weights, averages, optimiser states and the generators of both ranks, under ZeRO stage 3."""
    plain, evaluated = (tensors(folder / name, STEPS) for name in ("plain", "evaluated"))
    assert plain.keys() == evaluated.keys()
    assert any(name.startswith("rng_rank_00001") for name in plain)
    for name, value in plain.items():
        assert torch.equal(value, evaluated[name]), name


def test_scores_are_logged_drawn_and_choose_the_best_checkpoint(folder):
    lines = metrics(folder / "evaluated")
    assert [line["step"] for line in lines] == [2, 3, 4, 6]  # log_every 3, evaluated every 2
    scores = {line["step"]: line["fd_resnet10t"] for line in lines if "fd_resnet10t" in line}
    assert list(scores) == [2, 4, 6]
    assert len(set(scores.values())) == 3
    board = EventAccumulator(str(folder / "evaluated/tensorboard")).Reload()
    drawn = {event.step: event.value for event in board.Scalars("fd_resnet10t")}
    assert drawn == pytest.approx(scores)
    kept = {path.name for path in (folder / "evaluated/checkpoints").iterdir()}
    worst = max(scores, key=lambda step: scores[step])
    assert worst != STEPS  # mode: max; otherwise the newest, which is kept anyhow, shows nothing
    assert kept == {f"step_{step:07d}" for step in (worst, STEPS)}
    state = json.loads((folder / f"evaluated/checkpoints/step_{worst:07d}/state.json").read_text())
    assert state["metrics"]["fd_resnet10t"] == scores[worst]
    assert len(list((folder / "validation.statistics").iterdir())) == 1


def test_the_command_measures_the_same_of_the_run(folder):
    """Other code makes the images: from the checkpoint, on one rank, here."""
    run, logged = folder / "evaluated", metrics(folder / "evaluated")[-1]
    encoder = EncoderConfig(name="resnet10t", weights="random", input=32)
    done = evaluate(
        run, folder / "validation", encoders=[encoder], num=NUM, batch_size=4, seed=0,
        metrics=["fd_resnet10t", "kd_resnet10t"],
    )  # fmt: skip
    assert done.settings["checkpoint_step"] == STEPS
    for name, value in done.scores.items():
        assert value == pytest.approx(logged[name], rel=1e-3, abs=1e-6), name


def test_what_cannot_be_measured_ends_the_run_before_its_first_step(folder, world):
    tree = load_config(ROOT / "configs/quickstart.yaml").model_dump(mode="json")

    def refused(match, **settings):
        config = config_from_dict({**tree, "evaluation": {"every": 1, **settings}})
        with pytest.raises(FastrepaError, match=match):
            RunEvaluator(config, world, None, ["a", "b"])

    np.savez(folder / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    encoders = [{"name": "resnet10t", "weights": "random"}]
    refused(
        r"fd_resnet10t: needs statistics .*statistics.npz has none",
        reference=str(folder / "statistics.npz"), encoders=encoders,
    )  # fmt: skip
    refused("precision_resnet10t: needs 4 images or more, the samples are 3", num=3,
            reference=str(folder / "validation"), encoders=encoders)  # fmt: skip
    refused("'fd_dinov2_vitb15' is not known", metrics=["fd_dinov2_vitb15"])
    refused(r"evaluation.reference: .*plain is a run", reference=str(folder / "plain"))


def test_a_run_that_wants_scores_does_not_start_without_an_evaluator(tmp_path, world):
    settings = [f"run={tmp_path / 'run'}", *SMALL, "evaluation.every=2"]
    run = Run(load_config(ROOT / "configs/quickstart.yaml", settings), world)
    with pytest.raises(ConfigError, match=r"evaluation\.every: this run was given nothing"):
        run.train(None)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_not_measured(world, monkeypatch):
    config = load_config(ROOT / "configs/quickstart.yaml", ["run=x", *SMALL, "evaluation.num=4"])
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(evaluation, "ema_model", lambda *_, **__: nullcontext(model))
    measured = SimpleNamespace(
        prepare=lambda **_: None, scores=lambda model, *, alive: {"fid": 3.0}
    )
    evaluations, said = evaluation.Evaluations(config, world, None, measured), []

    def measure(step):
        return evaluations.measure(step, None, {}, alive=lambda: None, warn=said.append)

    assert measure(1) == evaluations.at(1) == {"fid": 3.0} and not said
    model.bias.data[1] = torch.inf
    assert measure(2) == evaluations.at(2) == {}
    assert said == ["step 2: the average of bias is not finite: nothing is measured"]
