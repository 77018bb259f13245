"""Preparing: deterministic, all or nothing, and one line about whatever is wrong."""

from __future__ import annotations

import fcntl
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastrepa.commands.prepare.prepare import PrepareReport, prepare
from fastrepa.commands.prepare.report import print_report
from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import ShardSet
from fastrepa.data.images import load_square
from fastrepa.errors import DataError
from tests.sets.trees import CLASS_SIZES, RESOLUTION, noise, write_tree


def run(source: Path, out: Path, **options: Any) -> PrepareReport:
    settings = {"resolution": RESOLUTION, "shard_size": 8, "workers": 0, "progress": False}
    return prepare(source, out, **{**settings, **options})  # type: ignore[arg-type]


def rejected(done: PrepareReport) -> list[tuple[str, str]]:
    return [(record.source, record.reason) for record in done.report.rejected]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(source: Path, out: Path, **options: Any) -> str:
    """The one line with which preparing fails; `out` stays as it was.

    What is done is kept, and the line says so, or nothing is left behind.
    """
    parent, partial = out.parent, out.parent / f".{out.name}.partial"
    before = sorted(os.listdir(parent)) if parent.is_dir() else None
    with pytest.raises(DataError) as caught:
        run(source, out, **options)
    message = str(caught.value)
    assert "\n" not in message
    if before is not None:
        kept = [partial.name] if (partial / "plan.json").exists() else []
        assert sorted(os.listdir(parent)) == sorted({*before, *kept})
        assert (str(partial) in message) >= bool(kept)
    return message.replace(
        f"; what is done is kept in {partial}, and the same command goes on there", ""
    )


def test_report_and_manifest(tree: Path, tmp_path: Path) -> None:
    done = run(tree, tmp_path / "out")
    assert done.report.counts == CLASS_SIZES
    assert (done.report.images, done.report.shards, done.report.resolution) == (34, 5, 16)
    assert done.num_bytes == sum(len(data) for data in contents(tmp_path / "out").values())
    assert (rejected(done), done.ignored) == ([], [])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["image_format"] == "png"
    assert manifest["quality"] is None
    sources = [json.loads(line) for line in (tmp_path / "out" / "sources.jsonl").open()]
    assert sorted(sources) == sorted(
        str(path.relative_to(tree)) for path in tree.rglob("*.png") if path.is_file()
    )


def test_shuffled_over_all_shards(tree: Path, tmp_path: Path) -> None:
    run(tree, tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    # Every class in (nearly) every shard; unshuffled, the first shard would be all ants.
    assert all(len(set(load_index(p)["label"].tolist())) == 3 for p in shards.index_paths[:4])
    run(tree, tmp_path / "other", seed=1)
    assert contents(tmp_path / "out") != contents(tmp_path / "other")


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_workers(tree: Path, tmp_path: Path, workers: int) -> None:
    (tree / "bee" / "broken.png").write_bytes(b"no image")
    try:
        for image_format in ("png", "jpeg"):
            options = {"image_format": image_format, "skip_bad": True}
            alone, several = tmp_path / f"0{image_format}", tmp_path / f"n{image_format}"
            done = run(tree, alone, **options)
            other = run(tree, several, workers=workers, **options)
            assert contents(alone) == contents(several)
            assert rejected(done) == rejected(other) == [("bee/broken.png", REASON)]
    finally:
        (tree / "bee" / "broken.png").unlink()


REASON = "no image format that Pillow knows"


def test_unreadable_image_is_named_or_skipped_and_counted(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"a": 3, "b": 20})
    (tree / "a" / "01.png").write_bytes((tree / "a" / "01.png").read_bytes()[:-60])
    (tree / "b" / "10.jpg").write_bytes(b"")
    for workers in (0, 2):
        message = refusal(tree, tmp_path / "out", workers=workers)
        assert f"{tree}/a/01.png: unreadable" in message or f"{tree}/b/10.jpg: unread" in message
    done = run(tree, tmp_path / "out", skip_bad=True)
    assert dict(rejected(done)).keys() == {"a/01.png", "b/10.jpg"}
    assert done.report.counts == {"a": 2, "b": 20}
    shards = ShardSet.open(tmp_path / "out")
    assert {record.source for record in shards.manifest.skipped} == {"a/01.png", "b/10.jpg"}
    sources = [json.loads(line) for line in (tmp_path / "out" / "sources.jsonl").open()]
    assert sources.count(None) == 2
    # A key still names its source.
    for shard, index_path in zip(shards.shard_paths, shards.index_paths, strict=True):
        for record in load_index(index_path):
            start = int(record["image_offset"])
            data = shard.read_bytes()[start : start + int(record["image_size"])]
            (tmp_path / "one.png").write_bytes(data)
            source = load_square((tree / sources[int(record["key"])]).read_bytes(), RESOLUTION)
            assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), np.asarray(source))


def test_shard_of_unreadable_images_is_left_out(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"a": 6})
    for i in range(5):
        (tree / "a" / f"{i:02d}.png").write_bytes(b"x")
    done = run(tree, tmp_path / "out", skip_bad=True, shard_size=1)
    assert (done.report.images, done.report.shards, len(done.report.rejected)) == (1, 1, 5)
    assert ShardSet.open(tmp_path / "out").num_samples == 1
    (tree / "a" / "05.png").write_bytes(b"x")
    message = refusal(tree, tmp_path / "none", skip_bad=True)
    assert message == f"{tree}/a: class without a readable image"


def test_labels_that_leave_numbers_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, label in enumerate((0, 3, 3)):
            Image.fromarray(noise(key, 16, 16)).save(tmp_path / "one.png")
            tar.add(tmp_path / "one.png", f"{key}.png")
            (tmp_path / "one.cls").write_text(str(label))
            tar.add(tmp_path / "one.cls", f"{key}.cls")
    done = run(tmp_path / "a.tar", tmp_path / "out")
    assert done.report.counts == {"0": 1, "1": 0, "2": 0, "3": 2}
    assert ShardSet.open(tmp_path / "out", verify="full").classes == ["0", "1", "2", "3"]


def test_a_flat_folder_is_one_class(tmp_path: Path) -> None:
    flat = write_tree(tmp_path / "photos", {"birds": 3}) / "birds"
    screen = Console(width=200, file=io.StringIO())
    done = run(flat, tmp_path / "out")
    print_report(done.report, screen, done.path, done.images, done.seconds)
    assert ShardSet.open(tmp_path / "out").classes == ["birds"]
    said = screen.file.getvalue()  # type: ignore[attr-defined]
    assert (
        "3 images of 1 class in 1 shard " in said and "all images are of one class, birds" in said
    )
    assert f"fastrepa data show {tmp_path}/out" in said and "model.num_classes=1" in said
    (flat / "00_mask.png").write_bytes((flat / "00.png").read_bytes())
    assert "00_mask.png lies beside 00.png as its mask" in refusal(flat, tmp_path / "other")
    (flat / "00_mask.png").unlink()
    (flat / "labels.csv").write_text("00.png,wren\n01.png,crow\n02.png,wren\n")
    assert "labels.csv looks like labels" in refusal(flat, tmp_path / "other")


def test_nothing_sensible_to_prepare(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert refusal(tmp_path / "absent", out).endswith("absent: no such file or folder")
    (tmp_path / "file").write_text("")
    assert "not a folder" in refusal(tmp_path / "file", out)
    (tmp_path / "empty").mkdir()
    assert "holds no class folders" in refusal(tmp_path / "empty", out)
    (tmp_path / "empty" / "notes.txt").write_text("not an image")
    assert "holds no class folders" in refusal(tmp_path / "empty", out)
    half = write_tree(tmp_path / "half", {"full": 2})
    (half / "void").mkdir()
    assert f"{half}/void: class folder without images" in refusal(half, out)
    (half / "void" / "notes.txt").write_text("not an image")
    (half / "void" / ".hidden.png").write_bytes((half / "full" / "00.png").read_bytes())
    assert f"{half}/void: class folder without images" in refusal(half, out)


def test_places_that_cannot_be_written(tree: Path, tmp_path: Path) -> None:
    assert "cannot be written" in refusal(tree, Path("/proc/fastrepa/out"))
    (tmp_path / "file").write_text("keep me")
    assert "exists and is no folder" in refusal(tree, tmp_path / "file")
    assert "cannot be written" in refusal(tree, tmp_path / "file" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    assert "not empty; nothing was changed" in refusal(tree, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "keep me"
    assert "lies inside the source" in refusal(tree, tree / "ant" / "out")
    assert "lies inside the source" in refusal(tree, tree)
    (tmp_path / "vacant").mkdir()
    assert run(tree, tmp_path / "vacant").report.images == 34


@pytest.mark.parametrize("workers", [0, 2])
def test_disk_full_is_one_line_and_the_work_goes_on(
    tree: Path, tmp_path: Path, workers: int
) -> None:
    """A file-size limit stands in for the full disk: writing a shard fails half-way."""
    limited = subprocess.run(
        [sys.executable, "-c", PREPARE, str(tree), str(tmp_path / "out"), str(workers), "8"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
        capture_output=True,
        text=True,
    )
    last = limited.stderr.strip().splitlines()[-1]
    partial = tmp_path / ".out.partial"
    assert f"DataError: {tmp_path / 'out'}: cannot be written (File too large); " in last
    assert last.endswith(f"kept in {partial}, and the same command goes on there"), limited.stderr
    assert not list(partial.glob("shard*")) + list(partial.glob(".shard*"))
    run(tree, tmp_path / "out")
    run(tree, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_settings_out_of_range(tree: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"image_format": "jpg"}, "'jpg' is not one of jpeg, png, webp (did you mean 'jpeg'?)"),
        ({"resolution": 0}, "resolution 0 is outside"),
        ({"shard_size": 0}, "shard size 0 is outside"),
        ({"quality": 101}, "quality 101 is outside"),
        ({"seed": -1}, "seed -1 is outside"),
    ):
        assert message in refusal(tree, tmp_path / "out", **options)
    assert run(tree, tmp_path / "out", seed=2**64 - 1).report.images == 34


def test_names_of_every_kind(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"Zebra": 1, "apple": 1, "Ünïcode ✨": 1})
    picture = (tree / "apple" / "00.png").read_bytes()
    strange = ["00.jpg", "00.PNG", "line\nbreak.png", "a'b\"c.png", "x" * 240 + ".png", "00.jpeg"]
    for name in strange:
        (tree / "apple" / name).write_bytes(picture)
    (tree / "apple" / "deeper" / "still").mkdir(parents=True)
    (tree / "apple" / "deeper" / "still" / "00.png").write_bytes(picture)
    raw = os.fsencode(tree / "apple") + b"/not\xffutf8.png"
    with open(raw, "wb") as file:
        file.write(picture)
    for hidden in (".DS_Store", "._00.png"):
        (tree / "apple" / hidden).write_bytes(b"\0")
    (tree / ".git").mkdir()
    for ignored in ("readme.txt", "apple/labels.csv"):
        (tree / ignored).write_text("")
    done = run(tree, tmp_path / "out")
    # Class index = rank of the sorted name; capitals come first.
    assert done.report.counts == {"Zebra": 1, "apple": 9, "Ünïcode ✨": 1}
    assert done.ignored == ["readme.txt", "apple/labels.csv"]
    assert ShardSet.open(tmp_path / "out").classes == ["Zebra", "apple", "Ünïcode ✨"]
    sources = [json.loads(line) for line in (tmp_path / "out" / "sources.jsonl").open()]
    assert os.fsdecode(b"apple/not\xffutf8.png") in sources
    # An error about such a name is still one printable line.
    with open(raw, "wb") as file:
        file.write(b"")
    (tree / "apple" / "line\nbreak.png").write_bytes(b"")
    for _ in range(2):
        message = refusal(tree, tmp_path / "again")
        message.encode("utf-8")
        named = "line\\nbreak.png" if "line" in message else "not\\udcffutf8.png"
        assert named in message
        (tree / "apple" / "line\nbreak.png").write_bytes(picture)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"a": 2})
    elsewhere = write_tree(tmp_path / "elsewhere", {"b": 3})
    (tree / "b").symlink_to(elsewhere / "b")
    (tree / "a" / "up").symlink_to(tree)
    (tree / "a" / "self").symlink_to(tree / "a")
    assert run(tree, tmp_path / "out").report.counts == {"a": 2, "b": 3}
    (tree / "a" / "dangling.png").symlink_to(tmp_path / "gone.png")
    assert "a/dangling.png: unreadable image (No such file" in refusal(tree, tmp_path / "no")
    (tree / "a" / "dangling.png").unlink()
    (tree / "a" / "knot.png").symlink_to(tree / "a" / "knot.png")
    assert "a/knot.png: unreadable image (Too many levels" in refusal(tree, tmp_path / "no")


# --- interrupted -------------------------------------------------------------------------------

PREPARE = """
import sys
from fastrepa.commands.prepare.prepare import prepare
prepare(sys.argv[1], sys.argv[2], resolution=16, shard_size=int(sys.argv[4]),
        workers=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def big_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to one large image: minutes of work in little space."""
    root = tmp_path_factory.mktemp("big")
    Image.effect_noise((2000, 1500), 80).convert("RGB").save(root / "large.png", compress_level=1)
    for i in range(2000):
        path = root / "tree" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(root / "large.png")
    return root / "tree"


def start(source: Path, out: Path, workers: int) -> subprocess.Popen[str]:
    """A prepare that has begun to write."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(source), str(out), str(workers), "1000"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    partial = out.parent / f".{out.name}.partial"
    wait_for(lambda: any(partial.glob(".shard-*.tar.*.tmp")))
    assert process.poll() is None
    return process


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def group_is_gone(leader: int) -> bool:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            return False
    return True


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_keeps_what_is_done(big_tree: Path, tmp_path: Path, workers: int) -> None:
    process = start(big_tree, tmp_path / "out", workers)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert errors.count("Traceback") == 1  # this program's own; workers stay silent
    assert "KeyboardInterrupt" in errors
    assert "the same command goes on there" in errors
    wait_for(lambda: group_is_gone(process.pid))
    assert os.listdir(tmp_path) == [".out.partial"]
    assert not list((tmp_path / ".out.partial").glob(".*.tmp"))


def test_killed_run_is_taken_over(big_tree: Path, tree: Path, tmp_path: Path) -> None:
    process = start(big_tree, tmp_path / "out", 2)
    message = refusal(tree, tmp_path / "out")
    assert message.startswith(f"{tmp_path / '.out.partial'}: in use by fastrepa prepare on ")
    assert f", process {process.pid}, since " in message
    process.kill()
    process.communicate()
    # No shard was finished, so nothing is lost by another source. Its workers are awaited.
    run(tree, tmp_path / "out")
    assert group_is_gone(process.pid)
    run(tree, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "out"]


def test_killed_worker_is_one_line(big_tree: Path, tmp_path: Path) -> None:
    process = start(big_tree, tmp_path / "out", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    last = errors.strip().splitlines()[-1]
    assert "a worker was killed, perhaps for want of memory; use fewer workers; what" in last
    assert os.listdir(tmp_path) == [".out.partial"]


def test_foreign_folder_in_the_way_is_left_alone(tree: Path, tmp_path: Path) -> None:
    keep = tmp_path / ".out.partial" / "mine"
    keep.mkdir(parents=True)
    (keep / "thesis.txt").write_text("keep me")
    assert "it holds mine, which is none of ours" in refusal(tree, tmp_path / "out")
    assert (keep / "thesis.txt").read_text() == "keep me"


def test_lock_is_released(tree: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    lock = os.open(tmp_path / ".out.partial" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "in use by another process" in refusal(tree, tmp_path / "out")
    os.close(lock)
    run(tree, tmp_path / "out")
    run(tree, tmp_path / "out2")


def test_a_run_waits_for_writers_of_the_last(tree: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    script = "import sys, time; from pathlib import Path; from fastrepa.data.format.partial import "
    script += "join_writers; join_writers(Path(sys.argv[1])); print(1, flush=True); time.sleep(0.5)"
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / ".out.partial")], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None and writer.stdout.readline() == b"1\n"
    run(tree, tmp_path / "out")
    assert writer.poll() == 0
    writer.stdout.close()


def test_progress_bar_counts_every_image(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for workers in (0, 2):
        run(tree, tmp_path / f"out{workers}", workers=workers, progress=True)
        captured = capsys.readouterr()
        assert "34/34" in captured.err
        assert captured.out == ""
