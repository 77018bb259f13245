"""A push to the hub is the folder of a dry run, card and all."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastrepa.commands.convert import exchange
from fastrepa.config import load_run_config
from fastrepa.errors import CheckpointError, ConfigError
from fastrepa.reading.text import parse_yaml
from tests.command_line import invoke, run
from tests.commands.convert.test_diffusers_folder import a_run
from tests.sets.hub import TOKEN, a_hub

CODEC = {"name": "pixel", "side": 16}
CLASSES = ["cat", "a `dog` | [x](y)", "eel"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run with a grid, losses and an evaluation, whose set lies in somebody's home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_classes", lambda _: CLASSES)
        folder = a_run(
            tmp_path_factory.mktemp("hub") / "run",
            data={"path": "/home/ann/pets", "resolution": 16, "codec": CODEC},
        )
    lines = [
        {"step": 0, "loss": 0.5, "velocity_loss": 0.25, "lr": 1e-3},
        {"step": 0, "fd_dinov2_vitb14": 123.456},
        {"step": 9, "loss": 0.1, "grad_norm": 1.0},  # of later than the checkpoint
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = {
        "utc": "2026-01-01T00:00:00", "num_samples": 50000, "reference": "/home/ann/virtual.npz",
        "generated": {"checkpoint_step": 0, "ema": "0.9999", "sampler": "heun", "cfg": 1.5},
        "metrics": {"fid": 7.25},
    }  # fmt: skip
    later = {**measured, "generated": {"checkpoint_step": 5, "ema": "0.9999"}}
    (folder / "evaluations.jsonl").write_text(f"{json.dumps(measured)}\n{json.dumps(later)}\n")
    (folder / "samples").mkdir()
    for step, colour in ((0, "red"), (9, "blue")):
        Image.new("RGB", (4, 4), colour).save(folder / f"samples/step_{step:07d}.png")
    return folder


def files_of(folder):
    found = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def test_a_dry_run_writes_what_a_push_pushes(model, tmp_path, monkeypatch):
    words = ["convert", model, tmp_path / "dry", "--to", "hub", "--repo", "ann/pets-sit"]
    stated = ["--license", "cc-by-4.0", "--datasets", "ann/pets, ann/more"]
    said = run(*words, *stated, "--dry-run")
    assert said == (
        f"step 0 of {model} in {tmp_path / 'dry'}: what would be pushed to ann/pets-sit; nothing "
        "was\n"
    )
    written = files_of(tmp_path / "dry")
    with a_hub(monkeypatch) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        words[2:3] = []
        said = run(*words, *stated, "--private")
        assert said == f"step 0 of {model} at {hub.url}/ann/pets-sit\n"
        assert hub.repositories == {"ann/pets-sit": written}
        assert hub.private == {"ann/pets-sit": True}
        assert hub.commits == ["Step 0"]
        assert "no licence is stated (--license)" in run(*words)  # a second time, into the same
        assert hub.repositories["ann/pets-sit"].keys() == written.keys()
    assert written.keys() == {
        "README.md", "config.yaml", "model_index.json", "pipeline.py", "samples.png",
        "transformer/config.json", "transformer/sit.py",
        "transformer/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert written["samples.png"] == (model / "samples/step_0000000.png").read_bytes()
    assert not [name for name, content in written.items() if b"/home/ann" in content]
    assert str(tmp_path.parent).encode() not in b"".join(written.values())


def test_the_card(model, tmp_path):
    run("convert", model, tmp_path / "a", "--to", "hub", "--repo", "pets", "--dry-run",
        "--license", "mit", "--datasets", "ann/pets")  # fmt: skip
    _, about, text = (tmp_path / "a/README.md").read_text().split("---\n", 2)
    about = parse_yaml(about, "the card")
    assert (about["library_name"], about["license"]) == ("diffusers", "mit")
    assert about["datasets"] == ["ann/pets"] and "repa" in about["tags"]
    for words in (
        "# pets\n", "Draws images of 16 x 16 pixels by class", "](samples.png)",
        '.from_pretrained("pets", trust_remote_code=True)', "`pets`: images in 3 classes",
        "`cat`, `a 'dog' | [x](y)`, `eel`", "| fd_dinov2_vitb14 | 123.5 | 0 | in training |",
        "| loss | 0.5 | 0 | in training |",
        "| fid | 7.25 | 0 | 50,000 images against `virtual.npz`; sampler heun, cfg 1.5 |",
        "The weights: `mit`.", "width 24, depth 2, 3 heads, patch 4", "heun, 3 steps, guidance 2.0",
    ):  # fmt: skip
        assert words in text, words
    recipe = parse_yaml((tmp_path / "a/config.yaml").read_text(), "the recipe")
    assert (recipe["data"]["path"], recipe["run"]) == ("pets", "run")
    run("convert", model, tmp_path / "b", "--to", "hub", "--repo", "pets", "--dry-run")
    bare = (tmp_path / "b/README.md").read_text()
    assert "\nlicense" not in bare and "No licence of the weights is stated." in bare


@pytest.mark.parametrize(("words", "error"), [
    (["--to", "hub"], "--to hub: give --repo OWNER/NAME"),
    (["--to", "hub", "--repo", "a/b/c", "--dry-run"], "--repo: "),
    (["--to", "hub", "--repo", "a/b", "--dry-run"], "--dry-run: name the folder to write"),
    (["--to", "hub", "--repo", "a/b"], r"--to hub: no token; type hf auth login, or set HF_TOKEN"),
    (["--to", "zero", "--private"], "go with --to hub"),
    (["--to", "zero"], "convert: name the file or folder, after the run"),
])  # fmt: skip
def test_what_is_missing_is_named(model, monkeypatch, words, error):
    with a_hub(monkeypatch) as hub:
        done = invoke("convert", model, *words)
        assert isinstance(done.exception, ConfigError)
        assert error in str(done.exception) and "\n" not in str(done.exception)
        assert not hub.repositories


def test_a_hub_that_refuses(model, monkeypatch, tmp_path):
    words = ["convert", model, "--to", "hub", "--repo", "ann/x", "--license", "nonsense"]
    with a_hub(monkeypatch) as hub:
        hub.refuses_yaml = True
        for token, reason in ((TOKEN, '"license" must be one of'), ("hf_other", "401")):
            monkeypatch.setenv("HF_TOKEN", token)
            error = invoke(*words).exception
            assert isinstance(error, CheckpointError)
            assert str(error).startswith("--to hub: ann/x: not pushed (") and reason in str(error)
        assert hub.repositories in ({}, {"ann/x": {}})
    error = str(invoke(*words).exception)  # which is gone now
    assert error == f"--to hub: {hub.url} does not answer: Connection refused"


def test_an_export_needs_no_run(model, tmp_path):
    """A safetensors export gives what its run gives."""
    export = tmp_path / "model.safetensors"
    run("convert", model, export, "--to", "safetensors")
    for source, name in ((model, "a"), (export, "b")):
        run("convert", source, tmp_path / name, "--to", "diffusers")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    run("convert", export, tmp_path / "c", "--to", "hub", "--repo", "me/c", "--dry-run")
    assert "16 x 16 pixels" in (tmp_path / "c/README.md").read_text()
    run("convert", export, tmp_path / "d.pt", "--to", "reference")
    theirs = torch.load(tmp_path / "d.pt", weights_only=False)
    assert theirs["args"].num_classes == 3 and "opt" not in theirs
    assert theirs["ema"].keys() == load_file(export).keys()
    run("convert", tmp_path / "back", export, "seed=4", "--from", "reference")
    first, back = (load_run_config(folder).model_dump() for folder in (model, tmp_path / "back"))
    assert (back.pop("seed"), back.pop("run")) == (4, str(tmp_path / "back"))
    assert back == {k: v for k, v in first.items() if k not in ("seed", "run")}
    for words, error in (
        (["--to", "zero"], "holds weights alone: reference, diffusers, hub"),
        (["--to", "diffusers", "--step", "3"], "leave --weights, --ema, --ema-sigma-rel and --st"),
    ):
        assert error in str(invoke("convert", export, tmp_path / "e", *words).exception)
