"""A folder of `fastrepa sample`: numbered images, a grid of the first, and how they were made.

What is removed there is what `sampling.json` says to be its own, and only where that is asked for.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.lib import format as npy
from torch import Tensor

from fastrepa.errors import DataError, FastrepaError, shown, writing
from fastrepa.generation.pictures import to_image
from fastrepa.reading.text import parse_json
from fastrepa.runtime.files import aside, is_temporary, write_whole
from fastrepa.runtime.ownership import LOCK

RECORD, GRID = "sampling.json", "grid.png"
PNG_NAME = re.compile(r"\d{6,}\.png")
_NPZ_NAME = re.compile(r"samples_(?P<num>\d+)x\d+x\d+x3\.npz")
_NO_MATTER = ("num", "run")  # keys that change no image: a run is known by its checkpoint
_READERS = 8
_BEGIN, _END = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Claim:
    """A folder that is ready for images."""

    batch_size: int
    removed: int
    """Files of other settings that are gone."""
    more: int
    """Images above those asked for, which stay."""


def claim_folder(folder: Path, record: Mapping[str, Any], *, overwrite: bool = False) -> Claim:
    """Make `folder` ready for images and leave `record` in it as sampling.json. The caller owns it.

    Images of a call with the same record stay, also those above its `num`, and their batches are as
    large as they were; those of another go with `overwrite` alone. A folder that holds files but no
    sampling.json is somebody else's, and so are images that sampling.json does not speak of.

    Raises FastrepaError for these, and where it cannot be written.
    """
    check_whose(folder)
    with writing(folder, FastrepaError):
        before = _record(folder)
        there = int(before.get("num", 0))
        foreign = [
            i
            for i in _numbers(folder)
            if i < record["num"] and (i >= there or image_path(folder, i).is_dir())
        ]
        if foreign:
            raise FastrepaError(
                f"{image_path(folder, min(foreign))}: in the way, and none that `fastrepa sample` "
                "wrote; choose another --out"
            )
        wanted = _sized(record, max(record["num"], there))
        ours: list[Path] = []
        if other := _difference(before, wanted):
            wanted = _sized(record, record["num"])
            ours = list(_ours(folder, there))
            if ours and not overwrite:
                raise FastrepaError(
                    f"{folder}: has {len(ours)} files of other settings ({other}); choose another "
                    "--out, or --overwrite removes them"
                )
            for path in ours:
                path.unlink()
        text = json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / RECORD, text.encode())
        more = sum(record["num"] <= i < there for i in _numbers(folder))
    return Claim(wanted["batch_size"], len(ours), more)


def settings_of(record: Path) -> dict[str, Any]:
    """Read from a sampling.json what its images depend on; empty where it says nothing."""
    try:
        found = parse_json(record.read_bytes(), str(record))
    except (OSError, DataError):
        return {}
    known = found if isinstance(found, dict) else {}
    return {k: v for k, v in known.items() if k not in _NO_MATTER}


def _sized(record: Mapping[str, Any], num: int) -> dict[str, Any]:
    """Return the record of `num` images, whose batches are no larger."""
    return {**record, "num": num, "batch_size": min(record["batch_size"], num)}


def check_whose(folder: Path) -> None:
    """Raises FastrepaError where `folder` is a file, or holds files without a sampling.json."""
    with writing(folder, FastrepaError):
        if folder.exists() and not folder.is_dir():
            raise FastrepaError(f"{folder}: is a file; --out wants a folder")
        entries = list(folder.iterdir()) if folder.exists() else []
    names = [path.name for path in entries if path.name != LOCK and not is_temporary(path)]
    if names and RECORD not in names:
        raise FastrepaError(
            f"{folder}: holds files that `fastrepa sample` did not write"
            f" ({min(names)}, ...); nothing is overwritten, choose another --out"
        )


def _record(folder: Path) -> dict[str, Any]:
    """Read sampling.json; empty where there is none, or none that can be read and no images."""
    path = folder / RECORD
    if not path.exists():
        return {}
    if path.is_dir():
        raise FastrepaError(f"{path}: is a folder, and in the way; choose another --out")
    try:
        found = parse_json(path.read_bytes(), str(path))
        if isinstance(found, dict) and type(found.get("num")) is int and found["num"] >= 0:
            return found
    except DataError:
        pass
    if next(_numbers(folder), None) is not None:
        raise FastrepaError(
            f"{path}: not a record of `fastrepa sample`, so whose the images are is not known; "
            "choose another --out, or remove them"
        )
    return {}


def _numbers(folder: Path) -> Iterator[int]:
    for path in folder.iterdir():
        if PNG_NAME.fullmatch(path.name) and path == image_path(folder, int(path.stem)):
            yield int(path.stem)


def _ours(folder: Path, num: int) -> Iterator[Path]:
    """Images that `sample` wrote there with a record of `num`, and what it packed of them."""
    for path in folder.iterdir():
        packed = _NPZ_NAME.fullmatch(path.name)
        if packed and int(packed["num"]) <= num and path.is_file():
            yield path
    images = (image_path(folder, i) for i in _numbers(folder) if i < num)
    yield from (path for path in images if not path.is_dir())


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the settings that differ, with both values; empty where none does."""
    keys = [k for k in now | before if k not in _NO_MATTER and before.get(k) != now.get(k)]
    if "checkpoint_step" in keys and "checkpoint" in keys:
        keys.remove("checkpoint")  # a checksum says nothing to a reader
    told = [f"{k} {shown(before.get(k))}, now {shown(now.get(k))}" for k in keys[:3]]
    return "; ".join([*told, *(["..."] if len(keys) > 3 else [])])


def torn_images(folder: Path, num: int, height: int, width: int) -> list[int]:
    """Numbers below `num` of images that are there and not whole: empty, or cut short.

    Raises FastrepaError naming a file that is no such image at all, or of another size.
    """

    def state(number: int) -> bool | None:
        path = image_path(folder, number)
        if not path.is_file():
            return None
        begin = _BEGIN + struct.pack(">IIBB", width, height, 8, 2)
        with path.open("rb") as file:
            head = file.read(len(begin))
            if not begin.startswith(head):
                raise FastrepaError(
                    f"{path}: not the image that `fastrepa sample` wrote; remove it, and it is "
                    "made again"
                )
            size = file.seek(0, 2)
            file.seek(max(0, size - len(_END)))
            return head != begin or file.read() != _END

    with writing(folder, FastrepaError), ThreadPoolExecutor(_READERS) as readers:
        return [i for i, torn in enumerate(readers.map(state, range(num))) if torn]


def image_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def write_png(image: Tensor, path: Path) -> None:
    """Write uint8 image [3,H,W] to a PNG, which has its name once it is whole; lossless at every
    level, and level 1 is the quick one.
    """
    with aside(path) as partial:
        to_image(image).save(partial, "PNG", compress_level=1)


def read_png(path: Path) -> Tensor:
    """Read uint8 image [3,H,W] from a PNG; DataError that names it where it is none."""
    from fastrepa.data.images import read_rgb  # not where images are only made

    return torch.from_numpy(read_rgb(path)).permute(2, 0, 1)


def check_complete(folder: Path, num: int) -> None:
    """Raises FastrepaError where one of the images 0 .. num - 1 is not there."""
    if missing := [i for i in range(num) if not image_path(folder, i).is_file()]:
        raise FastrepaError(
            f"{image_path(folder, missing[0])}: missing ({len(missing)} of {num}); all processes"
            " must see one and the same output folder"
        )


def write_adm_npz(folder: Path, num: int) -> Path:
    """Pack the images 0 .. num - 1 of `folder` for the ADM evaluation suite.

    Key `arr_0`, uint8 [N,H,W,3], in `samples_NxHxWx3.npz` (Dhariwal and Nichol 2021). It is
    written image by image: 50,000 images of 256 px are 9.8 GB that never stand in memory. The
    file appears under its name when it is whole. Raises FastrepaError for a missing image, or one
    of another size than the first.
    """
    check_complete(folder, num)
    height, width = read_png(image_path(folder, 0)).shape[1:]
    target = folder / f"samples_{num}x{height}x{width}x3.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, height, width, 3)}
    with (
        aside(target) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        npy.write_array_header_1_0(member, header)
        for i in range(num):
            image = read_png(image_path(folder, i))
            if image.shape[1:] != (height, width):
                raise FastrepaError(
                    f"{image_path(folder, i)}: {image.shape[2]}x{image.shape[1]} pixels, the first "
                    f"image has {width}x{height}"
                )
            member.write(image.permute(1, 2, 0).numpy().tobytes())
    return target
