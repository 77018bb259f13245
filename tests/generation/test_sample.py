"""The command: what a run's samples are, what was stopped goes on, and ranks share them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrepa.commands.evaluate.image_sources import open_folder
from fastrepa.config import SampleConfig
from fastrepa.errors import CheckpointError, ConfigError, FastrepaError
from fastrepa.generation import sample as room
from fastrepa.generation.folder import read_png
from fastrepa.generation.generate import default_labels, generate
from fastrepa.generation.sample import sample_run
from fastrepa.model.sit import SiT
from fastrepa.runtime.files import HOST
from fastrepa.runtime.ownership import owned
from tests.generation.tiny import CLASSES, CODEC, fake_run, tiny_model
from tests.runs import said_by

DEAD = 2**22 + 1  # more than Linux has processes


@pytest.fixture
def loaded(monkeypatch):
    from fastrepa.checkpoint import choice

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(choice, "load_ema_model", fake_run)
    monkeypatch.setattr(choice, "fingerprint", lambda run, step: f"of {step}")


def png_bytes(folder: Path) -> dict[str, bytes]:
    return {
        p.name: read_png(p).numpy().tobytes() for p in folder.iterdir() if re.match(r"\d+", p.name)
    }


def test_sample_run(loaded, tmp_path):
    out = tmp_path / "out"
    result = sample_run(
        "run", out, num=10, seed=7, batch_size=4, npz=True, sampler="sde", steps=3, precision="fp32"
    )
    assert (result.folder, result.num, result.is_rank_0) == (out, 10, True)
    names = [f"{i:06d}.png" for i in range(10)]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*names, "grid.png", "sampling.json", "samples_10x16x16x3.npz"]
    )
    expected = generate(
        tiny_model(),
        CODEC,
        default_labels(10, len(CLASSES)),
        seed=7,
        sample_ids=torch.arange(10),
        batch_size=4,
        sample_config=SampleConfig(sampler="sde", steps=3, cfg=2.0),
        path="linear",
    )
    assert torch.equal(torch.stack([read_png(out / name) for name in names]), expected)
    with np.load(result.npz) as archive:
        assert np.array_equal(archive["arr_0"], expected.permute(0, 2, 3, 1).numpy())
    with Image.open(result.grid) as grid:
        assert grid.width > grid.height  # five classes are five columns
    record = json.loads((out / "sampling.json").read_text())
    assert record["seed"] == 7
    assert record["checkpoint_step"] == 500
    assert record["ema"] == "0.9999"
    assert (record["sampler"], record["steps"], record["cfg"]) == ("sde", 3, 2.0)


def test_what_was_stopped_goes_on(loaded, tmp_path, monkeypatch):
    from fastrepa.checkpoint import choice

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert sample_run("run", whole, num=10, batch_size=4).there == 0
    assert open_folder(whole).num == 10  # `evaluate` reads what is drawn
    made, plain = [], room.generate

    def stopped(*args, sample_ids, **kwargs):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.extend(sample_ids.tolist())
        return plain(*args, sample_ids=sample_ids, **kwargs)

    monkeypatch.setattr(room, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        sample_run("run", out, num=10, batch_size=4)
    (out / f".000005.png.{DEAD}@{HOST}.tmp").write_bytes(b"half")
    (out / "000003.png").unlink()
    made.clear()

    def counting(*args, sample_ids, **kwargs):
        made.extend(sample_ids.tolist())
        return plain(*args, sample_ids=sample_ids, **kwargs)

    monkeypatch.setattr(room, "generate", counting)
    assert sample_run("run", out, num=6, batch_size=4).there == 3
    assert made == [0, 1, 2, 3, 4, 5]  # whole batches
    assert sample_run("run", out, num=10, batch_size=4, npz=True).there == 6
    assert made[6:] == [4, 5, 6, 7, 8, 9]
    assert png_bytes(out) == png_bytes(whole)
    made.clear()
    fewer = sample_run("elsewhere", out, num=2, batch_size=4)  # the same run, moved
    assert (fewer.there, fewer.more, fewer.removed, made) == (2, 8, 0, [])
    assert png_bytes(out) == png_bytes(whole)
    assert json.loads((out / "sampling.json").read_text())["num"] == 10
    monkeypatch.setattr(choice, "fingerprint", lambda run, step: "trained again")
    for settings, words in (
        ({}, "checkpoint 'of 500', now 'trained again'"),
        ({"seed": 1, "steps": 3}, "seed 0, now 1; steps 4, now 3"),
        ({"batch_size": 3}, "batch_size 4, now 3"),
    ):
        with pytest.raises(FastrepaError, match=words + ".*--out, or --overwrite removes them"):
            sample_run("run", out, num=10, **{"batch_size": 4, **settings})
    assert png_bytes(out) == png_bytes(whole) and not made
    anew = sample_run("run", out, num=6, batch_size=4, seed=1, overwrite=True)
    assert (anew.there, anew.more, anew.removed, len(made)) == (0, 0, 11, 6)
    assert sorted(png_bytes(out)) == [f"{i:06d}.png" for i in range(6)]
    assert not list(out.glob(".*"))


def test_an_image_that_is_not_whole_is_made_again(loaded, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    sample_run("run", whole, num=10, batch_size=4)
    shutil.copytree(whole, out)
    (out / "000001.png").write_bytes(b"")
    (out / "000009.png").write_bytes((out / "000009.png").read_bytes()[:40])
    assert sample_run("run", out, num=10, batch_size=4).there == 8
    assert png_bytes(out) == png_bytes(whole)
    said = capsys.readouterr().err
    assert said.endswith("000001.png: not whole (2 of 10 images); made again\n")
    (out / "000001.png").write_text("not an image at all, of a user who keeps notes here")
    with pytest.raises(FastrepaError, match=r"000001\.png: not the image that"):
        sample_run("run", out, num=10, batch_size=4)
    assert (out / "000001.png").read_text().startswith("not an image")


def test_a_folder_in_use_is_refused_with_its_owner(loaded, tmp_path):
    words = rf"out: in use by another on {re.escape(HOST)}, process {os.getpid()}, since 20"
    with (
        owned(tmp_path / "out", "another"),
        pytest.raises(FastrepaError, match=words),
    ):
        sample_run("run", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_checkpoint_that_is_pruned_while_it_is_read(loaded, tmp_path, monkeypatch):
    """The newest is taken again, but not for ever."""
    from fastrepa.checkpoint import choice

    asked = []

    def pruned(run, step):
        asked.append(step)
        if len(asked) < 3:
            raise FileNotFoundError(2, "No such file or directory", "manifest.json")
        return "found"

    monkeypatch.setattr(choice, "fingerprint", pruned)
    out = sample_run("run", tmp_path / "out", num=1).folder
    assert (
        len(asked) == 3 and json.loads((out / "sampling.json").read_text())["checkpoint"] == "found"
    )
    monkeypatch.setattr(choice, "fingerprint", lambda run, step: pruned(run, asked.clear()))
    with pytest.raises(CheckpointError, match="replaced before they can be read"):
        sample_run("run", tmp_path / "other", num=1)


def test_sample_run_again_with_classes(loaded, tmp_path):
    sample_run("run", tmp_path, num=12)
    before = png_bytes(tmp_path)
    with pytest.raises(FastrepaError, match=r"classes 'all', now \['Food', '3'\]"):
        sample_run("run", tmp_path, num=12, batch_size=12, classes=["Food", "3"])
    assert png_bytes(tmp_path) == before
    again = {"batch_size": 12, "overwrite": True}
    result = sample_run("run", tmp_path, num=6, classes=["Food", "3"], **again)
    assert result.npz is None
    after = png_bytes(tmp_path)
    assert len(after) == 6
    assert all(before[name] != after[name] for name in after)  # other classes, other images
    assert json.loads((tmp_path / "sampling.json").read_text())["classes"] == ["Food", "3"]
    sample_run(
        "run", tmp_path, num=6, classes=CLASSES[::-1], **again
    )  # all of them, and in what order
    assert json.loads((tmp_path / "sampling.json").read_text())["classes"] == CLASSES[::-1]


def test_precision_and_compilation_of_the_generator(loaded, tmp_path, monkeypatch):
    """The compiled graph is run by torch's own kernels: what Inductor makes of it is its affair."""
    compile_, compiled, products = torch.compile, [], []

    def by_torch(function, *, backend, **options):
        compiled.append(function)
        return compile_(function, backend="aot_eager", fullgraph=True, **options)

    def forward(self, *given):
        products.append((torch.get_float32_matmul_precision(), next(self.parameters()).dtype))
        return plain(self, *given)

    monkeypatch.setattr(torch, "compile", by_torch)
    plain = SiT.forward
    images = {}
    for name, settings in {
        "fp32": {"precision": "fp32"}, "blocks": {"precision": "fp32", "compile": "blocks"},
        "bf16": {"precision": "bf16"}, "run": {}, "tf32": {"precision": "tf32"},
    }.items():  # fmt: skip
        if not settings.get("compile"):
            monkeypatch.setattr(SiT, "forward", forward)
        out = sample_run("run", tmp_path / name, num=4, batch_size=4, **settings).folder
        monkeypatch.setattr(SiT, "forward", plain)
        images[name] = torch.stack([read_png(out / f"{i:06d}.png") for i in range(4)]).int()
    assert len(compiled) == 1  # on a CPU the blocks are compiled as one
    modes = [("highest", torch.float32), ("highest", torch.bfloat16), ("high", torch.float32)]
    assert list(dict.fromkeys(products)) == modes
    assert torch.get_float32_matmul_precision() == "highest"
    assert (images["fp32"] - images["blocks"]).abs().max() <= 1
    assert torch.equal(images["fp32"], images["tf32"])  # no GPU, no TF32
    assert torch.equal(images["run"], images["bf16"])  # training's
    assert 0 < (images["fp32"] - images["bf16"]).abs().max() < 16
    assert json.loads((tmp_path / "blocks/sampling.json").read_text())["compile"] == "blocks"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"compile": "graphs"},
            "sample.compile: 'graphs' captures CUDA graphs, and this is on cpu",
        ),
        ({"precision": "fp16"}, "sample.precision: 'fp16' is not allowed"),
        ({"cfg": 0.5}, "sample.cfg: 0.5 is not allowed"),
        ({"sampler": "euler"}, "sample.sampler: 'euler' is not allowed"),
        ({"guidance_low": 0.8, "guidance_high": 0.7}, "guidance_low: 0.8 is above"),
        ({"classes": ["Foood"]}, "'Foood' is no class"),
        ({"seed": -1}, "seed: -1"),
        ({"batch_size": 0}, "--batch-size: 0"),
        ({"num": 0}, "sample.num: 0"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(loaded, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        sample_run("run", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


ANSWERS = ("first ", "other ", "refused: ")


def test_two_processes_give_the_bits_of_one(loaded, tmp_path):
    """They do under torch.distributed.run, and a refusal reaches every process."""
    alone, pair, foreign = tmp_path / "alone", tmp_path / "pair", tmp_path / "foreign"
    sample_run("run", alone, num=10, batch_size=4, npz=True, seed=7)
    foreign.mkdir()
    (foreign / "precious").touch()
    with owned(tmp_path / "used", "another"):
        folders = (foreign, tmp_path / "used", pair)
        said_by("tests.programs.sampling_ranks", tmp_path / "rank_", *folders)
    lines = [(tmp_path / f"rank_{rank}").read_text().splitlines() for rank in range(2)]
    (refusal0, in_use, first), (refusal1, in_use1, other) = lines
    assert in_use == in_use1
    assert in_use.startswith(f"refused: {tmp_path}/used: in use by another on {HOST}, process")
    assert first == f"True [0, 1, 2, 3, 8, 9] {pair}/samples_10x16x16x3.npz"
    assert other == "False [4, 5, 6, 7] None"
    assert refusal0.startswith(f"refused: {foreign}: holds files")
    assert refusal1 == refusal0
    assert png_bytes(pair) == png_bytes(alone)
    assert (pair / "grid.png").read_bytes() == (alone / "grid.png").read_bytes()
    with np.load(pair / "samples_10x16x16x3.npz") as archive:
        assert archive["arr_0"].shape == (10, 16, 16, 3)
