"""What folders, archives and tables of others hold: splits, masks and labels are never classes."""

from __future__ import annotations

import io
import json
import subprocess
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from fastrepa.commands.prepare.plan import _Record as PlanRecord
from fastrepa.commands.prepare.prepare import PrepareReport, prepare
from fastrepa.commands.prepare.report import print_report, read_report
from fastrepa.data.format.shards import ShardSet
from fastrepa.data.sources.entries import Listing
from fastrepa.data.sources.listing import list_source
from fastrepa.errors import DataError
from tests.runs import command, environment
from tests.sets.archives import Files, tar_bytes, written, zip_bytes

KINDS = ("folder", "zip", "tar")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(30)  # listing reads no pixels


def picture(label: int, number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 12, 3), (label * 20, number, 0), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def classes(*names: str, below: str = "", count: int = 3) -> Files:
    return {f"{below}{name}/{i}.png": PNG for name in names for i in range(count)}


def pictures(*names: str) -> Files:
    return dict.fromkeys(names, PNG)


def made(folder: Path, kind: str, files: dict[str, Any]) -> Path:
    """A source of some kind with these files: bytes, text, or what becomes JSON."""
    data = {
        name: value
        if isinstance(value, bytes)
        else (value if isinstance(value, str) else json.dumps(value)).encode()
        for name, value in files.items()
    }
    if kind == "folder":
        for name, value in data.items():
            written(folder / "set" / name, value)
        return folder / "set"
    pack = zip_bytes if kind == "zip" else tar_bytes
    return written(folder / f"set.{kind}", pack(data))


def listed(source: Path, **options: Any) -> Listing:
    return list_source(source, spool=source.parent / "spool", progress=False, **options)


def counts(source: Path, **options: Any) -> dict[str, int]:
    """Images of every class that has any."""
    listing = listed(source, **options)
    return dict(Counter(listing.classes[label] for label in listing.entries["label"]))


def refused(source: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        listed(source, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600
    return message


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


# --- labels beside the images ---------------------------------------------------------------------

CHUNKED = [f"{i // 4:05d}/img{i:08d}.png" for i in range(8)]
LABELS = [[name, (i * 5) % 4] for i, name in enumerate(CHUNKED)]


@pytest.mark.parametrize("kind", KINDS)
def test_dataset_json_has_the_labels(tmp_path: Path, kind: str) -> None:
    wanted = {name: str(label) for name, label in LABELS}
    forms: dict[str, Any] = {
        "list": LABELS[::-1],
        "dict": dict(LABELS),  # type: ignore[arg-type]
        "windows": [[name.replace("/", "\\"), label] for name, label in LABELS],
    }
    for form, labels in forms.items():
        for top in ("", "ffhq/"):
            files = {f"{top}{name}": PNG for name in CHUNKED}
            files |= {f"{top}dataset.json": json.dumps({"labels": labels}).encode()}
            listing = listed(made(tmp_path / form / (top or "x"), kind, files))
            assert listing.classes == ["0", "1", "2", "3"]
            found = zip(listing.names, listing.entries["label"].tolist(), strict=True)
            assert {name[len(top) :]: str(label) for name, label in found} == wanted
            assert (listing.rejected, listing.ignored) == ([], [])


@pytest.mark.parametrize("kind", KINDS)
def test_dataset_json_of_less_or_more(tmp_path: Path, kind: str) -> None:
    def of(name: str, labels: Any, files: Files | None = None) -> Path:
        held = files or pictures(*CHUNKED)
        return made(tmp_path / name, kind, {**held, "dataset.json": {"labels": labels}})

    extra = listed(of("extra", [*LABELS[1:], ["00009/img9.png", 3], LABELS[2], LABELS[3]]))
    assert {r.name: r.reason for r in extra.rejected} == {
        "00009/img9.png": "labelled in dataset.json, but missing",
        CHUNKED[0]: "no label in dataset.json",
        CHUNKED[2]: "labelled twice in dataset.json",
        CHUNKED[3]: "labelled twice in dataset.json",
    }
    assert len(extra.names) == 5
    flat = listed(of("flat", {"a.png": 2, "b.png": 0}, pictures("a.png", "b.png")))
    assert (flat.classes, flat.entries["label"].tolist()) == (["0", "1", "2"], [2, 0])
    names = written(tmp_path / "names.txt", b"a\nb\nc\n")
    few = listed(of("few", LABELS), class_names=names)
    assert few.classes == ["a", "b", "c"]
    assert {r.reason for r in few.rejected} == {"its label is 3, beyond 2"}
    assert counts(of("none", None)) == {"0": 8}  # no labels: chunks are no classes
    assert "says that there are no labels" in refused(of("folders", None, classes("a", "b")))
    for number, bad in enumerate(([0, 1], "cat", 1.5, True, -1, None)):
        message = refused(of(f"bad{number}", [[CHUNKED[0], bad]]))
        assert "dataset.json: labels[0] is " in message
    damaged = made(tmp_path / "damaged", kind, {**pictures(*CHUNKED), "dataset.json": '{"labels"'})
    assert "dataset.json: not readable as JSON" in refused(damaged)
    other = made(tmp_path / "other", kind, {**classes("a"), "dataset.json": {"name": "x"}})
    assert counts(other) == {"a": 3}
    both = made(tmp_path / "both", kind, {"0.png": PNG, "0.cls": b"1",
                                          "dataset.json": {"labels": {"0.png": 2}}})  # fmt: skip
    assert "has labels in dataset.json and beside its images" in refused(both)


def test_images_of_the_reference_alone(tmp_path: Path) -> None:
    files = {f"images/{CHUNKED[0]}": PNG, "vae-sd/dataset.json": {"labels": [["x.npy", 1]]}}
    source = made(tmp_path, "folder", files)
    assert "its labels lie beside it" in refused(source / "images")
    assert "labels of another part" in refused(made(tmp_path, "zip", files))


TRIPLE = classes("all")
RUNNING = {f"train/{i}.png": PNG for i in range(1, 30)}
TABLES: dict[str, dict[str, Any]] = {
    "labels.csv": TRIPLE | {"labels.csv": "filename,label\n0.png,x\n1.png,y\n"},
    "train.csv": TRIPLE | {"train.csv": "id_code;diagnosis\n0;2\n1;0\n2;2\n"},
    "trainLabels.csv": RUNNING | {
        "trainLabels.csv": "id,label\n" + "".join(f"{i},{i % 2}\n" for i in range(1, 30))
    },
    "all/l.tsv": TRIPLE | {"all/l.tsv": "f\tspecies\nall/0.png\tx\n"},
    "metadata.jsonl": TRIPLE | {"metadata.jsonl": '{"file_name": "all/0.png", "label": 3}\n'},
    "annotations.json": TRIPLE | {"annotations.json": {
        "images": [{"id": 7, "file_name": "0.png"}], "annotations": [{"category_id": 1}]}},
    "map.json": TRIPLE | {"map.json": {"0.png": 1, "1.png": 0}},
    "pairs.json": TRIPLE | {"pairs.json": [["0.png", "x"], ["1.png", "y"]]},
    "nested.json": TRIPLE | {"nested.json": {"0.png": {"class": "x"}}},
    "val.txt": TRIPLE | {"val.txt": "0.png 65\n1.png 970\n2.png 65\n"},
    "imagelabels.mat": TRIPLE | {"imagelabels.mat": b"MATLAB 5.0"},
    "conflict.csv": classes("cat", "dog") | {"conflict.csv": "file,label\ncat/0.png,dog\n"},
    "Annotations/0.xml": {"JPEGImages/0.jpg": PNG, "Annotations/0.xml": "<a/>"},
    "labels/0.txt": {"images/0.jpg": PNG, "labels/0.txt": "0 .1 .2 .3 .4"},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_labels_is_refused_by_name(tmp_path: Path, name: str) -> None:
    for kind in KINDS:
        message = refused(made(tmp_path / kind, kind, TABLES[name]))
        assert f"{name} looks like " in message and "give class folders" in message


def test_a_table_beside_images_without_folders(tmp_path: Path) -> None:
    flat = {"0.png": PNG, "1.png": PNG, "labels.csv": "f,label\n0.png,1\n"}
    for kind in KINDS:
        assert "labels.csv looks like labels" in refused(made(tmp_path / kind, kind, flat))
        bare = made(tmp_path / kind / "bare", kind, pictures("cat.0.png", "dog.0.png"))
        assert "CLASS/IMAGE" in refused(bare)


NOTES: dict[str, Any] = {
    "README.txt": "see cat/0.png\n",
    "classes.csv": "id,name\n0,cat\n1,dog\n",
    "class_index.json": {"0": ["n01", "cat"], "1": ["n02", "dog"]},
    "label_map.json": {"cat": 0, "dog": 1},
    "agrees.csv": "path,label\ncat/0.png,cat\ndog/1.png,dog\n",
    "md5.csv": "file,md5\ncat/0.png,d41d\n",
    "captions.jsonl": '{"file_name": "cat/0.png", "text": "a cat"}\n',
    "train.txt": "cat/0\ncat/1\ndog/0\n",
    "report.json": {"counts": {"cat": 3}, "rejected": [{"source": "cat/0.png", "reason": "x"}],
                    "duplicates": [{"sources": ["cat/0.png", "dog/0.png"], "labels_differ": True}]},
    "sources.jsonl": '"cat/0.png"\nnull\n',
    "cat/0.json": {"file_name": "0.png", "camera": "x"},
    "cat/1.txt": "1.png a cat",
    "damaged.json": "{",
    "strange.csv": b"\xff\xfe\0,\0\n",
}  # fmt: skip


def test_notes_are_no_tables_of_labels(tmp_path: Path) -> None:
    for kind in KINDS:
        listing = listed(made(tmp_path / kind, kind, {**classes("cat", "dog"), **NOTES}))
        assert listing.classes == ["cat", "dog"] and len(listing.names) == 6
        assert sorted(listing.ignored) == sorted(NOTES)


def test_a_list_that_numbers_the_images(tmp_path: Path) -> None:
    birds = [f"{c:03d}.Bird/Bird_{c}_{i:02d}.jpg" for c in (1, 2) for i in range(12)]
    listing = "".join(f"{n} {name}\n" for n, name in enumerate(birds, 1))
    files = {**{f"images/{name}": PNG for name in birds}, "images.txt": listing}
    assert counts(made(tmp_path, "folder", files)) == {"001.Bird": 12, "002.Bird": 12}


def test_labels_of_an_unpacked_webdataset(tmp_path: Path) -> None:
    files = {"0.input.png": PNG, "0.output.cls": b"2", "1.png": PNG, "1.json": {"label": 0}}
    assert counts(made(tmp_path, "folder", files)) == {"2": 1, "0": 1}


# --- splits in file names -------------------------------------------------------------------------


def table(path: Path, rows: list[tuple[int, bytes]], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [data for _, data in rows], "label": [label for label, _ in rows]}
    pq.write_table(pa.table({**columns, **more}), path)
    return path


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
