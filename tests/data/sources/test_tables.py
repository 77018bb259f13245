"""Parquet tables: columns found and named, images copied once, bad rows rejected."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastrepa.data.sources import tables
from tests.data.sources.test_sources import contents, listed, reasons, refused

IMAGES = [b"image %d" % i * (i + 1) for i in range(200)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, columns: dict[str, Any], metadata: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, row_group_size=70)
    return path


def structs(images: list[bytes | None]) -> pa.Array:
    rows = [None if image is None else {"bytes": image, "path": "x.png"} for image in images]
    return pa.array(rows, STRUCT)


def label_names(names: list[str]) -> dict:
    feature = {"names": names, "_type": "ClassLabel"}
    return {"info": {"features": {"label": feature, "image": {"_type": "Image"}}}}


def test_integer_labels_and_binary(tmp_path: Path) -> None:
    labels = [i % 5 for i in range(200)]
    source = write(tmp_path / "t.parquet", {"jpg": IMAGES, "cls": labels, "score": [0.5] * 200})
    listing = listed(source)
    assert listing.classes == ["0", "1", "2", "3", "4"]
    assert contents(listing) == {
        f"row {i}": (str(labels[i]), image) for i, image in enumerate(IMAGES)
    }
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    named = listed(source, class_names=tmp_path / "names.txt")
    assert named.classes == ["a", "b", "c", "d"] and len(named.names) == 160
    assert reasons(named)["row 4"] == "its label is 4, beyond the 4 classes"


def test_hugging_face_layout(tmp_path: Path) -> None:
    names = label_names(["tench", "goldfish"])
    for part in range(2):
        some = IMAGES[part * 100 : part * 100 + 100]
        write(
            tmp_path / "data" / f"train-{part}.parquet",
            {"image": structs(list(some)), "label": [i % 2 for i in range(100)]},
            names,
        )
    (tmp_path / "data" / "README.md").write_text("")
    listing = listed(tmp_path / "data")
    assert listing.classes == ["tench", "goldfish"]
    assert contents(listing) == {
        f"train-{i // 100}.parquet/row {i % 100}": (["tench", "goldfish"][i % 2], image)
        for i, image in enumerate(IMAGES)
    }
    third = {"image": structs([b"x"]), "label": [0]}
    write(tmp_path / "data" / "train-2.parquet", third, label_names(["other", "goldfish"]))
    assert "other columns or classes than train-0" in refused(tmp_path / "data")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_labels_over_several_files(tmp_path: Path, kind: pa.DataType) -> None:
    folder = tmp_path / "set"
    write(folder / "a.parquet", {"image": [b"1", b"2"], "label": pa.array(["dog", "cat"], kind)})
    write(folder / "b.parquet", {"image": [b"3", b""], "label": pa.array(["Ant", "eel"], kind)})
    listing = listed(folder)
    assert listing.classes == ["Ant", "cat", "dog"]  # eel has only a row without an image
    assert contents(listing) == {
        "a.parquet/row 0": ("dog", b"1"),
        "a.parquet/row 1": ("cat", b"2"),
        "b.parquet/row 0": ("Ant", b"3"),
    }
    assert reasons(listing) == {"b.parquet/row 1": "no image bytes"}
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert "those of label are text" in refused(folder, class_names=tmp_path / "names.txt")


def test_bad_rows_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_IMAGE_BYTES", 1000)
    images = structs([b"0", None, b"", b"3", b"4", b"5", bytes(1001)])
    labels = pa.array([0, 0, 0, None, -1, 10**6, 0], pa.int64())
    listing = listed(write(tmp_path / "t.parquet", {"image": images, "label": labels}))
    assert contents(listing) == {"row 0": ("0", b"0")}
    assert {name: reason[:22] for name, reason in reasons(listing).items()} == {
        "row 1": "no image bytes",
        "row 2": "no image bytes",
        "row 3": "no label",
        "row 4": "its label is -1, not 0",
        "row 5": "its label is 1000000, "[:22],
        "row 6": "1001 bytes; an image m"[:22],
    }


def test_copy_is_made_once(tmp_path: Path) -> None:
    source = write(tmp_path / "t.parquet", {"image": IMAGES, "label": ["x"] * 200})
    before = contents(listed(source))
    copy = tmp_path / "spool" / "00000.bin"
    assert sorted(os.listdir(copy.parent)) == ["00000.bin", "00000.json", "00000.npy"]
    node = copy.stat().st_ino
    assert contents(listed(source)) == before and copy.stat().st_ino == node
    write(source, {"image": IMAGES[::-1], "label": ["x"] * 200})
    assert contents(listed(source))["row 0"] == ("x", IMAGES[-1])


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({"a": [b"x"], "b": [b"y"], "label": [1]}, {}, "name the image column"),
        ({"image": [b"x"], "jpg": [b"y"], "label": [1]}, {}, "candidates: image, jpg"),
        ({"image": [b"x"], "m": [1], "n": [2]}, {}, "its columns are image (binary), m (int64)"),
        ({"image": [b"x"], "label": [0.5]}, {}, "name the label column"),
        ({"image": ["x.png"], "label": [1]}, {}, "name the image column"),
        ({"image": [b"x"], "label": [1]}, {"image_column": "imgae"}, "did you mean 'image'?"),
        ({"image": [b"x"], "label": [1]}, {"label_column": "image"}, "label column 'image' is not"),
        ({"image": [b"x"], "label": [1]}, {"inside": "a"}, "inside does not apply"),
        ({"image": [b""], "label": [1]}, {}, "no row of it can be used (row 0: no image bytes)"),
        (
            {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int8())},
            {},
            "no row of it",
        ),
        ({"image\n": [b"x"], "x": [1], "y": [1]}, {}, "image\\n"),
    ],
)
def test_unfit_tables(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], expected: str
) -> None:
    assert expected in refused(write(tmp_path / "t.parquet", columns), **options)


def test_named_columns(tmp_path: Path) -> None:
    columns = {"a": [b"A"], "b": [b"B"], "m": [1], "n": ["one"]}
    source = write(tmp_path / "t.parquet", columns)
    for image, label, expected in (("a", "m", ("1", b"A")), ("b", "n", ("one", b"B"))):
        listing = listed(source, image_column=image, label_column=label)
        assert contents(listing) == {"row 0": expected}


def test_damaged_tables(tmp_path: Path) -> None:
    whole = write(tmp_path / "t.parquet", {"image": IMAGES, "label": [1] * 200}).read_bytes()
    for data in (
        b"",
        whole[:-100],
        b"PAR1" + bytes(90) + b"PAR1",
        whole[:4] + bytes(2000) + whole[2004:],
    ):
        (tmp_path / "t.parquet").write_bytes(data)
        assert "damaged or no parquet table" in refused(tmp_path / "t.parquet")
        assert not list(tmp_path.glob("spool/*.bin")) and not list(tmp_path.glob("spool/.*"))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "t.parquet", {"image": [b"x"], "label": [1]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'fastrepa[parquet]'" in refused(source)
