"""Sources: class folders and the reference's layout, which is which, and reading one entry."""

from __future__ import annotations

import json
import os
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrepa.data.sources import entries
from fastrepa.data.sources.entries import ENTRY_DTYPE, Listing, read_entry, read_file, read_range
from fastrepa.data.sources.listing import list_source
from fastrepa.errors import DataError
from tests.sets.trees import CLASS_SIZES


def listed(source: Path, **options: Any) -> Listing:
    """The listing of a source, copies in `spool` beside it, checked for what always holds."""
    listing = list_source(source, spool=source.parent / "spool", progress=False, **options)
    assert listing.entries.dtype == ENTRY_DTYPE
    assert len(listing.entries) == len(listing.names) == len(set(listing.names))
    labels = listing.entries["label"]
    assert labels.min() >= 0 and labels.max() < len(listing.classes)
    return listing


def contents(listing: Listing) -> dict[str, tuple[str, bytes]]:
    """Class and bytes of every entry, by its name."""
    return {
        name: (listing.classes[listing.entries["label"][i]], read_entry(listing, i))
        for i, name in enumerate(listing.names)
    }


def reasons(listing: Listing) -> dict[str, str]:
    return {rejected.name: rejected.reason for rejected in listing.rejected}


def refused(source: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        listed(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_class_folders(tree: Path, tmp_path: Path) -> None:
    listing = listed(tree)
    assert listing.classes == sorted(CLASS_SIZES)
    assert np.bincount(listing.entries["label"]).tolist() == [9, 14, 11]
    assert listing.names == sorted(listing.names)
    assert contents(listing) == {
        f"{path.parent.name}/{path.name}": (path.parent.name, path.read_bytes())
        for path in tree.rglob("*.png")
    }
    assert (listing.entries["container"] == -1).all() and listing.containers == []
    assert listing.entries["size"].tolist() == [
        (tree / name).stat().st_size for name in listing.names
    ]
    assert not (tree.parent / "spool").exists()


def test_links_and_strays_of_folders(tree: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a" / ".hidden").mkdir(parents=True)
    (source / "a" / "up").symlink_to(source)
    (source / "b").symlink_to(tree / "bee")
    (source / "a" / "gone.png").symlink_to(source / "nowhere.png")
    (source / "a" / "loop.png").symlink_to(source / "a" / "loop.png")
    for name in ("a/.hidden/x.png", "a/._x.png", "a/notes.txt", "stray.png"):
        (source / name).write_bytes(b"x")
    listing = listed(source)
    assert listing.names[:2] == ["a/gone.png", "a/loop.png"]
    assert listing.entries["size"][:2].tolist() == [-1, -1]
    assert len(listing.names) == 2 + CLASS_SIZES["bee"]
    assert listing.ignored == ["stray.png", "a/notes.txt"]
    with pytest.raises(OSError, match="Too many levels"):
        read_entry(listing, 1)


def test_a_source_that_is_none(tree: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "absent")
    (tmp_path / "file.doc").write_bytes(b"x")
    assert "nor by its name an archive" in refused(tmp_path / "file.doc")
    (tmp_path / "empty").mkdir()
    assert "holds no class folders" in refused(tmp_path / "empty")
    (tmp_path / "half" / "void").mkdir(parents=True)
    assert "half/void: class folder without images; remove" in refused(tmp_path / "half")
    (tmp_path / "half" / "void" / "x.parquet").write_bytes(b"x")
    assert "it holds void/x.parquet: give that" in refused(tmp_path / "half")
    (tmp_path / "mixed").mkdir()
    for name in ("a.tar", "b.parquet"):
        (tmp_path / "mixed" / name).write_bytes(b"x")
    assert "b.parquet and a.tar; give one kind" in refused(tmp_path / "mixed")
    (tmp_path / "pipe.tar").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "pipe.tar")
    assert "not a regular file" in refused(tmp_path / "pipe.tar")


@pytest.mark.parametrize("argument", ["class_names", "image_column", "label_column"])
def test_arguments_that_do_not_apply(tree: Path, tmp_path: Path, argument: str) -> None:
    (tmp_path / "names.txt").write_text("a\nb\n")
    value = tmp_path / "names.txt" if argument == "class_names" else "x"
    expected = f"{argument.replace('_', ' ')} does not apply to a folder of class folders"
    assert expected in refused(tree, **{argument: value})
    assert "holds no folder x" in refused(tree, inside="x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "one class name on every line"),
        (b"a\n\nb\n", "one class name on every line"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_class_names_that_are_none(
    tree: Path, tmp_path: Path, text: bytes | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / "names.txt").write_bytes(text)
    assert expected in refused(tree, class_names=tmp_path / "names.txt")


# --- the reference's layout --------------------------------------------------------------------


def write_reference(root: Path, labels: dict[int, int]) -> Path:
    rows = []
    for number, label in labels.items():
        shard = f"{number // 2:05d}"
        for path, data in (
            (root / "images" / shard / f"img{number:08d}.png", b"picture %d" % number),
            (root / "vae-sd" / shard / f"img-mean-std-{number:08d}.npy", b"latents"),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        rows.append([f"{shard}/img-mean-std-{number:08d}.npy", label])
    # Not in order: pairing by position would be wrong.
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": rows[::-1]}))
    return root


def test_reference_layout_is_paired_by_name(tmp_path: Path) -> None:
    source = write_reference(tmp_path / "set", {0: 3, 1: 0, 2: 1, 3: 3, 4: 2, 5: 1})
    (source / "images" / "00000" / "img00000001.png").unlink()
    (source / "vae-sd" / "00001" / "img-mean-std-00000002.npy").unlink()
    (source / "images" / "dataset.json").write_text("{}")
    listing = listed(source)
    assert listing.classes == ["0", "1", "2", "3"]
    assert contents(listing) == {
        f"images/{n // 2:05d}/img{n:08d}.png": (str(label), b"picture %d" % n)
        for n, label in ((0, 3), (3, 3), (4, 2), (5, 1))
    }
    assert listing.moments == [
        f"vae-sd/{n // 2:05d}/img-mean-std-{n:08d}.npy" for n in (0, 3, 4, 5)
    ]
    assert reasons(listing) == {
        "vae-sd/00000/img-mean-std-00000001.npy": "latents without an image",
        "images/00001/img00000002.png": "no latents in vae-sd",
    }
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    short = listed(source, class_names=tmp_path / "names.txt")
    assert [kind for kind, _ in contents(short).values()] == ["c", "b"]
    assert reasons(short)["vae-sd/00000/img-mean-std-00000000.npy"] == "its label is 3, not 0..2"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("{", "not valid JSON"),
        ('{"labels": null}', 'no list "labels"'),
        ('{"labels": []}', 'no list "labels"'),
        ('[["a", 1]]', 'no list "labels"'),
        ('{"labels": [["../img-mean-std-00000000.npy", 1]]}', "labels[0] is"),
        ('{"labels": [["/etc/img-mean-std-0.npy", 1]]}', "labels[0] is"),
        ('{"labels": [["00000/img-mean-std-00000000.npy", null]]}', "its label is None"),
        ('{"labels": [["00000/img-mean-std-00000000.npy", true]]}', "its label is True"),
        ('{"labels": [["00000/img-mean-std-00000000.npy", 99999999]]}', "label is 99999999"),
        ('{"labels": [["7/img-mean-std-7.npy", 1]]}', "no usable label"),
    ],
)
def test_damaged_labels_of_the_reference(tmp_path: Path, labels: str, expected: str) -> None:
    source = write_reference(tmp_path / "set", {0: 0})
    (source / "vae-sd" / "dataset.json").write_text(labels)
    assert expected in refused(source)


def test_sample_labelled_twice_is_rejected(tmp_path: Path) -> None:
    source = write_reference(tmp_path / "set", {0: 0, 1: 1})
    path = source / "vae-sd" / "dataset.json"
    rows = json.loads(path.read_text())["labels"]
    path.write_text(json.dumps({"labels": [*rows, [rows[1][0], 1]]}))
    listing = listed(source)
    assert listing.names == ["images/00000/img00000001.png"]
    assert "labelled twice in dataset.json" in reasons(listing).values()


# --- reading -----------------------------------------------------------------------------------


def deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def test_ranges_are_read_exactly(tmp_path: Path) -> None:
    data = os.urandom(1000)
    packed = deflate(data)
    (tmp_path / "box").write_bytes(b"head" + packed + b"tail" + data)
    assert read_range(tmp_path / "box", 4, len(packed), len(data)) == data
    assert read_range(tmp_path / "box", 8 + len(packed), 1000) == data
    assert read_range(tmp_path / "box", 2, 0) == b""


def test_bad_ranges_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = deflate(bytes(50_000_000))
    (tmp_path / "box").write_bytes(bomb)
    monkeypatch.setattr(entries, "MAX_IMAGE_BYTES", 100_000)
    for offset, size, inflated, expected in (
        (0, len(bomb), 1000, "does not inflate to the 1000 bytes"),
        (0, len(bomb) // 2, 60_000, "does not inflate to the 60000"),
        (1, len(bomb) - 1, 1000, "damaged deflate stream"),
        (0, len(bomb), 50_000_000, "an image may have"),
        (0, len(bomb) + 1, -1, "ends 1 bytes too early"),
        (-1, 4, -1, "no range"),
    ):
        with pytest.raises(DataError, match=expected):
            read_range(tmp_path / "box", offset, size, inflated)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(100_001)
    os.mkfifo(tmp_path / "pipe.png")
    for name, expected in (("large.png", "an image may have"), ("pipe.png", "not a regular file")):
        with pytest.raises(DataError, match=f"{name}: .*{expected}"):
            read_file(tmp_path / name)
    with pytest.raises(DataError, match="not a regular file"):
        read_range(tmp_path / "pipe.png", 0, 1)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "absent.png")


def test_bomb_stays_in_its_box_and_an_end_is_wanted(tmp_path: Path) -> None:
    bomb = deflate(bytes(50_000_000))
    (tmp_path / "bomb").write_bytes(bomb)
    for inflated in (0, 1000):
        tracemalloc.start()
        with pytest.raises(DataError, match="does not inflate"):
            read_range(tmp_path / "bomb", 0, len(bomb), inflated)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000
    stream = zlib.compressobj(wbits=-15)
    endless = stream.compress(b"x" * 100) + stream.flush(zlib.Z_SYNC_FLUSH)
    (tmp_path / "endless").write_bytes(endless)
    with pytest.raises(DataError, match="does not inflate"):
        read_range(tmp_path / "endless", 0, len(endless), 100)


def test_few_files_stay_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for i in range(200):
        (tmp_path / f"{i}").write_bytes(b"%d" % i)
        assert read_range(tmp_path / f"{i}", 0, len(str(i))) == b"%d" % i
    assert len(os.listdir("/proc/self/fd")) - before <= 64
