"""Labels in a file beside the images: dataset.json is read, tables are refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastrepa.errors import DataError
from tests.sets.archives import Files, written
from tests.sets.sources import KINDS, PNG, classes, counts, listed, made, pictures, refused

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
    twins = ("e\u0301.png", "\u00e9.png")  # of one name in two Unicode forms: two pictures
    both = listed(of("twins", {twins[0]: 1}, pictures(*twins)))
    assert (both.names, both.entries["label"].tolist()) == ([twins[0]], [1])
    assert {r.reason for r in both.rejected} == {"no label in dataset.json"}
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
    assert "dataset.json: not valid JSON" in refused(damaged)
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
    "first.csv": TRIPLE | {"first.csv": "label,file\n1,all/0.png\n2,all/1.png\n0,all/2.png\n"},
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
        if kind == "folder":  # which has a name that a class may have
            assert counts(bare) == {"set": 2}
        else:
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


def test_captions_of_a_class_that_is_called_labels(tmp_path: Path) -> None:
    files = {"labels/0.png": PNG, "labels/0.txt": "a label"}
    assert counts(made(tmp_path, "folder", files)) == {"labels": 1}


def test_a_table_behind_many_captions(tmp_path: Path) -> None:
    files: dict[str, Any] = {}
    for i in range(100):
        files |= {f"all/{i}.png": PNG, f"all/{i}.txt": f"{i}.png a cat"}
    for kind in KINDS:
        assert len(listed(made(tmp_path / kind, kind, files)).names) == 100
        late = {**files, "train.csv": "image,label\n7.png,cat\n"}
        assert "train.csv looks like labels" in refused(made(tmp_path / kind / "l", kind, late))


def test_a_list_that_numbers_the_images(tmp_path: Path) -> None:
    birds = [f"{c:03d}.Bird/Bird_{c}_{i:02d}.jpg" for c in (1, 2) for i in range(12)]
    listing = "".join(f"{n} {name}\n" for n, name in enumerate(birds, 1))
    files = {**{f"images/{name}": PNG for name in birds}, "images.txt": listing}
    assert counts(made(tmp_path, "folder", files)) == {"001.Bird": 12, "002.Bird": 12}


def test_labels_of_an_unpacked_webdataset(tmp_path: Path) -> None:
    files = {"0.input.png": PNG, "0.output.cls": b"2", "1.png": PNG, "1.json": {"label": 0}}
    assert counts(made(tmp_path, "folder", files)) == {"2": 1, "0": 1}


# --- files of any bytes ---------------------------------------------------------------------------

FILES = {
    "dataset.json": json.dumps({"labels": [["a/0.png", 1], ["a/1.png", 0]]}).encode(),
    "map.json": b'{"0.png": 1, "x": [["1.png", {"label": 2}]], "images": [], "annotations": []}',
    "rows.jsonl": b'{"file_name": "a/0.png", "label": 3}\n{"file_name": "a/1.png"}\n',
    "rows.csv": b'file,label\n"a/0.png",dog\na/1.png,"x,y"\n',
    "rows.txt": b"0.png 1\n1.png 2\n",
    "0.cls": b"12\n",
}
PIECES = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b"\n",
        b"\\",
        b"\\ud800",
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
    ),
    *(b"", b"\0", b"\xff", b"../", b"a/0.png", b"\xef\xbb\xbf", b"9" * 5000, b"[" * 3000),
]


@pytest.mark.parametrize("name", FILES)
def test_any_bytes_are_read_or_refused(tmp_path: Path, name: str) -> None:
    """No change of such a file ends in anything but a listing or one line."""
    below = "a/" if name == "0.cls" else ""
    source = made(tmp_path, "folder", {**classes("a", count=2), below + name: FILES[name]})
    draw = random.Random(name)
    refusals = set()
    for _ in range(2000):
        data = FILES[name]
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(len(data) + 1)
            end = start + draw.choice((0, 0, 1, 5, 40))
            data = data[:start] + draw.choice(PIECES) + data[end:]
        (source / below / name).write_bytes(data)
        try:
            listed(source)
        except DataError as error:
            refusals.add(str(error))
    assert refusals
    assert all(message.isprintable() and len(message) < 600 for message in refusals)
