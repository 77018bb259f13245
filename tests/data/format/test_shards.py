"""A prepared set is verified when it is opened: every damage is named before training starts."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import ShardSet
from fastrepa.errors import DataError
from tests.sets.trees import flip_byte

MakeSet = Callable[..., ShardSet]


def edit_manifest(shards: ShardSet, change: Callable[[dict[str, Any]], None]) -> None:
    path = shards.path / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refusal(path: Path, **options: Any) -> str:
    """The one line with which opening fails."""
    with pytest.raises(DataError) as caught:
        ShardSet.open(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_opens_with_what_was_prepared(make_set: MakeSet) -> None:
    shards = make_set()
    assert shards.classes == ["ant", "bee", "cat"]
    assert shards.num_samples == 34
    assert shards.shard_sizes == [8, 8, 8, 8, 2]
    assert shards.resolution == 16
    counts = np.bincount(np.concatenate([load_index(p)["label"] for p in shards.index_paths]))
    assert counts.tolist() == [9, 14, 11]
    for verify in ("sizes", "full", "auto"):
        assert ShardSet.open(shards.path, resolution=16, verify=verify).num_samples == 34  # type: ignore[arg-type]


def test_shards_are_webdataset_and_index_points_into_them(make_set: MakeSet) -> None:
    shards = make_set(image_format="jpeg")
    for path, index_path in zip(shards.shard_paths, shards.index_paths, strict=True):
        raw = path.read_bytes()
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for record in load_index(index_path):
                key = record["key"].decode()
                image = tar.extractfile(f"{key}.jpg").read()  # type: ignore[union-attr]
                start = int(record["image_offset"])
                assert raw[start : start + int(record["image_size"])] == image
                label = tar.extractfile(f"{key}.cls").read()  # type: ignore[union-attr]
                assert int(label) == record["label"]
            keys = [record["key"].decode() for record in load_index(index_path)]
            assert names == [f"{key}.{part}" for key in keys for part in ("jpg", "cls")]


def test_another_resolution_is_refused(make_set: MakeSet) -> None:
    message = refusal(make_set().path, resolution=256)
    assert "prepared at 16 px" in message
    assert "256 px" in message


def test_not_a_set(tmp_path: Path) -> None:
    assert "no such data set" in refusal(tmp_path / "nowhere")
    assert "manifest.json: missing" in refusal(tmp_path)


@pytest.mark.parametrize("verify", ["sizes", "full"])
def test_missing_and_truncated_files_are_named(make_set: MakeSet, verify: str) -> None:
    for number, name in enumerate(("shard-00003.tar", "shard-00001.idx.npy")):
        path = make_set(name=f"cut{number}").path
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-512])
        assert f"{path / name}: truncated" in refusal(path, verify=verify)
        (path / name).write_bytes(whole + b"x")
        assert f"{path / name}: too long" in refusal(path, verify=verify)
        (path / name).unlink()
        assert f"{path / name}: missing" in refusal(path, verify=verify)


def test_flipped_byte_in_a_shard_is_found_before_training(make_set: MakeSet) -> None:
    shards = make_set()
    record = load_index(shards.index_paths[1])[3]
    flip_byte(shards.shard_paths[1], int(record["image_offset"]) + 10)
    message = f"{shards.shard_paths[1]}: damaged (sample {record['key'].decode()}"
    assert message in refusal(shards.path, verify="full")
    assert message in refusal(shards.path, verify="auto")  # a small set
    # "sizes" leaves it to the reader (test_reader.py).
    ShardSet.open(shards.path, verify="sizes")


def test_flipped_byte_beside_the_images_is_found_too(make_set: MakeSet) -> None:
    shards = make_set()
    flip_byte(shards.shard_paths[0], 3)  # in the header of the first member
    assert f"{shards.shard_paths[0]}: damaged" in refusal(shards.path)


def test_large_sets_are_not_hashed_unasked(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_set()
    flip_byte(shards.shard_paths[0], 600)
    monkeypatch.setattr("fastrepa.data.format.shards.AUTO_FULL_BYTES", shards.num_bytes - 1)
    ShardSet.open(shards.path, verify="auto")
    monkeypatch.setattr("fastrepa.data.format.shards.AUTO_FULL_BYTES", shards.num_bytes)
    assert "damaged" in refusal(shards.path, verify="auto")


def test_altered_index_is_found_whatever_the_mode(make_set: MakeSet) -> None:
    shards = make_set()
    flip_byte(shards.index_paths[2], shards.index_paths[2].stat().st_size - 30)
    assert f"{shards.index_paths[2]}: damaged" in refusal(shards.path, verify="sizes")


def test_altered_sources_are_found(make_set: MakeSet) -> None:
    shards = make_set()
    flip_byte(shards.path / "sources.jsonl", 5)
    assert "sources.jsonl: damaged" in refusal(shards.path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ('{"format": "fastrepa-sh', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff\xfe", "not valid JSON|not the manifest"),
        ("[1, 2]", "not the manifest of a fastrepa data set"),
        ('{"name": "somebody else\'s"}', "not the manifest of a fastrepa data set"),
        ('{"format": "fastrepa-shards", "version": 9}', "format version 9, this fastrepa reads 1"),
        ('{"format": "fastrepa-shards", "version": 1}', "resolution: Field required"),
    ],
)
def test_foreign_and_corrupted_manifests(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'manifest.json'}: ")
    assert any(part in message for part in reason.split("|"))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b.tar", ".hidden", ""])
def test_manifest_cannot_name_files_elsewhere(make_set: MakeSet, name: str) -> None:
    shards = make_set()
    edit_manifest(shards, lambda manifest: manifest["shards"][0].update(file=name))
    assert "shards.0.file" in refusal(shards.path)


def test_counts_that_disagree_are_refused(make_set: MakeSet) -> None:
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda m: m["classes"][0].update(samples=10), "its counts are not those of the shards"),
        (lambda m: m.update(num_samples=35), "its counts are not those of the shards"),
        (lambda m: m["shards"][0].update(samples=7), "8 samples, the manifest says 7"),
        (lambda m: m["classes"].pop(), "a label outside the manifest's 2 classes"),
        (lambda m: m["shards"].pop(), "its counts are not those of the shards"),
        (lambda m: m.update(resolution="16"), "resolution: Input should be a valid integer"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs are not permitted"),
    ]
    for number, (change, reason) in enumerate(changes):
        shards = make_set(name=f"set{number}")
        edit_manifest(shards, change)
        assert reason in refusal(shards.path)


def test_index_beyond_its_shard_is_refused(make_set: MakeSet) -> None:
    for number, (field, value) in enumerate((("image_size", 10**6), ("image_offset", -1))):
        shards = make_set(name=f"set{number}")
        path = shards.index_paths[0]
        index = load_index(path)
        index[field][0] = value
        np.save(path, index)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        edit_manifest(shards, lambda m, d=digest: m["shards"][0]["index"].update(sha256=d))  # type: ignore[misc]
        assert f"{path}: a sample beyond the end of shard-00000.tar" in refusal(shards.path)


def test_index_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "shard.idx.npy"
    with pytest.raises(DataError, match="index is missing"):
        load_index(path)
    path.write_bytes(b"no numpy")
    with pytest.raises(DataError, match="not a readable shard index"):
        load_index(path)
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match="lacks key, label"):
        load_index(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a readable shard index"):
        load_index(path)
