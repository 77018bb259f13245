"""Hostile and strange images: each is named or handled as documented, and no set is damaged."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from fastrepa.commands.prepare.prepare import prepare
from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import ShardSet
from fastrepa.errors import DataError
from tests.sets.trees import noise, write_tree

SIDE = 16


def encoded(
    kind: str, size: tuple[int, int] = (24, 20), mode: str = "RGB", **more: object
) -> bytes:
    image = Image.fromarray(noise(7, size[1], size[0])).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def frames(kind: str) -> bytes:
    return encoded(kind, save_all=True, append_images=[Image.new("RGB", (24, 20), "red")] * 3)


def png(width: int, height: int, pixels: bytes, *, more: bytes = b"", depth: int = 8) -> bytes:
    """A PNG with any header, and a chunk `more` before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def gif(width: int, height: int) -> bytes:
    """A GIF whose one tiny frame claims a canvas of any size."""
    data = bytearray(encoded("GIF", (8, 8), "P"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 136).save(buffer, "PNG")
    return buffer.getvalue()


def palette() -> bytes:
    image = Image.fromarray(noise(8, 20, 24)).convert("P")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes(range(256)))
    return buffer.getvalue()


class HostileFile(NamedTuple):
    data: bytes
    refused: str | None = None  # the reason's words; None: it is used


ORIENTED_99 = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x63\0\0\0\0\0\0"
BOMB_TEXT = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * (80 << 20), 9))
CASES: dict[str, HostileFile] = {
    "empty.png": HostileFile(b"", "zero bytes"),
    "nulls.jpg": HostileFile(b"\0" * 5000, "no image format"),
    "page.jpg": HostileFile(b"<html>404 not found</html>", "no image format"),
    "script.png": HostileFile(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image format"
    ),
    "vector.png": HostileFile(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image format"),
    "cut.jpg": HostileFile(encoded("JPEG")[:-90], "truncated"),
    "cut.png": HostileFile(encoded("PNG")[:-90], "truncated"),
    "cut.webp": HostileFile(encoded("WEBP")[:-90], ""),
    "cut.gif": HostileFile(encoded("GIF")[:400], ""),
    "cut.tiff": HostileFile(encoded("TIFF")[:300], ""),
    "header.jpg": HostileFile(encoded("JPEG")[:60], ""),
    "bomb.png": HostileFile(png(60000, 60000, zlib.compress(b"")), "decompression bomb"),
    "bomb2.png": HostileFile(png(12000, 12000, zlib.compress(b"")), "decompression bomb"),
    "bomb.gif": HostileFile(gif(65000, 65000), "decompression bomb"),
    "text-bomb.png": HostileFile(png(9, 9, zlib.compress(b"\0" * 252), more=BOMB_TEXT), ""),
    "hollow.png": HostileFile(png(64, 64, zlib.compress(b"\0" * 50)), ""),
    "crc.png": HostileFile(encoded("PNG").replace(b"IDAT", b"IDAX"), ""),
    "line.png": HostileFile(encoded("PNG", (1, 20000)), None),  # 16 x 320000
    "thread.png": HostileFile(encoded("PNG", (1, 300000)), "too narrow"),
    "floats.tiff": HostileFile(encoded("TIFF", mode="F"), "floating-point"),
    "named.png": HostileFile(encoded("JPEG")),  # read by its content
    "cmyk.jpg": HostileFile(encoded("JPEG", mode="CMYK")),
    "grey.jpg": HostileFile(encoded("JPEG", mode="L")),
    "grey-alpha.png": HostileFile(encoded("PNG", mode="LA")),
    "bits.png": HostileFile(encoded("PNG", mode="1")),
    "sixteen.png": HostileFile(sixteen_bits()),
    "palette.png": HostileFile(palette()),
    "moving.gif": HostileFile(frames("GIF")),
    "moving.webp": HostileFile(frames("WEBP")),
    "moving.png": HostileFile(frames("PNG")),
    "second-frame-cut.gif": HostileFile(frames("GIF")[:-30]),
    "exif.jpg": HostileFile(encoded("JPEG", exif=b"Exif\0\0garbage")),
    "exif2.jpg": HostileFile(encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")),
    "orientation.png": HostileFile(encoded("PNG", exif=ORIENTED_99)),
    "tiny.png": HostileFile(encoded("PNG", (1, 1))),
    "profile.png": HostileFile(encoded("PNG", icc_profile=b"no profile")),
    "x" * 240 + ".png": HostileFile(encoded("PNG", (20, 20))),
    "ünïcode ✨ \u202e.png": HostileFile(encoded("PNG", (21, 20))),
    "new\nline [red].png": HostileFile(encoded("PNG", (22, 20))),
    "-rf.png": HostileFile(encoded("PNG", (23, 20))),
}  # fmt: skip


def pipe(path: Path) -> None:
    os.mkfifo(path)


def to_itself(path: Path) -> None:
    path.symlink_to(path)


def to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe.png": (pipe, "not a regular file"),
    "knot.png": (to_itself, "Too many levels"),
    "dangling.png": (to_nothing, "No such file"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = write_tree(tmp_path_factory.mktemp("hostile") / "tree", {"fine": 3})
    (tree / "strange").mkdir()
    for name, case in CASES.items():
        (tree / "strange" / name).write_bytes(case.data)
    for name, (make, _) in SPECIAL.items():
        make(tree / "strange" / name)
    (tree / "strange" / "loop").symlink_to(tree)
    return tree


@pytest.mark.parametrize("image_format", ["jpeg", "png"])
def test_all_at_once_are_named_or_handled(hostile: Path, tmp_path: Path, image_format: str) -> None:
    done = prepare(
        hostile,
        tmp_path / "out",
        resolution=SIDE,
        shard_size=10,
        image_format=image_format,  # type: ignore[arg-type]
        workers=2,
        skip_bad=True,
        progress=False,
    )
    reasons = {name: words for name, (_, words) in SPECIAL.items()}
    reasons |= {name: case.refused for name, case in CASES.items() if case.refused is not None}
    rejected = {r.source.removeprefix("strange/"): r.reason for r in done.report.rejected}
    assert rejected.keys() == reasons.keys()
    for name, words in reasons.items():
        assert words in rejected[name]
        assert rejected[name].isprintable()
        assert str(tmp_path) not in rejected[name]
    used = len(CASES) + len(SPECIAL) - len(reasons)
    assert done.report.counts == {"fine": 3, "strange": used}
    # The set is whole, and every image in it decodes at its size.
    shards = ShardSet.open(tmp_path / "out", verify="full")
    for path, index_path in zip(shards.shard_paths, shards.index_paths, strict=True):
        data = path.read_bytes()
        for record in load_index(index_path):
            start = int(record["image_offset"])
            image = Image.open(io.BytesIO(data[start : start + int(record["image_size"])]))
            image.load()
            assert (image.size, image.mode) == ((SIDE, SIDE), "RGB")
    stored = done.report
    assert (stored.animated, stored.misnamed, stored.enlarged) == (4, 1, 2)
    assert stored.source_modes["CMYK"] == 1
    assert sum(stored.source_formats.values()) == used + 3


def alone() -> list[str]:
    return [name for name, case in CASES.items() if case.refused is not None] + list(SPECIAL)


@pytest.mark.parametrize("name", alone())
def test_each_alone_stops_the_run_and_is_named(hostile: Path, tmp_path: Path, name: str) -> None:
    tree = write_tree(tmp_path / "tree", {"a": 1})
    (tree / "a" / "00.png").unlink()
    if name in SPECIAL:
        SPECIAL[name][0](tree / "a" / name)
    else:
        (tree / "a" / name).write_bytes(CASES[name].data)
    with pytest.raises(DataError) as caught:
        prepare(tree, tmp_path / "out", resolution=SIDE, workers=0, progress=False)
    assert str(caught.value).startswith(f"{tree}/a/{name}: un")
    assert "--skip-bad" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_report_of_duplicates_and_numbers(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name, numbers in {"a": (0, 1, 2, 0), "b": (3, 1), "c": (4, 5, 6, 7)}.items():
        (tree / name).mkdir(parents=True)
        for place, number in enumerate(numbers):
            image = Image.fromarray(noise(number, 20 + number, 40))
            image.save(tree / name / f"{place}.png")
    (tree / "notes.txt").write_text("")
    prepare(tree, tmp_path / "out", resolution=16, shard_size=3, workers=0, progress=False)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    groups = [(set(g["sources"]), g["labels_differ"]) for g in report["duplicates"]]
    assert len(groups) == 2
    assert ({"a/0.png", "a/3.png"}, False) in groups
    assert ({"a/1.png", "b/1.png"}, True) in groups
    assert report["counts"] == {"a": 4, "b": 2, "c": 4}
    assert report["samples_per_class"] == {"min": 2, "median": 4, "max": 4}
    assert report["source_short_side"] == {"min": 20, "median": 22, "max": 27}
    assert report["source_long_side"] == {"min": 40, "median": 40, "max": 40}
    assert (report["images"], report["ignored"], report["shards"]) == (10, 1, 4)
    files = (tmp_path / "out").glob("shard-*")
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    assert report["source_formats"] == {"PNG": 10}
