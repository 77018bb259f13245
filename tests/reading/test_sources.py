"""Folders, archives and tables of others: splits and masks are never classes, names are kept."""

from __future__ import annotations

import io
import json
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from fastrepa.commands.prepare.plan import _Record as PlanRecord
from fastrepa.commands.prepare.prepare import PrepareReport, prepare
from fastrepa.commands.prepare.report import print_report, read_report
from fastrepa.data.format.shards import ShardSet
from tests.runs import command, environment
from tests.sets.archives import Files, tar_bytes, written, zip_bytes
from tests.sets.sources import (
    KINDS,
    PNG,
    classes,
    counts,
    listed,
    made,
    pictures,
    refused,
    table,
)


def picture(label: int, number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 12, 3), (label * 20, number, 0), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def prepared(source: Path, out: Path, **options: Any) -> PrepareReport:
    return prepare(source, out, resolution=8, workers=0, progress=False, **options)


# --- folders get the care of archives ------------------------------------------------------------


SPLITS: dict[str, tuple[Files, str]] = {
    "three": (classes("train/a", "train/b", "val/a", "val/b", "test/a"), "train"),
    "any case": (classes("Train/a", "Train/b", "Valid/a"), "Train"),
    "years": (classes("train2017/a", "train2017/b", "val2017/a"), "train2017"),
    "one word more": (classes("train_images/a", "train_images/b", "test_images/a"), "train_images"),
    "before and after": (classes("X_train_HR/a", "X_train_HR/b", "X_valid_HR/a"), "X_train_HR"),
    "beside others": (classes("train/a", "train/b", "test/a", "extra/a"), "train"),
    "one unlabelled": (classes("train/a", "train/b") | pictures("val/0.png"), "train"),
    "deep": (classes("I/D/C/train/a", "I/D/C/train/b") | pictures("I/D/C/val/0.png"),
             "I/D/C/train"),
    "keys": ({**classes("train", "val"), **{f"train/{i}.cls": b"%d" % (i % 2) for i in range(3)},
              **{f"val/{i}.cls": b"1" for i in range(3)}}, "train"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_splits_are_no_classes(tmp_path: Path, case: str) -> None:
    files, train = SPLITS[case]
    for kind in KINDS:
        source = made(tmp_path / kind, kind, files)
        message = refused(source)
        assert f"no classes; give one of them, --inside {train}" in message
        assert (" or its path" in message) == (kind == "folder")
        assert len(counts(source, inside=train)) == 2
        assert len(counts(source, inside=f"/{train}/")) == 2
        if kind == "folder":
            assert len(counts(source / train)) == 2


def test_splits_inside_a_class(tmp_path: Path) -> None:
    files = classes("a/train/x", "a/test/x", "b/train/x")
    for kind in KINDS:
        source = made(tmp_path / kind, kind, files)
        assert "a holds test, train, splits inside a class" in refused(source)
        assert counts(source, inside=".") == {"a": 6, "b": 3}


@pytest.mark.parametrize(
    "names",
    [
        ("test", "cat", "dog"),
        ("train", "bus", "car"),  # a vehicle
        ("bullet_train", "crash_test", "cat"),
        ("test_tube", "train_station"),
        ("mask", "hat"),
        ("with_mask", "without_mask"),
        ("images",),
        ("0", "1", "10"),
    ],
)
def test_classes_that_are_called_so(tmp_path: Path, names: tuple[str, ...]) -> None:
    for kind in KINDS:
        assert counts(made(tmp_path / kind, kind, classes(*names))) == dict.fromkeys(names, 3)


def test_folders_as_they_are(tmp_path: Path) -> None:
    for kind in KINDS:
        source = made(tmp_path / kind, kind, classes("x/train", "x/test", "x/masks", "x/images"))
        assert "--inside x/. to take all as they are" in refused(source)
        every = {"train": 3, "test": 3, "masks": 3, "images": 3}
        assert counts(source, inside="x/.") == every
        assert counts(source, inside=".") == {"x": 12}
        assert "'..' leads out" in refused(source, inside="x/../..")
        below = "holds no folder" if kind == "folder" else "holds no image below"
        assert f"{below} y" in refused(source, inside="y")


def test_shared_top_folders(tmp_path: Path) -> None:
    deep = classes("a/b/cat", "a/b/dog") | {"a/notes.txt": b"x", "a/xml/1.xml": b"x"}
    for kind in KINDS:
        assert counts(made(tmp_path / kind, kind, deep)) == {"cat": 3, "dog": 3}
        one = made(tmp_path / kind / "one", kind, classes("all"))
        assert counts(one) == {"all": 3}
        mixed = made(tmp_path / kind / "mixed", kind, pictures("all/0.png", "all/more/1.png"))
        assert counts(mixed) == {"all": 2}
    (tmp_path / "folder" / "set" / "fox").mkdir()  # may have been meant as a class
    assert "fox: class folder without images" in refused(tmp_path / "folder" / "set")


def test_hidden_entries(tmp_path: Path) -> None:
    files = classes("cat", "dog") | pictures(
        ".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0.png", "cat/._0.png",
        "__MACOSX/cat/0.png", "cat/@eaDir/0.png",
    ) | {".DS_Store": b"x"}  # fmt: skip
    for kind in KINDS:
        listing = listed(made(tmp_path / kind, kind, files))
        assert (listing.classes, len(listing.names)) == (["cat", "dog"], 6)
        assert (listing.ignored, listing.rejected) == ([], [])


def test_linked_folders(tmp_path: Path) -> None:
    source = made(tmp_path, "folder", classes("cat"))
    made(tmp_path / "elsewhere", "folder", classes("dog"))
    (source / "dog").symlink_to(tmp_path / "elsewhere/set/dog")
    (source / "cat/link.png").symlink_to(tmp_path / "elsewhere/set/dog/0.png")
    (source / "cat/loop").symlink_to("..")
    assert counts(source) == {"cat": 4, "dog": 3}


MASKS: dict[str, Files] = {
    "by name": classes("images", "masks"),
    "segmentation": classes("JPEGImages", "SegmentationClass"),
    "deep": classes("data/img", "data/gt"),
    "in classes": classes("a/images", "a/labels", "b/images", "b/labels"),
    "suffix": classes("cat", "cat_mask", "dog"),
    "beside": pictures("a/x (1).png", "a/x (1)_mask.png", "b/y.png"),
    "trimaps": classes("images") | {f"annotations/trimaps/{i}.png": PNG for i in range(3)},
    "same names": pictures(*(f"{f}/2007_{n}.png" for f in "ab" for n in ("000032", "39", "999"))),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_are_no_class(tmp_path: Path, case: str) -> None:
    for kind in KINDS:
        source = made(tmp_path / kind, kind, MASKS[case])
        message = refused(source)
        assert "mask" in message and "to take all as they are" in message
        taken = message.split("--inside ")[-1].split(" to take")[0]
        assert sum(counts(source, inside=taken).values()) == len(MASKS[case])


def test_masks_beside_nested_images(tmp_path: Path) -> None:
    source = made(tmp_path, "folder", classes("images/a", "images/b", "masks/a", "masks/b"))
    assert "--inside images, or" in refused(source)
    assert counts(source, inside="images") == {"a": 3, "b": 3}


def test_chunks_of_a_running_number(tmp_path: Path) -> None:
    chunks = {f"{i // 3:05d}/img{i:08d}.png": PNG for i in range(9)}
    for kind in KINDS:
        assert "chunks of a running number" in refused(made(tmp_path / kind, kind, chunks))
    real = {f"{label:05d}/{i}.png": PNG for label in range(3) for i in range(4)}
    assert len(counts(made(tmp_path / "real", "folder", real))) == 3


# --- splits in file names -------------------------------------------------------------------------


def test_splits_of_tables(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("test", 1), ("validation", 1)):
        for part in range(count):
            table(tmp_path / "all" / f"{split}-{part:05d}-of-{count:05d}.parquet", [(part, PNG)])
    message = refused(tmp_path / "all")
    for split in ("train-", "test-", "validation-"):
        assert split in message
    assert "give one of them, --inside train, or all, --inside ." in message
    assert counts(tmp_path / "all", inside="train") == {"0": 1, "1": 1}
    assert counts(tmp_path / "all", inside="val") == {"0": 1}
    assert counts(tmp_path, inside="all/train") == {"0": 1, "1": 1}
    assert sum(counts(tmp_path / "all", inside=".").values()) == 4
    assert "several splits" in refused(tmp_path / "all", inside="other")
    for path in (tmp_path / "all").glob("t[er]*st*"):
        path.unlink()
    (tmp_path / "all" / "validation-00000-of-00001.parquet").unlink()
    assert len(listed(tmp_path / "all").names) == 2
    mixed = table(tmp_path / "m.parquet", [(0, PNG), (1, PNG)], split=["train", "test"])
    assert "its column split has test, train" in refused(mixed)
    table(mixed, [(0, PNG), (1, PNG)], split=["train", "train"])
    assert len(listed(mixed).names) == 2


def test_a_table_whose_names_are_no_text(tmp_path: Path) -> None:
    source = table(tmp_path / "t.parquet", [(0, PNG)])
    source.write_bytes(source.read_bytes().replace(b"label", b"lab\xffl"))
    assert "damaged or no parquet table" in refused(source)


def test_splits_of_archives(tmp_path: Path) -> None:
    labelled = tar_bytes({"0.png": PNG, "0.cls": b"0"})
    for name in ("in1k-train-000", "in1k-train-001", "in1k-validation-000"):
        written(tmp_path / "wds" / f"{name}.tar", labelled)
    assert "in1k-train-000.tar, in1k-validation-000.tar" in refused(tmp_path / "wds")
    assert counts(tmp_path / "wds", inside="train") == {"0": 2}
    for split in ("train", "test"):
        packed = zip_bytes(classes("a", "b", below=f"{split}/"))
        written(tmp_path / "zips" / f"{split}.zip", packed)
    assert counts(tmp_path / "zips", inside="train") == {"a": 3, "b": 3}
    for name in ("train", "bus"):  # vehicles
        written(tmp_path / "each" / f"{name}.tar", tar_bytes(pictures("0.png")))
    assert counts(tmp_path / "each") == {"train": 1, "bus": 1}


# --- names ----------------------------------------------------------------------------------------


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def test_names_are_composed_once(tmp_path: Path) -> None:
    name = decomposed("café")
    for kind in KINDS:
        source = made(tmp_path / kind, kind, classes(name, "tea"))
        assert counts(source) == {composed(name): 3, "tea": 3}
    written(tmp_path / "each" / f"{name}.tar", tar_bytes(pictures("0.png")))
    written(tmp_path / "each" / "tea.tar", tar_bytes(pictures("0.png")))
    assert listed(tmp_path / "each").classes == [composed(name), "tea"]
    words = table(tmp_path / "t.parquet", [("tea", PNG), (name, PNG)])  # type: ignore[list-item]
    assert counts(words) == {"tea": 1, composed(name): 1}
    # A byte order mark is no part of a name, and only line feeds end one.
    names = written(tmp_path / "names.txt", f"\ufeff{name}\r\ntea\u2028x\n".encode())
    numbers = table(tmp_path / "n.parquet", [(0, PNG), (1, PNG)])
    assert listed(numbers, class_names=names).classes == [composed(name), "tea\u2028x"]
    label = {"features": {"label": {"names": [name, "tea", "tea"]}}}
    schema = pq.read_table(numbers).replace_schema_metadata(
        {"huggingface": json.dumps({"info": label})}
    )
    pq.write_table(schema, numbers)
    assert listed(numbers).classes == [composed(name), "tea", "tea"]


@pytest.mark.parametrize(
    "pair",
    [
        (composed("é"), decomposed("é")),
        ("cat", "cat "),
        ("a b", "a  b"),
        ("\u2600", "\u2600\ufe0f"),
        ("cat", "cat\u3164"),
    ],
)
def test_classes_that_cannot_be_told_apart(tmp_path: Path, pair: tuple[str, str]) -> None:
    for kind in KINDS:
        message = refused(made(tmp_path / kind, kind, classes(*pair)))
        assert "cannot be told apart" in message and ascii(pair[1]) in message
    words = table(tmp_path / "t.parquet", [(pair[0], PNG), (pair[1], PNG)])  # type: ignore[list-item]
    assert "cannot be told apart" in refused(words)


def test_invisible_characters_are_shown(tmp_path: Path) -> None:
    files = {f"{name}/0.png": picture(i) for i, name in enumerate(("cat", "c\u200bat", "x\u202e"))}
    done = prepared(made(tmp_path, "folder", files), tmp_path / "out")
    assert done.report.counts == {"cat": 1, "c\\u200bat": 1, "x\\u202e": 1}
    assert ShardSet.open(tmp_path / "out").classes == ["cat", "c\\u200bat", "x\\u202e"]


def test_odd_names_are_classes(tmp_path: Path) -> None:
    odd = ("[bold]x", "a<b>&c", "--help", "=1+1", "{x}", "$HOME", "it's", "100%_wool", "🐱")
    files = {f"{name}/0.png": picture(i) for i, name in enumerate(odd)}
    done = prepared(made(tmp_path, "folder", files), tmp_path / "out")
    assert done.report.counts == dict.fromkeys(sorted(odd), 1)


# --- what prepare says of it ----------------------------------------------------------------------


def test_labels_that_no_image_has(tmp_path: Path) -> None:
    files = {}
    for i in range(6):
        files |= {f"{i:04d}.png": picture(i % 3, i), f"{i:04d}.cls": b"%d" % (i % 3 + 1)}
    source = made(tmp_path, "tar", files)
    for out in ("once", "again"):
        done = prepared(source, tmp_path / out)
        assert done.report.counts == {"0": 0, "1": 2, "2": 2, "3": 2}
        assert (done.report.samples_per_class.min, done.report.classes) == (0, 4)
    shown = subprocess.run(
        command("data", "show", tmp_path / "once", "--out", tmp_path),
        env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    sparse = table(tmp_path / "t.parquet", [(label, picture(label)) for label in (0, 2, 3)])
    assert prepared(sparse, tmp_path / "sparse").report.counts == {"0": 1, "1": 0, "2": 1, "3": 1}


def test_twins_are_counted_by_number(tmp_path: Path) -> None:
    rows = [(label, picture(label, label)) for label in (0, 2, 3, 4)]
    source = table(tmp_path / "t.parquet", rows)
    names = written(tmp_path / "names.txt", b"crane\ntern\ncrane\nmaillot, tank suit\ncrane (0)\n")
    report = prepared(source, tmp_path / "out", class_names=names).report
    assert report.classes == len(report.counts) == 5
    assert list(report.counts.values()) == [1, 0, 1, 1, 1]
    assert {"tern", "crane (2)", "maillot, tank suit", "crane (0)"} < report.counts.keys()
    assert ShardSet.open(tmp_path / "out").classes[:3] == ["crane", "tern", "crane"]


def test_what_is_passed_over_is_named(tmp_path: Path) -> None:
    heic = b"\0\0\0\x18ftypheic" + bytes(50)
    files = {f"{name}/{i}.png": picture(i) for name in ("cat", "dog") for i in range(3)}
    files |= {"cat/README": b"notes of it all", "cat/noext": picture(1), "top.png": picture(2)}
    files |= {f"dog/IMG_{i:04d}.HEIC": heic for i in range(20)} | {"dog/a.dat": picture(3)}
    source = made(tmp_path, "folder", files)
    done = prepared(source, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {
        kind["extension"]: (kind["files"], kind["pictures"], kind["first"][0])
        for kind in report["passed_over"]
    }
    assert found == {
        ".heic": (20, 20, "dog/IMG_0000.HEIC"),
        "": (2, 1, "cat/noext"),
        ".dat": (1, 1, "dog/a.dat"),
        ".png": (1, 1, "top.png"),
    }
    assert report["ignored"] == 24 and report["passed_over"][0]["extension"] == ".heic"
    screen = Console(file=io.StringIO(), width=120)
    print_report(done.report, screen, done.path, done.images, done.seconds)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for words in (".heic", "dog/IMG_0000.HEIC", "without extension", "cat/noext", "cat/README"):
        assert words in text
    # In an archive the same is seen.
    for kind in ("zip", "tar"):
        listing = listed(made(tmp_path, kind, {k: v for k, v in files.items() if k != "top.png"}))
        assert len(listing.ignored) == 23 and len(listing.unread) == 22


def test_reports_and_plans_of_before(tmp_path: Path) -> None:
    prepared(made(tmp_path, "folder", {"a/0.png": picture(0)}), tmp_path / "out")
    path = tmp_path / "out" / "report.json"
    report = json.loads(path.read_text())
    del report["passed_over"]
    path.write_text(json.dumps(report))
    assert read_report(tmp_path / "out").passed_over == []
    assert "unread" not in {k for k, f in PlanRecord.model_fields.items() if f.is_required()}


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    source = made(tmp_path, "folder", classes("train/a", "val/a"))
    out = tmp_path / "out"
    done = subprocess.run(
        command("prepare", source, out, "--resolution", 8, "--workers", 1),
        env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and not out.exists()
    assert len(done.stderr.strip().splitlines()) == 1 and "--inside train" in done.stderr
