"""numpy's files of others: one line for whatever is wrong, never a pickle, nothing endless."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrepa.commands.evaluate.feature_sets import StatisticsCache, Wanted
from fastrepa.commands.evaluate.image_sources import AdmImages, Statistics, open_stored
from fastrepa.data.format.columns import moments_dtype, open_rows, seal
from fastrepa.errors import DataError
from fastrepa.reading.arrays import map_npy, npz_names, npz_stream, read_npy, read_npz

PICTURES = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(text: str, version: bytes = b"\1\0") -> bytes:
    raw = text.encode() + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(raw))
    return b"\x93NUMPY" + version + size + raw


def said(descr: str = "'|u1'", shape: str = "(4, 6, 6, 3)", fortran: str = "False") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}")


def npz(member: bytes, name: str = "arr_0.npy", method: int = zipfile.ZIP_STORED) -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, member)
    return bytearray(buffer.getvalue())


def read_whole(path: Path) -> torch.Tensor:
    source = open_stored(path)
    assert isinstance(source, AdmImages)
    (batch,) = source.batches([torch.arange(source.num)])
    return batch[0]


# --- what is right stays right -------------------------------------------------------------------


@pytest.mark.parametrize("array", [
    PICTURES, PICTURES.T, np.arange(5.0), np.float64(3).reshape(()), np.zeros((0, 3), np.int32),
    np.array(["a", "bc"]), np.zeros(3, [("a", "<f2", (2, 2)), ("b", "i1")]),
    np.asfortranarray(np.arange(12).reshape(3, 4)), np.arange(4, dtype=">i8"),
])  # fmt: skip
def test_arrays_come_back_from_either_file(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    for found in (read_npy(tmp_path / "a.npy"), map_npy(tmp_path / "a.npy")):
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", array, named=array)
        assert npz_names(tmp_path / "a.npz") == ["named", "arr_0"]
        found = read_npz(tmp_path / "a.npz")
        assert all(np.array_equal(found[name], array) for name in ("named", "arr_0"))
        assert list(read_npz(tmp_path / "a.npz", {"named", "other"})) == ["named"]
        with npz_stream(tmp_path / "a.npz", "arr_0") as (told, file):
            assert (told.dtype, told.shape) == (array.dtype, array.shape)
            assert file.read() == array.tobytes("F" if told.fortran else "C")


def test_rows_stay_mapped(tmp_path: Path) -> None:
    rows = np.zeros((5, 2), moments_dtype(4, 2))
    seal(rows)
    np.save(tmp_path / "rows.npy", rows)
    assert isinstance(open_rows(tmp_path / "rows.npy", rows.dtype, 5, 2), np.memmap)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_images_of_an_npz_are_streamed(tmp_path: Path, method: int) -> None:
    (tmp_path / "a.npz").write_bytes(npz(npy(PICTURES), method=method))
    source = open_stored(tmp_path / "a.npz")
    assert isinstance(source, AdmImages)
    batches = source.batches([torch.tensor([1, 2]), torch.tensor([6])])  # another rank has others
    for wanted, batch in zip(([1, 2], [6]), batches, strict=True):
        assert np.array_equal(batch[0].permute(0, 2, 3, 1).numpy(), PICTURES[wanted])


# --- what is wrong is one line -------------------------------------------------------------------


def damaged() -> Iterator[tuple[str, bytes | bytearray]]:
    good, values = npz(npy(PICTURES)), bytes(4 * 6 * 6 * 3)
    for name, method in (("stored", 0), ("deflated", zipfile.ZIP_DEFLATED)):
        flipped = npz(npy(PICTURES), method=method)
        flipped[400] ^= 1
        yield f"a bit, {name}", flipped
    central = good.find(b"PK\1\2")
    for name, here, there, value in (
        ("encrypted", 6, 8, 1), ("method 99", 8, 10, 99), ("method 97", 8, 10, 97),
    ):  # fmt: skip
        changed = bytearray(good)
        changed[here] = changed[central + there] = value
        yield name, changed
    yield "empty", b""
    yield "text", b"hello"
    yield "half", good[: len(good) // 2]
    yield "a pickle", b"\x80\x04K\x01."
    yield "a .npy", npy(PICTURES)
    yield "a pickle in it", npz(npy(np.array([{}, []], dtype=object)))
    yield "nothing in it", npz(b"")
    yield "text in it", npz(b"hello")
    for shape in ("(1000000000000, 4096, 4096, 3)", "(4, 0, 0, 3)", "(0, 6, 6, 3)",
                  "(-4, 6, 6, -3)", "(True, 6, 6, 3)", "(4, 6, 6)", "()", "4", "[4, 6, 6, 3]",
                  "(4.0, 6, 6, 3)", f"({'9' * 5000}, 6, 6, 3)", "(" * 3000, "(5, 6, 6, 3)",
                  "(3, 6, 6, 3)"):  # fmt: skip
        yield f"shape {shape[:30]}", npz(said(shape=shape) + values)
    for descr in ("'O'", "'|V0'", "'<f4'", "'nonsense'", "[('a', 'O')]", "['a']", "None",
                  "('<f4', (1000000000,))", "'M8[s]'", "{}", "[" * 900 + "]" * 900):  # fmt: skip
        yield f"dtype {descr[:30]}", npz(said(descr=descr) + values)
    yield "Fortran's order", npz(said(fortran="True") + values)
    yield "brackets", npz(header("(" * 8999))
    yield "a long header", npz(header(" " * 60_000))
    yield "an endless header", npz(b"\x93NUMPY\2\0\xff\xff\xff\xff{")
    yield "another version", npz(header("{}", b"\7\0"))
    yield "code", npz(header("__import__('os').system('true')"))


DAMAGED = dict(damaged())


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_npz_is_one_line_that_names_it(tmp_path: Path, what: str) -> None:
    path = tmp_path / "some.npz"
    path.write_bytes(bytes(DAMAGED[what]))
    with pytest.raises(DataError) as e:
        read_whole(path)
    line = str(e.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 600
    for advice in ("allow_pickle", "trust", "unsafe"):
        assert advice not in line


def test_statistics_are_finite_numbers_that_fit(tmp_path: Path) -> None:
    path, sigma = tmp_path / "s.npz", np.eye(4)
    np.savez(path, mu=np.zeros(4, np.float32), sigma=sigma)
    assert isinstance(open_stored(path), Statistics)
    for mu in (np.full(4, np.nan), np.array(list("abcd")), np.zeros(4, complex), np.zeros(3),
               np.zeros((4, 1)), np.float64(0), np.zeros(4, [("a", "f4")])):  # fmt: skip
        np.savez(path, mu=mu, sigma=sigma)
        with pytest.raises(DataError, match=r"s\.npz: (mu|not)"):
            open_stored(path)


@pytest.mark.parametrize("read", [read_npy, map_npy])
def test_a_damaged_npy_is_one_line_that_names_it(tmp_path: Path, read) -> None:
    path, good = tmp_path / "some.npy", npy(PICTURES)
    bad = [b"", b"\x93NUM", good[:-1], good + b"x", good[:20], npy(np.array([{}], dtype=object)),
           said(shape="(1000000000000, 4096)"), header("(" * 8999), bytes(npz(good))]  # fmt: skip
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"some\.npy: not a column \("):
            read(path, "a column")
    path.unlink()
    with pytest.raises(DataError, match=r"some\.npy: gone$"):
        read(path, missing="gone")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


def test_a_damaged_cache_of_statistics_counts_for_nothing(tmp_path: Path) -> None:
    class Some:
        name, identity = "inception", {"a": 1}

    cache = StatisticsCache(tmp_path)
    path = cache.path("digest", Some())  # type: ignore[arg-type]
    for data in DAMAGED.values():
        path.write_bytes(bytes(data))
        assert cache.load("digest", Some(), Wanted(frozenset(), frozenset())) is None  # type: ignore[arg-type]


# --- fuzz ----------------------------------------------------------------------------------------

positions = st.tuples(st.floats(0, 1), st.sampled_from(["flip", "set", "cut"]), st.integers(0, 255))
mutations = st.lists(positions, min_size=1, max_size=4)
SMALL = np.arange(48, dtype=np.uint8).reshape(2, 2, 4, 3)
NPZ = [bytes(npz(npy(SMALL), method=method)) for method in (0, zipfile.ZIP_DEFLATED)]
_statistics = io.BytesIO()
np.savez(_statistics, mu=np.zeros(2), sigma=np.eye(2))
NPZ.append(_statistics.getvalue())


def mutated(data: bytes, changes: list[tuple[float, str, int]]) -> bytes:
    raw = bytearray(data)
    for share, how, value in changes:
        at = math.floor(share * (len(raw) - 1))
        if how == "flip":
            raw[at] ^= 1 << value % 8
        elif how == "set":
            raw[at] = value
        elif len(raw) > value + 1:
            del raw[at : at + value]
    return bytes(raw)


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(NPZ), mutations)
def test_a_mutated_npz_is_read_or_says_why(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, changes: list[tuple[float, str, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.npz"
    path.write_bytes(mutated(data, changes))
    with suppress(DataError):
        read_npz(path)
    with suppress(DataError):
        source = open_stored(path)
        if isinstance(source, AdmImages):
            assert len(list(source.batches([torch.arange(source.num)]))) == 1


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(mutations)
def test_a_mutated_npy_is_read_or_says_why(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, str, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.npy"
    path.write_bytes(mutated(npy(SMALL), changes))
    for read in (read_npy, map_npy):
        with suppress(DataError):
            read(path)
