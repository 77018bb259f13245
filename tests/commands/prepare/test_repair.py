"""Whatever becomes of a set's columns, verify names the command that makes them again.

Finished sets, and places that no set can have, are known before the work.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrepa.commands.prepare.encode import encode_columns
from fastrepa.commands.prepare.prepare import prepare
from fastrepa.commands.verify.verify import verify
from fastrepa.config import EncoderConfig
from fastrepa.data.format.shards import ShardSet, load_manifest
from fastrepa.errors import DataError
from fastrepa.runtime.files import sha256_of
from tests.runs import command, environment
from tests.sets.trees import write_tree
from tests.sets.written import RESOLUTION, write_reference

ENCODER = EncoderConfig(name="test_vit", weights="random", input=32)
SETTINGS: dict[str, Any] = {"resolution": 16, "workers": 0, "progress": False, "shard_size": 8}
ENCODED: dict[str, Any] = {
    "encoders": [ENCODER], "precision": "fp32", "device": torch.device("cpu"), "progress": False,
}  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    return {p.name: sha256_of(p) for p in folder.iterdir()}


@pytest.fixture(scope="module")
def encoded_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    prepare(write_tree(root / "tree", {"ant": 9, "bee": 10}), root / "set", **SETTINGS)
    encode_columns(root / "set", **ENCODED)
    return root / "set"


@pytest.fixture
def encoded(encoded_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoded_once, tmp_path / "set"))


def column_files(folder: Path) -> list[Path]:
    return [folder / record.file for record in load_manifest(folder).features[0].files]


def deleted(files: list[Path]) -> None:
    files[1].unlink()


def all_deleted(files: list[Path]) -> None:
    for file in files:
        file.unlink()


def emptied(files: list[Path]) -> None:
    files[0].write_bytes(b"")


def truncated(files: list[Path]) -> None:
    os.truncate(files[2], files[2].stat().st_size - 1)


def a_bit_flipped(files: list[Path]) -> None:
    raw = bytearray(files[1].read_bytes())
    raw[len(raw) // 2] ^= 1
    files[1].write_bytes(raw)


def header_damaged(files: list[Path]) -> None:
    raw = files[0].read_bytes()
    files[0].write_bytes(b"\0" * 80 + raw[80:])


def a_folder_instead(files: list[Path]) -> None:
    files[0].unlink()
    files[0].mkdir()
    files[0].rmdir()


@pytest.mark.parametrize(
    "damage",
    [deleted, all_deleted, emptied, truncated, a_bit_flipped, header_damaged, a_folder_instead],
)
def test_the_command_that_verify_names_mends_a_column(
    encoded: Path, damage: Callable[[list[Path]], None]
) -> None:
    whole, files = contents(encoded), column_files(encoded)
    damage(files)
    untouched = {f: f.stat().st_ino for f in files if f.exists() and sha256_of(f) == whole[f.name]}
    report = verify(encoded, workers=0, progress=False)
    assert {p.file for p in report.problems} == {f.name for f in files} - {
        f.name for f in untouched
    }
    with pytest.raises(DataError, match=r"`fastrepa data verify .*` says which command"):
        ShardSet.open(encoded, verify="full") if damage is a_bit_flipped else ShardSet.open(encoded)
    (said, repair) = report.repairs
    assert said.startswith("features.test_vit is made again")
    words = shlex.split(repair)
    assert words[:4] == ["fastrepa", "data", "encode", str(encoded)]
    done = subprocess.run(
        command(*words[1:]), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert contents(encoded) == whole
    assert {f: f.stat().st_ino for f in untouched} == untouched
    assert verify(encoded, workers=0, progress=False).ok


def test_without_replace_what_is_missing_is_made_and_what_is_there_is_not_read(
    encoded: Path,
) -> None:
    whole, files = contents(encoded), column_files(encoded)
    deleted(files)
    raw = bytearray(files[0].read_bytes())
    raw[-9] ^= 1
    files[0].write_bytes(raw)
    assert encode_columns(encoded, **ENCODED).kept == ()
    assert contents(encoded) == whole | {files[0].name: sha256_of(files[0])}
    assert encode_columns(encoded, **ENCODED).kept == ("features.test_vit",)
    encode_columns(encoded, **ENCODED, replace=True)
    assert contents(encoded) == whole


def test_what_no_command_makes_again_is_said(encoded: Path) -> None:
    shard = encoded / load_manifest(encoded).shards[0].file
    os.truncate(shard, 100)
    column_files(encoded)[0].unlink()
    report = verify(encoded, workers=0, progress=False)
    assert report.repairs[0].startswith("features.test_vit is made again")
    assert report.repairs[-1].startswith(f"{shard.name}: cannot be made again in place")


def test_a_second_encode_is_told_whose_the_set_is(encoded: Path) -> None:
    whole = contents(encoded)
    lock = os.open(encoded / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.write(lock, b"fastrepa data encode on node7, process 4711, since 2026-01-01T00:00:00+00:00")
    words = ("data", "encode", encoded, "--cache-features", "test_vit=random@32")
    done = subprocess.run(
        command(*words), env=environment(), capture_output=True, text=True, timeout=60
    )
    os.close(lock)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{encoded}: in use by fastrepa data encode on node7, process 4711" in done.stderr
    assert verify(encoded, workers=0, progress=False).notes == []
    (encoded / ".lock").unlink()
    assert contents(encoded) == whole


def test_a_finished_set_is_said_to_be_one(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"ant": 9, "bee": 10})
    prepare(tree, tmp_path / "set", **SETTINGS)
    whole = contents(tmp_path / "set")
    words = ("prepare", tree, tmp_path / "set", "--resolution", 16, "--shard-size", 8)
    done = subprocess.run(
        command(*words), env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr
    assert f"{tmp_path / 'set'} is finished already, 19 images" in done.stdout.replace("\n", " ")
    assert contents(tmp_path / "set") == whole and sorted(os.listdir(tmp_path)) == ["set", "tree"]
    for other, named in (
        ({"resolution": 32}, "resolution 16, not 32"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"image_format": "jpeg"}, "image format png, not jpeg"),
        ({"shard_size": 10}, "8 images in a shard, not 10"),
        ({"shard_size": 5}, "8 images in a shard, not 5"),
    ):
        with pytest.raises(DataError, match=named):
            prepare(tree, tmp_path / "set", **SETTINGS | other)
    assert contents(tmp_path / "set") == whole
    # The columns that it lacks are what is asked for.
    done_again = prepare(
        tree, tmp_path / "set", **SETTINGS,
        encode=lambda folder, world: encode_columns(folder, **ENCODED, world=world),
    )  # fmt: skip
    assert done_again.was_there and len(load_manifest(tmp_path / "set").features) == 1
    assert verify(tmp_path / "set", workers=0, progress=False).ok


def test_a_finished_set_that_lost_images_is_none(encoded: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"ant": 9, "bee": 10})
    column_files(encoded)[0].unlink()  # which prepare was not asked for
    assert prepare(tree, encoded, **SETTINGS).was_there
    shard = encoded / load_manifest(encoded).shards[1].file
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name}: missing"):
        prepare(tree, encoded, **SETTINGS)


def test_latents_of_repas_layout_are_mended_by_the_command_that_verify_names(
    tmp_path: Path,
) -> None:
    source, out = write_reference(tmp_path / "source"), tmp_path / "set"
    first = ("prepare", source, out, "--resolution", RESOLUTION, "--shard-size", 9, "--seed", 3)

    def run(*words: object) -> str:
        done = subprocess.run(
            command(*words), env=environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(*first)
    whole = contents(out)
    moments = load_manifest(out).moments
    assert moments is not None
    files = [out / record.file for record in moments.files]
    deleted(files)
    raw = bytearray(files[0].read_bytes())
    raw[-9] ^= 1
    files[0].write_bytes(raw)
    said, repair = verify(out, workers=0, progress=False).repairs
    assert said.startswith("moments is made again")
    typed, comma, _ = repair.partition(", with the source")
    words = [str(source) if word == "SOURCE" else word for word in shlex.split(typed)]
    assert comma and words[0] == "fastrepa"
    run(*words[1:])
    assert contents(out) == whole


def test_out_is_looked_at_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tree(tmp_path / "tree", {"ant": 3})
    (tmp_path / "disk").mkdir()
    for name, target in (("link", "disk"), ("dangling", "elsewhere/new"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    prepare(tree, tmp_path / "link", **SETTINGS)
    prepare(tree, f"{tmp_path}/dangling/", **SETTINGS)
    for place in ("disk", "elsewhere/new"):
        assert verify(tmp_path / place, workers=0, progress=False).ok
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "into").symlink_to(tree)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, words in (
        (tmp_path / "loop", "cannot be a folder"),
        (tmp_path / ("n" * 250), "File name too long"),
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / "into" / "out", "lies inside the source"),
        (Path("."), "the folder that you are in"),
        (Path("../here"), "the folder that you are in"),
        (Path("/proc/sys"), "is not empty"),
    ):
        with pytest.raises(DataError, match=words):
            prepare(tree, out, **SETTINGS)
    assert os.listdir(tmp_path / "here") == []
    assert not list(tmp_path.glob(".*.partial"))
