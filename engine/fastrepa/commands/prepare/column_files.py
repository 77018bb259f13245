"""A column's files in the making: whole or not there, each with a record of its completion."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from fastrepa.data.format.columns import seal
from fastrepa.data.format.shards import FeaturesColumn, FileRecord, MomentsColumn
from fastrepa.errors import DataError
from fastrepa.reading.text import read_json
from fastrepa.runtime.files import NewFile, write_whole

Column = MomentsColumn | FeaturesColumn


class ColumnFile:
    """A column file of one shard in the making; it gets its name when it is whole."""

    def __init__(self, folder: Path, column: Column, shard: int, stem: str, samples: int) -> None:
        self._path, self._record = paths(folder, column, stem)
        self._column = column
        self._file, self._cosine = NewFile(self._path), 1.0
        self.shard = shard
        header = {
            "descr": npy.dtype_to_descr(column.dtype),
            "fortran_order": False,
            "shape": (samples, column.views),
        }
        npy.write_array_header_2_0(self._file, header)

    def append(self, rows: np.ndarray, cosine: float) -> None:
        seal(rows)
        self._file.write(rows.view(np.uint8).data)
        self._cosine = min(self._cosine, cosine)

    def finish(self) -> None:
        sha256 = self._file.finish()
        record = FileRecord(
            file=self._path.name, bytes=self._file.num_bytes, sha256=sha256
        ).model_dump()
        done = {"column": identity(self._column), "file": record, "min_cosine": self._cosine}
        write_whole(self._record, json.dumps(done).encode())

    def drop(self) -> None:
        self._file.drop()


def paths(folder: Path, column: Column, stem: str) -> tuple[Path, Path]:
    """A shard's file of the column, and the hidden record of its completion.

    The name holds the column's version: one that is made anew must not touch the one in use.
    """
    return (
        folder / f"{stem}.{column.name}.{version(column)}.npy",
        folder / f".{stem}.{column.name}.json",
    )


def version(column: Column) -> str:
    """Eight hexadecimal digits of what the column was made with."""
    return hashlib.sha256(json.dumps(identity(column)).encode()).hexdigest()[:8]


def identity(column: Column) -> dict[str, Any]:
    """Return what a column's rows depend on: all fields but its files and what was measured."""
    return column.model_dump(mode="json", exclude={"files", "min_cosine"})


def difference(old: Column, new: Column) -> str:
    a, b = identity(old), identity(new)
    return "; ".join(f"{k} {a[k]!r}, not {b[k]!r}" for k in a if a[k] != b[k])


def finished(folder: Path, column: Column, stem: str) -> dict[str, Any] | None:
    """The record of a finished column file, when it is one of this column's and still there."""
    path, record = paths(folder, column, stem)
    try:
        done: dict[str, Any] = read_json(record)
        whole = path.stat().st_size == done["file"]["bytes"]
    except (OSError, DataError, KeyError, TypeError):
        return None
    return done if whole and done["column"] == identity(column) else None
