"""Damages: something done to a prepared set, and every line that it must bring about."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastrepa.commands.verify.verify import VerifyReport, verify
from fastrepa.data.format.columns import seal
from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import FileRecord
from fastrepa.data.images import encode
from tests.sets.trees import RESOLUTION, flip_byte, noise


@dataclass
class Damage:
    """A damage and the lines that name it; `quick`: those that need no contents."""

    do: Callable[[Path], Any]
    lines: list[str]
    quick: list[str]


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rehash(folder: Path, name: str) -> None:
    """Make the manifest agree with a file as it is now: the damage lies in what the file says."""
    record = FileRecord.of(folder / name).model_dump()

    def change(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("file") == name:
                value.update(record)
            for item in value.values():
                change(item)
        if isinstance(value, list):
            for item in value:
                change(item)

    edit_manifest(folder, change)


def edit_index(shard: int, change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / f"shard-{shard:05d}.idx.npy"
        index = load_index(path)
        changed = change(index)
        np.save(path, index if changed is None else changed)
        rehash(folder, path.name)

    return do


def edit_rows(name: str, change: Callable[[np.ndarray], Any], *, sealed: bool = True) -> Any:
    def do(folder: Path) -> None:
        rows = np.load(folder / name)
        changed = change(rows)
        rows = rows if changed is None else changed
        if sealed:
            seal(rows)
        np.save(folder / name, rows)
        rehash(folder, name)

    return do


def edit_bytes(shard: int, where: Callable[[np.void], int], text: bytes) -> Callable[[Path], None]:
    """Overwrite bytes of a shard at a place that the index's record of sample 2 gives."""

    def do(folder: Path) -> None:
        path = folder / f"shard-{shard:05d}.tar"
        offset = where(load_index(folder / f"shard-{shard:05d}.idx.npy")[2])
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(text)
        rehash(folder, path.name)

    return do


def replace_image(data: bytes) -> Callable[[Path], None]:
    """Other bytes for sample 2 of shard 0, in a tar, index and manifest that all agree."""

    def do(folder: Path) -> None:
        path, index_path = folder / "shard-00000.tar", folder / "shard-00000.idx.npy"
        index = load_index(index_path)
        with tarfile.open(path) as tar:
            members = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (member, old) in enumerate(members):
                new = data if number == 4 else old
                member.size = len(new)
                if number % 2 == 0:
                    index[number // 2]["image_offset"] = tar.offset + 512
                    index[number // 2]["image_size"] = len(new)
                    index[number // 2]["image_crc32"] = zlib.crc32(new)
                tar.addfile(member, io.BytesIO(new))
        np.save(index_path, index)
        rehash(folder, path.name)
        rehash(folder, index_path.name)

    return do


def cut(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - count)


def append(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"x")


def image_bytes(side: int = RESOLUTION, image_format: Any = "png", mode: str = "RGB") -> bytes:
    if mode != "RGB":
        buffer = io.BytesIO()
        Image.fromarray(noise(1, side, side)).convert(mode).save(buffer, "PNG")
        return buffer.getvalue()
    return encode(Image.fromarray(noise(1, side, side)), image_format, 95)


def _after_image(record: np.void) -> int:
    """Offset of the tar header of the sample's .cls."""
    return int(record["image_offset"]) + -(-int(record["image_size"]) // 512) * 512


TAR, INDEX = "shard-00001.tar", "shard-00001.idx.npy"
MOMENTS, FEATURES = "shard-00001.moments.npy", "shard-00001.features.enc.npy"
ALTERED = "altered (its SHA-256 is not the manifest's)"
K = [f"{n:08d}" for n in range(34)]  # keys; shard s has K[8 * s:]

DAMAGES: dict[str, Damage] = {}


def damage(
    name: str, do: Callable[[Path], Any], found: list[str], quick: list[str] | None = None
) -> None:
    DAMAGES[name] = Damage(do, found, [] if quick is None else quick)


for part in ("shard-00004.moments.npy", "shard-00004.features.enc.npy", "sources.jsonl"):
    name = part.split(".", 1)[-1]
    damage(f"missing {name}", lambda f, p=part: (f / p).unlink(),
           [f"{part}: missing, but the manifest lists it"],
           [f"{part}: missing, but the manifest lists it"])  # fmt: skip
    damage(f"truncated {name}", cut(part, 3), [f"{part}: truncated ("], [f"{part}: truncated ("])
    damage(f"too long {name}", append(part), [f"{part}: too long ("], [f"{part}: too long ("])
damage("missing tar", lambda f: (f / TAR).unlink(),
       [f"{TAR}: missing, but the manifest lists it"],
       [f"{TAR}: missing, but the manifest lists it"])  # fmt: skip
damage("missing index", lambda f: (f / INDEX).unlink(),
       [f"{INDEX}: missing, but the manifest lists it"],
       [f"{INDEX}: missing, but the manifest lists it"])  # fmt: skip
damage("too long tar", append(TAR), [f"{TAR}: too long ("], [f"{TAR}: too long ("])
damage("truncated index", cut(INDEX, 3),
       [f"{INDEX}: truncated (", f"{INDEX}: not a readable shard index ("],
       [f"{INDEX}: truncated (", f"{INDEX}: not a readable shard index ("])  # fmt: skip
damage("altered index", lambda f: flip_byte(f / INDEX, (f / INDEX).stat().st_size - 1),
       [f"{INDEX}: {ALTERED}", f"{TAR}: sample {K[15]}: altered (its CRC-32 is not the index's)"],
       [f"{INDEX}: {ALTERED}"])  # fmt: skip
damage("no index at all", lambda f: ((f / INDEX).write_bytes(b"x" * (f / INDEX).stat().st_size)),
       [f"{INDEX}: {ALTERED}", f"{INDEX}: not a readable shard index ("],
       [f"{INDEX}: {ALTERED}", f"{INDEX}: not a readable shard index ("])  # fmt: skip
damage("altered sources", lambda f: flip_byte(f / "sources.jsonl", 5),
       [f"sources.jsonl: {ALTERED}"], [f"sources.jsonl: {ALTERED}"])  # fmt: skip


def _few_sources(folder: Path) -> None:
    path = folder / "sources.jsonl"
    text = path.read_text().splitlines()[:33]
    path.write_text("\n".join(["null", "no json", *text[2:]]) + "\n")
    rehash(folder, path.name)


_SOURCES = [
    "sources.jsonl: line 2 is not JSON",
    f"sources.jsonl: sample {K[0]}: no source is named",
    f"sources.jsonl: sample {K[33]}: no source is named",
]
damage("sources that name too few", _few_sources, _SOURCES, _SOURCES)


def _alter_image(folder: Path) -> None:
    flip_byte(folder / TAR, int(load_index(folder / INDEX)[3]["image_offset"]) + 60)


damage("altered image", _alter_image,
       [f"{TAR}: {ALTERED}", f"{TAR}: sample {K[11]}: altered (its CRC-32 is not the index's)",
        f"{TAR}: sample {K[11]}: image cannot be decoded ("])  # fmt: skip
damage("altered padding", lambda f: flip_byte(f / TAR, (f / TAR).stat().st_size - 1),
       [f"{TAR}: {ALTERED}"])  # fmt: skip
damage("altered moments", lambda f: flip_byte(f / MOMENTS, (f / MOMENTS).stat().st_size - 30),
       [f"{MOMENTS}: {ALTERED}",
        f"{MOMENTS}: sample {K[15]} view 1: altered (its CRC-32 is wrong)"])  # fmt: skip
damage("altered features", lambda f: flip_byte(f / FEATURES, (f / FEATURES).stat().st_size - 12),
       [f"{FEATURES}: {ALTERED}",
        f"{FEATURES}: sample {K[15]} view 1: altered (its CRC-32 is wrong)"])  # fmt: skip

# Counts, labels, keys, places: the files agree with the manifest's sums, not with each other.
for number, (change, line) in enumerate((
    (lambda m: m["classes"][0].update(samples=10),
     "manifest.json: class 'ant' has 10 samples, the indices 9"),
    (lambda m: m.update(num_samples=35), "manifest.json: num_samples is 35, its shards hold 34"),
    (lambda m: m["features"][0]["files"].pop(),
     "manifest.json: features.enc has 4 files for 5 shards"),
)):  # fmt: skip
    damage(f"count {number}", lambda f, c=change: edit_manifest(f, c), [line], [line])
damage("a file listed twice",
       lambda f: edit_manifest(f, lambda m: m["moments"]["files"].__setitem__(
           4, m["moments"]["files"][3])),
       ["manifest.json: lists shard-00003.moments.npy more than once",
        "shard-00003.moments.npy: rows of "],
       ["manifest.json: lists shard-00003.moments.npy more than once",
        "shard-00003.moments.npy: rows of "])  # fmt: skip
_SHORT = [f"{INDEX}: 7 samples, the manifest says 8",
          "manifest.json: class "]  # fmt: skip
damage("a sample less in the index", edit_index(1, lambda i: i[:7]), _SHORT, _SHORT)
_LABEL = [f"{INDEX}: sample {K[9]}: its label is outside 0..2",
          f"{INDEX}: sample {K[10]}: its label is outside 0..2"]  # fmt: skip


def _labels_outside(index: np.ndarray) -> None:
    index["label"][1:3] = (3, -1)


damage("labels outside", edit_index(1, _labels_outside),
       [*_LABEL, "manifest.json: class ", "its .cls says", "its .cls says"],
       [*_LABEL, "manifest.json: class "])  # fmt: skip


def _other_key(key: bytes) -> Callable[[np.ndarray], None]:
    return lambda index: index["key"].__setitem__(1, key)


damage("a key twice", edit_index(1, _other_key(b"00000001")),
       [f"{TAR}: sample {K[1]}: its key is another sample's, too",
        f"{TAR}: sample {K[1]}: the tar has '{K[9]}.png' where {K[1]}.png should be",
        f"{TAR}: sample {K[1]}: the tar has '{K[9]}.cls' where {K[1]}.cls should be"],
       [f"{TAR}: sample {K[1]}: its key is another sample's, too"])  # fmt: skip
damage("a key that is none", edit_index(1, _other_key(b"x")),
       [f"{INDEX}: sample x: its key is not 8 digits",
        f"{TAR}: sample x: the tar has '{K[9]}.png'", f"{TAR}: sample x: the tar has '{K[9]}.cls'"],
       [f"{INDEX}: sample x: its key is not 8 digits"])  # fmt: skip
for field, value in (("image_size", 10**6), ("image_size", 0), ("image_offset", -1),
                     ("image_offset", 1 << 40)):  # fmt: skip
    outside = f"{INDEX}: sample {K[9]}: its bytes do not lie within {TAR}"
    follows = f"{INDEX}: sample {K[10]}: does not follow the sample before it in {TAR}"
    damage(f"{field} {value}", edit_index(1, lambda i, f=field, v=value: i[f].__setitem__(1, v)),
           [outside, follows], [outside, follows])  # fmt: skip
_MOVED = [f"{INDEX}: sample {K[9]}: does not follow", f"{INDEX}: sample {K[10]}: does not follow"]
damage("image_offset a block too far",
       edit_index(1, lambda i: i["image_offset"].__setitem__(1, i["image_offset"][1] + 512)),
       [*_MOVED, "the tar header of", "altered (its CRC-32", "cannot be decoded", "the tar header"],
       _MOVED)  # fmt: skip


def _shorter(index: np.ndarray) -> None:
    index["image_size"][1] -= 1  # in as many blocks


damage(
    "image_size one less",
    edit_index(1, _shorter),
    [
        f"{TAR}: sample {K[9]}: {K[9]}.png has ",
        f"{TAR}: sample {K[9]}: altered (its CRC-32",
    ],
)

# The tar, in a file whose SHA-256 the manifest knows.
damage(
    "tar header",
    edit_bytes(1, lambda r: int(r["image_offset"]) - 512 + 20, b"\xff"),
    [f"{TAR}: sample {K[10]}: the tar header of {K[10]}.png is damaged (bad checksum)"],
)
damage(
    ".cls header",
    edit_bytes(1, lambda r: _after_image(r) + 20, b"\xff"),
    [f"{TAR}: sample {K[10]}: the tar header of {K[10]}.cls is damaged (bad checksum)"],
)
damage(".cls text", edit_bytes(1, lambda r: _after_image(r) + 512, b"7"),
       [f"{TAR}: sample {K[10]}: its .cls says '7', the index "])  # fmt: skip

# Images.
_IMAGE = f"shard-00000.tar: sample {K[2]}: image "
damage("a truncated image", replace_image(image_bytes()[:-40]), [_IMAGE + "cannot be decoded ("])
damage("no image", replace_image(b"nothing of the kind"), [_IMAGE + "cannot be decoded ("])
damage("a larger image", replace_image(image_bytes(24)), [_IMAGE + "24x24 px, not 16x16"])
damage("a JPEG among PNGs", replace_image(image_bytes(image_format="jpeg")),
       [_IMAGE + "a JPEG image, not PNG"])  # fmt: skip
damage("a palette", replace_image(image_bytes(mode="P")), [_IMAGE + "of mode P, not RGB or L"])


# Columns, sealed again: their bytes are what was written, and wrong.
def _at(field: str, value: float) -> Callable[[np.ndarray], None]:
    def change(rows: np.ndarray) -> None:
        rows[field][2, 1].reshape(-1)[-1] = value

    return change


for value in (np.nan, np.inf):
    damage(f"moments {value}", edit_rows(MOMENTS, _at("moments", value)),
           [f"{MOMENTS}: sample {K[10]} view 1: moments that are not finite"])  # fmt: skip
damage("a negative std", edit_rows(MOMENTS, _at("moments", -0.5)),
       [f"{MOMENTS}: sample {K[10]} view 1: a negative standard deviation"])  # fmt: skip
for value in (0.0, -1.0, np.nan, np.inf):
    text = f"{FEATURES}: sample {K[10]} view 1: scales that are not finite and positive"
    damage(f"scale {value}", edit_rows(FEATURES, _at("scale", value)), [text])
damage("tokens all zero", edit_rows(FEATURES, lambda r: r["tokens"].__setitem__((2, 0), 0)),
       [f"{FEATURES}: sample {K[10]} view 0: every token is zero"])  # fmt: skip
damage("a token of -128", edit_rows(FEATURES, _at("tokens", -128)),
       [f"{FEATURES}: sample {K[10]} view 1: tokens outside -127..127"])  # fmt: skip
damage("a wrong CRC", edit_rows(MOMENTS, lambda r: r["crc32"].__setitem__((0, 0), 1), sealed=False),
       [f"{MOMENTS}: sample {K[8]} view 0: altered (its CRC-32 is wrong)"])  # fmt: skip
damage("moments of another shape", edit_rows(MOMENTS, lambda r: np.ascontiguousarray(r[:, :1])),
       [f"{MOMENTS}: rows of "], [f"{MOMENTS}: rows of "])  # fmt: skip


def check(folder: Path, **options: Any) -> VerifyReport:
    return verify(folder, workers=0, progress=False, **options)


def lines(folder: Path, **options: Any) -> list[str]:
    return [str(problem) for problem in check(folder, **options).problems]


def _found(wanted: list[str], found: list[str]) -> None:
    """Each wanted beginning or part is in a line of its own, and no line is left over."""
    left = list(found)
    for text in wanted:
        match = next((line for line in left if line.startswith(text) or text in line), None)
        assert match is not None, f"{text!r} is not in {left}"
        left.remove(match)
    # A class that is counted differently is named once for each class.
    more = [line for line in left if "samples, the indices" not in line]
    assert more == [], more
