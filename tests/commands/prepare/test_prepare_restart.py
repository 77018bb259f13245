"""Preparing goes on: killed at any moment, or on several ranks, it makes the undisturbed set."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from fastrepa.commands.prepare.prepare import prepare
from fastrepa.data.format.shards import ShardSet
from fastrepa.errors import DataError
from tests import runs
from tests.sets.trees import write_tree

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}/engine:{ROOT}/kernels"}
RESOLUTION = 160


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(source: Path, out: Path, *more: object) -> list[str]:
    words = ["-m", "fastrepa", "prepare", source, out, "--resolution", RESOLUTION]
    return [sys.executable, *map(str, [*words, "--shard-size", 6, "--skip-bad", *more])]


def spawn(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """66 images in 3 classes, two of them damaged, one twice."""
    root = write_tree(tmp_path_factory.mktemp("restart") / "source", {"a": 20, "b": 26, "c": 20})
    (root / "a" / "bad.png").write_bytes(b"no image")
    (root / "c" / "cut.png").write_bytes((root / "c" / "00.png").read_bytes()[:-40])
    shutil.copy(root / "b" / "03.png", root / "b" / "again.png")
    return root


@pytest.fixture(scope="module")
def archive(source: Path) -> Path:
    """The same in a compressed tar, which is unpacked into the partial folder."""
    path = source.parent / "source.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(source, ".")
    return path


@pytest.mark.parametrize(("kind", "workers"), [("folder", 1), ("archive", 2)])
def test_killed_at_random_moments(
    source: Path, archive: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    """Ten times each, over the whole run: SIGKILL to all processes, then the same command."""
    images = source if kind == "folder" else archive
    started = time.monotonic()
    subprocess.run(
        command(images, tmp_path / "whole", "--workers", workers),
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
    )
    whole, undisturbed = time.monotonic() - started, contents(tmp_path / "whole")
    draws, kills, rounds = random.Random(workers), 0, 0
    while kills < 10 or not (tmp_path / f"out{rounds}").exists():
        out = tmp_path / f"out{rounds}"
        process = spawn(command(images, out, "--workers", workers))
        try:
            _, errors = process.communicate(
                timeout=draws.uniform(0.3, 1.1) * whole if kills < 10 else 60
            )
            assert process.returncode == 0, errors
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        if out.exists():  # it appears when it is complete, so also where the kill came after that
            assert contents(out) == undisturbed
            rounds += kills < 10
    assert not list(tmp_path.glob(".*"))


class _CrashError(BaseException):
    """Nothing catches it; it stands for a kill just before one change of the disk."""


def test_killed_before_every_change_of_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"resolution": 16, "shard_size": 40, "skip_bad": True, "workers": 0}
    columns = []

    def encode(folder: Path, ranks: object) -> None:
        ShardSet.open(folder)  # complete, and may be called again
        columns.append(folder)

    def make(out: Path) -> None:
        prepare(source, out, progress=False, encode=encode, **options)

    make(tmp_path / "whole")
    undisturbed = contents(tmp_path / "whole")
    changes, crash_at = 0, 0

    def crashing(real: Any) -> Any:
        def change(*args: Any, **more: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == crash_at:
                raise _CrashError
            return real(*args, **more)

        return change

    for name in ("replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, crashing(getattr(os, name)))
    while True:
        crash_at += 1
        changes = 0
        out = tmp_path / f"out{crash_at}"
        try:
            make(out)
            break
        except _CrashError:
            assert not out.exists()
        changes = -1000
        make(out)
        assert contents(out) == undisturbed, crash_at
    assert crash_at > 20
    assert contents(out) == undisturbed
    assert not list(tmp_path.glob(".*"))


def partly(source: Path, out: Path, **options: Any) -> Path:
    """Run until the first shards are done; returns the partial folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastrepa.commands.prepare.prepare._finish", _crash)
        with pytest.raises(_CrashError):
            prepare(source, out, progress=False, workers=0, **options)
    return out.parent / f".{out.name}.partial"


def _crash(*_: object) -> None:
    raise _CrashError


OPTIONS: dict[str, Any] = {"resolution": 16, "shard_size": 8, "skip_bad": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"resolution": 24}, "resolution 16, now 24"),
        ({"shard_size": 9}, "shard size 8, now 9"),
        ({"image_format": "jpeg"}, "image format png, now jpeg; quality None, now 95"),
        ({"seed": 3}, "seed 0, now 3"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(
    source: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    partial = partly(source, tmp_path / "out", **OPTIONS)
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("shard*")}
    assert len(before) == 27  # 9 shards of three files
    with pytest.raises(DataError) as caught:
        prepare(source, tmp_path / "out", progress=False, workers=0, **{**OPTIONS, **change})
    assert said in str(caught.value)
    assert f"to start again, delete {partial}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name: path.stat().st_mtime_ns for path in partial.glob("shard*")} == before
    done = prepare(source, tmp_path / "out", progress=False, workers=2, **OPTIONS)
    assert done.images == 0  # nothing was made twice


def test_a_changed_source_is_refused(source: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(source, tree)
    partial = partly(tree, tmp_path / "out", **OPTIONS)

    def refused() -> str:
        with pytest.raises(DataError) as caught:
            prepare(tree, tmp_path / "out", progress=False, workers=0, **OPTIONS)
        assert f"to start again, delete {partial}" in str(caught.value)
        return str(caught.value)

    new = tree / "b" / "new.png"
    shutil.copy(tree / "b" / "00.png", new)
    assert "69 images then, 70 now: b/new.png is new" in refused()
    new.unlink()
    kept = (tree / "a" / "00.png").read_bytes()
    (tree / "a" / "00.png").write_bytes(kept + b"longer")
    assert "a/00.png has another size, place or label" in refused()
    (tree / "a" / "00.png").unlink()
    assert "a/00.png is gone" in refused()
    (tree / "a" / "00.png").write_bytes(kept)
    (tree / "c").rename(tree / "d")
    assert "classes" in refused()
    (tree / "d").rename(tree / "c")
    # The source may lie elsewhere by now, and workers and progress may be others.
    tree.rename(tmp_path / "moved")
    prepare(tmp_path / "moved", tmp_path / "out", progress=False, workers=2, **OPTIONS)
    prepare(source, tmp_path / "whole", progress=False, workers=0, **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_skip_bad_may_be_given_later_but_not_taken_back(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    strict = {**OPTIONS, "skip_bad": False}
    with pytest.raises(DataError, match=r"unreadable image \(.*; --skip-bad leaves such out"):
        prepare(source, out, progress=False, workers=0, **strict)
    partly(source, out, **OPTIONS)
    with pytest.raises(DataError, match="--skip-bad leaves such out"):
        prepare(source, out, progress=False, workers=0, **strict)
    assert len(prepare(source, out, progress=False, **OPTIONS).report.rejected) == 2


def test_columns_go_on_without_the_source(source: Path, tmp_path: Path) -> None:
    tree, out, calls = tmp_path / "tree", tmp_path / "out", []
    shutil.copytree(source, tree)

    def fails(folder: Path, ranks: object) -> None:
        calls.append(folder)
        raise DataError("no weights")

    with pytest.raises(DataError, match="no weights; what is done is kept"):
        prepare(tree, out, progress=False, workers=0, encode=fails, **OPTIONS)
    assert calls == [tmp_path / ".out.partial"]
    shutil.rmtree(tree)
    with pytest.raises(DataError, match="resolution 16, now 24"):
        prepare(tree, out, progress=False, workers=0, **{**OPTIONS, "resolution": 24})
    done = prepare(tree, out, progress=False, workers=0, encode=lambda *_: None, **OPTIONS)
    assert (done.report.images, done.images) == (67, 0)


# --- several ranks -----------------------------------------------------------------------------


def test_two_ranks_make_the_same_set(source: Path, tmp_path: Path) -> None:
    settings = ["--resolution", 16, "--shard-size", 8]
    arguments = [source, tmp_path / "together", *settings, "--workers", 2]
    together = runs.command("prepare", *arguments, ranks=2)
    refused = subprocess.run(together, env=ENVIRONMENT, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "unreadable image" in refused.stderr
    assert "Traceback" not in refused.stderr.split("ChildFailedError")[0].split("torch/")[0]
    together.append("--skip-bad")
    done = subprocess.run(together, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("67 images of 3 classes in 9 shards") == 1
    assert "69/69 images" in done.stderr
    prepare(source, tmp_path / "alone", progress=False, workers=0, **OPTIONS)
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_one_process_does_without_torch(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from fastrepa.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    words = ["prepare", source, tmp_path / "out", "--resolution", 16, "--skip-bad"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "67 images of 3 classes" in done.stdout
