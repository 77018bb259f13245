"""numpy's files, .npy and .npz, read so that whatever is wrong with one is one line that names it.

Never a pickle. A header is believed only where the file has just the bytes that it speaks of, so
an endless shape costs nothing; of a .npz the checksum of what is read to its end is compared.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from fastrepa.errors import DataError, FastrepaError, worded

NPZ = "readable as npz"

_HEADER_BYTES = 10_000  # numpy's own limit: parsing is slow, and deep in the stack
_BLOCK = 1 << 20
_REASON = 200  # characters of a library's words


class NpyHeader(NamedTuple):
    """The header of a .npy: its array, and all of the file's bytes before the values."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    raw: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy(
    path: Path, what: str = "a readable .npy", *, missing: str | None = None
) -> np.ndarray:
    """Return the array in a .npy.

    Raises DataError: `PATH: not WHAT (why)`, or `PATH: MISSING` for no such file.
    """
    with _naming(path, what, missing):
        with path.open("rb") as file:
            header = _header(file)
            _check_size(header, file.seek(0, os.SEEK_END))
            file.seek(len(header.raw))
            values = np.empty(math.prod(header.shape), header.dtype)
            into = values.view(np.uint8).data if header.num_bytes else memoryview(bytearray())
            if file.readinto(into) != len(into):
                raise EOFError("it ends early")
        return _shaped(values, header)


def map_npy(path: Path, what: str = "a readable .npy", *, missing: str | None = None) -> np.ndarray:
    """Return the array in a .npy, memory-mapped and read-only; errors as `read_npy`'s."""
    with _naming(path, what, missing):
        header = _header_of(path)
        if not header.num_bytes:  # of nothing there is no map
            return np.empty(header.shape, header.dtype)
        order = "F" if header.fortran else "C"
        return np.memmap(path, header.dtype, "r", len(header.raw), header.shape, order)  # type: ignore[call-overload]


def read_header(
    path: Path, what: str = "a readable .npy", *, missing: str | None = None
) -> NpyHeader:
    """Return the header of a .npy whose size fits it; errors as `read_npy`'s."""
    with _naming(path, what, missing):
        return _header_of(path)


def npz_names(path: Path, what: str = NPZ) -> list[str]:
    """Return the names of a .npz's arrays; errors as `read_npy`'s."""
    with _naming(path, what), zipfile.ZipFile(path) as archive:
        return list(_members(archive))


def read_npz(
    path: Path, names: Collection[str] | None = None, what: str = NPZ
) -> dict[str, np.ndarray]:
    """Return arrays of a .npz by name: all, or those of `names` that it has.

    Raises DataError as `read_npy` does, for one array that is damaged, too.
    """
    found = {}
    with _naming(path, what), zipfile.ZipFile(path) as archive:
        for name, member in _members(archive).items():
            if names is None or name in names:
                with _opened(archive, member) as (header, file):
                    values = np.empty(math.prod(header.shape), header.dtype)
                    into = values.view(np.uint8).data if header.num_bytes else memoryview(b"")
                    for at in range(0, len(into), _BLOCK):
                        block = into[at : at + _BLOCK]
                        if file.readinto(block) != len(block):  # type: ignore[attr-defined]
                            raise EOFError(f"{name} ends early")
                    found[name] = _shaped(values, header)
    return found


@contextmanager
def npz_stream(path: Path, name: str, what: str = NPZ) -> Iterator[tuple[NpyHeader, IO[bytes]]]:
    """Open an array of a .npz: its header, and a file that gives its values, from the first on.

    What goes wrong while the block reads is a DataError as `read_npy`'s; so is a wrong checksum,
    where it reads, rather than seeks, to the end.
    """
    with (
        _naming(path, what),
        zipfile.ZipFile(path) as archive,
        _opened(archive, _members(archive)[name]) as opened,
    ):
        yield opened


# What the file says ----------------------------------------------------------------------------


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}


@contextmanager
def _opened(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> Iterator[tuple[NpyHeader, IO[bytes]]]:
    if member.flag_bits & 1:
        raise ValueError(f"{member.filename[:_REASON]} is encrypted")
    with archive.open(member) as file:
        header = _header(file)
        _check_size(header, member.file_size)
        yield header, file


def _header_of(path: Path) -> NpyHeader:
    with path.open("rb") as file:
        header = _header(file)
        _check_size(header, file.seek(0, os.SEEK_END))
    return header


def _check_size(header: NpyHeader, size: int) -> None:
    wanted = len(header.raw) + header.num_bytes
    if size != wanted:
        shape = str(list(header.shape))[:80]
        raise ValueError(f"{size} bytes, but {header.dtype} {shape} and its header are {wanted}")


def _header(file: IO[bytes]) -> NpyHeader:
    """Read a .npy's header. ValueError for any other file and for an array of Python objects."""
    start = file.read(len(npy.MAGIC_PREFIX) + 2)
    if not start:
        raise ValueError("empty")
    version = start[-2:]
    if not start.startswith(npy.MAGIC_PREFIX) or version not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("it does not begin as a .npy does")
    count = file.read(2 if version == b"\1\0" else 4)
    length = int.from_bytes(count, "little")
    if length > _HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    text = file.read(length)
    parse = npy.read_array_header_1_0 if version == b"\1\0" else npy.read_array_header_2_0
    try:
        shape, fortran, dtype = parse(io.BytesIO(count + text))
    except Exception:  # numpy's parser raises almost anything, and advises to trust the file
        raise ValueError("a header that is no .npy's") from None
    if dtype.hasobject:
        raise ValueError("Python objects, which only a pickle can hold")
    if dtype.subdtype or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError("a header that is no .npy's")
    return NpyHeader(shape, fortran, dtype, start + count + text)


def _shaped(values: np.ndarray, header: NpyHeader) -> np.ndarray:
    if header.fortran:
        return values.reshape(header.shape[::-1]).T
    return values.reshape(header.shape)


@contextmanager
def _naming(path: Path, what: str, missing: str | None = None) -> Iterator[None]:
    """Make one line of whatever a damaged file makes zipfile, zlib, numpy or Python raise."""
    try:
        yield
    except FastrepaError:
        raise
    except OSError as e:
        gone = missing is not None and isinstance(e, FileNotFoundError)
        why = missing if gone else f"cannot be read ({worded(e)})"
        raise DataError(f"{path}: {why}") from None
    except MemoryError:
        raise DataError(f"{path}: not {what} (more than there is memory for)") from None
    except Exception as e:
        raise DataError(f"{path}: not {what} ({worded(e, _REASON)})") from None
