"""Sources of any kind of a few files, and how they are listed or refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastrepa.data.sources.entries import Listing
from fastrepa.data.sources.listing import list_source
from fastrepa.errors import DataError
from tests.sets.archives import Files, tar_bytes, written, zip_bytes

KINDS = ("folder", "zip", "tar")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(30)  # listing reads no pixels


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


def table(path: Path, rows: list[tuple[int, bytes]], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [data for _, data in rows], "label": [label for label, _ in rows]}
    pq.write_table(pa.table({**columns, **more}), path)
    return path
