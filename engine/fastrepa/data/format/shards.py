"""The on-disk format of a prepared data set, and how one is opened and verified.

A set is a folder of
    shard-00000.tar        WebDataset: `{key}.jpg` (or .png, .webp) and `{key}.cls` (decimal text)
    shard-00000.idx.npy    its index (index.py): offset, size, CRC-32 and label of every sample
    shard-00000.NAME.npy   columns (columns.py): latents and features, a row for every sample
    sources.jsonl          line `int(key)`: the source file the sample was made of, or null
    manifest.json          counts, classes, resolution, and size and SHA-256 of every file above
Class index = rank of the class's folder name in sorted order (REPA_SPEC.md, "Reference data
layout").
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastrepa.data.format.columns import (
    features_dtype,
    first_damaged,
    first_row,
    moments_dtype,
    open_rows,
)
from fastrepa.data.format.index import BLOCK, KEY_DIGITS, key_text, load_index, padded
from fastrepa.data.format.store import ColumnFiles, ShardStore
from fastrepa.errors import DataError
from fastrepa.reading.text import is_address, read_json
from fastrepa.runtime.files import sha256_of
from fastrepa.runtime.terminal import typed

FORMAT = "fastrepa-shards"
VERSION = 1
MANIFEST = "manifest.json"
SOURCES = "sources.jsonl"
AUTO_FULL_BYTES = 1 << 30  # verify="auto" hashes every byte of sets up to this size

ImageFormat = Literal["jpeg", "png", "webp"]
EXTENSIONS: dict[str, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}

# A manifest may come from anyone: its names must stay inside the folder.
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
_Count = Annotated[int, Field(ge=0)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Record):
    """One file of the set: its name, size in bytes and SHA-256."""

    file: _FileName
    bytes: _Count
    sha256: _Sha256

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of a file as it lies on disk (reads all of it)."""
        return cls(file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


class ShardRecord(FileRecord):
    """One shard, the number of its samples, and its index."""

    samples: Annotated[int, Field(gt=0)]
    index: FileRecord


class ClassRecord(_Record):
    """One class: its name and the number of its samples. The class index is its place."""

    name: str
    samples: _Count


class SkippedRecord(_Record):
    """A source image left out by skip_bad: its path inside the source, and why."""

    source: str
    reason: str


class _Column(_Record):
    """Every column's views (2 with mirrored images), and a file for every shard."""

    views: Annotated[int, Field(ge=1, le=2)]
    precision: Literal["fp32", "bf16"]  # what the network computed in
    weights: str  # as configured
    digest: _Sha256 | None  # of the network's fp32 weights; None: made elsewhere
    files: tuple[FileRecord, ...] = Field(strict=False)


class MomentsColumn(_Column):
    """Latent moments of Stable Diffusion's autoencoder, fp16 [2 * channels, side, side]."""

    channels: Annotated[int, Field(gt=0)]
    side: Annotated[int, Field(gt=0)]

    @property
    def name(self) -> str:
        return "moments"

    @property
    def dtype(self) -> np.dtype:
        return moments_dtype(self.channels, self.side)


class FeaturesColumn(_Column):
    """A frozen encoder's patch tokens on its own grid, int8 with a scale per token.

    The fields are what the tokens depend on; `min_cosine`: of any stored token to the encoder's.
    """

    encoder: _FileName
    timm_name: str
    input_side: Annotated[int, Field(gt=0)]
    grid: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    mean: tuple[float, float, float] = Field(strict=False)
    std: tuple[float, float, float] = Field(strict=False)
    order: Literal["normalise-resize", "resize-normalise"]
    norm: bool
    min_cosine: float

    @property
    def name(self) -> str:
        return f"features.{self.encoder}"

    @property
    def dtype(self) -> np.dtype:
        return features_dtype(self.grid**2, self.width)


class Manifest(_Record):
    """`manifest.json`, typed."""

    format: Literal["fastrepa-shards"] = "fastrepa-shards"
    version: Literal[1] = 1
    resolution: Annotated[int, Field(gt=0)]
    image_format: ImageFormat
    quality: int | None
    seed: int
    num_samples: Annotated[int, Field(gt=0)]
    classes: tuple[ClassRecord, ...] = Field(strict=False)
    shards: tuple[ShardRecord, ...] = Field(strict=False)
    sources: FileRecord
    skipped: tuple[SkippedRecord, ...] = Field((), strict=False)
    moments: MomentsColumn | None = None
    features: tuple[FeaturesColumn, ...] = Field((), strict=False)

    @property
    def columns(self) -> tuple[MomentsColumn | FeaturesColumn, ...]:
        """Every column of the set."""
        return (*([self.moments] if self.moments else []), *self.features)


@dataclass(frozen=True)
class ShardSet:
    """A prepared data set that was opened and verified; see `ShardSet.open`."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        resolution: int | None = None,
        verify: Literal["sizes", "full", "auto"] = "auto",
        columns: bool = True,
    ) -> ShardSet:
        """Open the set in folder `path` and verify it before anything is read from it.

        Every shard must be there with its recorded size, and every index with its recorded
        SHA-256, whatever `verify` says. "full" hashes every shard too; "auto" does so for sets on a
        disk up to 1 GiB; "sizes" leaves altered bytes inside a shard to the reader's CRC-32.
        Without `columns` nobody looks at these: what makes them anew must be able to open the set.

        Raises DataError, naming the file, for anything missing, truncated, altered or foreign,
        and when the set was prepared at another `resolution` (pixels a side) than asked.
        """
        folder = path if isinstance(path, Path) else Path(path)  # of an address it is its own kind
        manifest = load_manifest(folder)
        if resolution is not None and manifest.resolution != resolution:
            raise DataError(
                f"{folder}: prepared at {manifest.resolution} px, but {resolution} px is asked for;"
                f" set data.resolution={manifest.resolution} or prepare it again"
            )
        shards = cls(folder, manifest)
        bare = {} if columns else {"moments": None, "features": ()}
        listed = manifest.model_copy(update=bare)
        for fault in QuickCheck(folder, listed).faults():
            if fault.refusal is not None:
                repair = _repair(folder) if fault.of_column else ""
                raise DataError(f"{folder / fault.file}: {fault.refusal}{repair}")
        small = shards.num_bytes <= AUTO_FULL_BYTES and not is_address(folder)
        if verify == "full" or (verify == "auto" and small):
            shards._check_contents()
        return shards

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards together, their columns included."""
        columns = (record for column in self.manifest.columns for record in column.files)
        return sum(record.bytes for record in (*self.manifest.shards, *columns))

    @property
    def resolution(self) -> int:
        """Side of every image in pixels."""
        return self.manifest.resolution

    @property
    def classes(self) -> list[str]:
        """Class names; the place in the list is the label."""
        return [record.name for record in self.manifest.classes]

    @property
    def class_sizes(self) -> list[int]:
        """Samples of each class, by its number; some may have none."""
        return [record.samples for record in self.manifest.classes]

    @property
    def digest(self) -> str:
        """SHA-256 of those of the shards and their indices: of the images, labels and order."""
        parts = [[shard.sha256, shard.index.sha256] for shard in self.manifest.shards]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [shard.samples for shard in self.manifest.shards]

    @property
    def shard_paths(self) -> list[Path]:
        return [self.path / shard.file for shard in self.manifest.shards]

    @property
    def index_paths(self) -> list[Path]:
        return [self.path / shard.index.file for shard in self.manifest.shards]

    @property
    def moments(self) -> MomentsColumn | None:
        """The stored latents' column; None: the set holds none."""
        return self.manifest.moments

    @property
    def features(self) -> tuple[FeaturesColumn, ...]:
        """The column of every encoder's stored features."""
        return self.manifest.features

    def store(
        self, *, image: bool, moments: bool, features: Sequence[str], open_shards: int
    ) -> ShardStore:
        """A reader of the wanted fields (store.py); `features` by the encoders' names.

        `open_shards`: shards whose files are held open. KeyError for a column that is not there.
        """
        columns = {column.name: column for column in self.manifest.columns}
        wanted = [columns[f"features.{encoder}"] for encoder in features]
        return ShardStore(
            self.shard_paths,
            self.index_paths,
            image=image,
            moments=self._column_files(columns["moments"]) if moments else None,
            features=[self._column_files(column) for column in wanted],
            open_shards=open_shards,
        )

    def _column_files(self, column: MomentsColumn | FeaturesColumn) -> ColumnFiles:
        paths = [self.path / record.file for record in column.files]
        return ColumnFiles(paths, column.dtype, column.views)

    def _check_contents(self) -> None:
        for shard in self.manifest.shards:
            path = self.path / shard.file
            if sha256_of(path) != shard.sha256:
                index = load_index(self.path / shard.index.file)
                raise DataError(f"{path}: damaged{_first_damaged(path, index)}")
        for column in self.manifest.columns:
            for shard, record in zip(self.manifest.shards, column.files, strict=True):
                path = self.path / record.file
                if sha256_of(path) != record.sha256:
                    rows = open_rows(path, column.dtype, shard.samples, column.views)
                    number = first_damaged(rows)
                    which = "" if number is None else f" (sample {number}: its CRC-32 is wrong)"
                    raise DataError(f"{path}: damaged{which}{_repair(self.path)}")
        path = self.path / self.manifest.sources.file
        if (problem := size_problem(self.path, self.manifest.sources)) is not None:
            raise DataError(f"{path}: {problem}")
        if sha256_of(path) != self.manifest.sources.sha256:
            raise DataError(f"{path}: damaged (its SHA-256 is not the manifest's)")


def load_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder}: no such data set (make one with `fastrepa prepare`)")
    if not path.exists():
        raise DataError(f"{path}: missing, so {folder} is no prepared data set")
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a fastrepa data set")
    if raw.get("version") != VERSION:
        raise DataError(
            f"{path}: format version {raw.get('version')!r}, this fastrepa reads {VERSION};"
            " prepare the set again or update fastrepa"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {place}: {first['msg']}") from None


class Fault(NamedTuple):
    """A fault of a file or sample. `refusal`: opening's words for it; None: it is opened anyway.
    of_column: whether it is a column's, which can be made anew.
    """

    file: str
    problem: str
    refusal: str | None
    sample: str | None = None
    of_column: bool = False


def _repair(folder: Path) -> str:
    if is_address(folder):
        return ""
    return f"; `fastrepa data verify {typed(folder)}` says which command makes it again"


class QuickCheck:
    """Finds what is wrong with a set without reading an image or a row.

    After `faults` was read to its end, `sound` has the names of the shards' and columns' files that
    are as long as recorded, `opened` (shard, column file) of the rows that can be opened, `indices`
    the index, by the shard's name, of every shard whose index can be read, whatever is wrong in it.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.sound: set[str] = set()
        self.opened: set[tuple[str, str]] = set()
        self.indices: dict[str, np.ndarray] = {}
        if is_address(folder):
            from fastrepa.data.format.remote import look_ahead

            columns = (record for column in manifest.columns for record in column.files)
            sized = [folder / record.file for record in (*manifest.shards, *columns)]
            look_ahead(sized, [folder / shard.index.file for shard in manifest.shards])

    def faults(self) -> Iterator[Fault]:
        """Yield every fault; the first with a refusal is what opening the set raises."""
        for shard in self.manifest.shards:
            for record in (shard, shard.index):
                yield from self._size(record)
            yield from self._index(shard)
        for column in self.manifest.columns:
            for fault in self._column(column):
                yield fault._replace(of_column=True)
        yield from self._counts()

    def _size(self, record: FileRecord) -> Iterator[Fault]:
        if (problem := size_problem(self.folder, record)) is None:
            self.sound.add(record.file)
        else:
            yield Fault(record.file, problem, problem)

    def _index(self, shard: ShardRecord) -> Iterator[Fault]:
        name = shard.index.file
        path = self.folder / name
        try:
            if name in self.sound and sha256_of(path) != shard.index.sha256:
                problem = "(its SHA-256 is not the manifest's)"
                yield Fault(name, f"altered {problem}", f"damaged {problem}")
            if not path.exists():
                return  # said already
            index = self.indices[shard.file] = load_index(path)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            yield Fault(name, problem, problem)
            return
        except DataError as error:
            problem = str(error).removeprefix(f"{path}: ")
            yield Fault(name, problem, problem)
            return
        if len(index) != shard.samples:
            problem = f"{len(index)} samples, the manifest says {shard.samples}"
            yield Fault(name, problem, problem)
        classes = len(self.manifest.classes)
        starts, sizes = index["image_offset"], index["image_size"].astype(np.int64)
        # The label's header and text come between.
        next_header = starts + padded(sizes) + 2 * BLOCK
        expected = np.concatenate(([BLOCK], next_header[:-1] + BLOCK))
        keys, labels = index["key"], index["label"]
        digits = np.char.isdigit(keys) & (np.char.str_len(keys) == KEY_DIGITS)
        outside = (starts < BLOCK) | (sizes < 1) | (next_header > shard.bytes)
        wrong: tuple[tuple[str, str | None, np.ndarray], ...] = (
            (f"its key is not {KEY_DIGITS} digits", None, ~digits),
            (
                f"its label is outside 0..{classes - 1}",
                f"a label outside the manifest's {classes} classes",
                (labels < 0) | (labels >= classes),
            ),
            (
                f"its bytes do not lie within {shard.file}",
                f"a sample beyond the end of {shard.file}",
                outside,
            ),
            (
                f"does not follow the sample before it in {shard.file}",
                None,
                ~outside & (starts != expected),
            ),
        )
        for problem, refusal, where in wrong:
            for number in np.flatnonzero(where):
                yield Fault(name, problem, refusal, key_text(keys[number]))

    def _column(self, column: MomentsColumn | FeaturesColumn) -> Iterator[Fault]:
        shards = self.manifest.shards
        if len(column.files) != len(shards):
            problem = f"{column.name} has {len(column.files)} files for {len(shards)} shards"
            yield Fault(MANIFEST, problem, problem)
        for record in column.files:
            yield from self._size(record)
        for shard, record in zip(shards, column.files, strict=False):
            if record.file not in self.sound:
                continue
            path = self.folder / record.file
            try:
                first_row(path, column.dtype, shard.samples, column.views)
                self.opened.add((shard.file, record.file))
            except DataError as error:
                problem = str(error).removeprefix(f"{path}: ")
                yield Fault(record.file, problem, problem)

    def _counts(self) -> Iterator[Fault]:
        manifest, refusal = self.manifest, "its counts are not those of the shards"
        total = sum(shard.samples for shard in manifest.shards)
        if total != manifest.num_samples:
            problem = f"num_samples is {manifest.num_samples}, its shards hold {total}"
            yield Fault(MANIFEST, problem, refusal)
        if len(self.indices) < len(manifest.shards):
            return  # the classes cannot be counted; why was said
        counts = np.zeros(len(manifest.classes), dtype=np.int64)
        for index in self.indices.values():
            labels = index["label"]
            labels = labels[(labels >= 0) & (labels < len(counts))]
            counts += np.bincount(labels, minlength=len(counts))
        for record, count in zip(manifest.classes, counts, strict=True):
            if record.samples != count:
                problem = f"class {record.name!r} has {record.samples} samples, the indices {count}"
                yield Fault(MANIFEST, problem, refusal)


def size_problem(folder: Path, record: FileRecord) -> str | None:
    """Return what is wrong with a file's presence and size; None: nothing."""
    try:
        size = (folder / record.file).stat().st_size
    except FileNotFoundError:
        return "missing, but the manifest lists it"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if size == record.bytes:
        return None
    kind = "truncated" if size < record.bytes else "too long"
    return f"{kind} ({size} bytes, the manifest says {record.bytes})"


def _first_damaged(path: Path, index: np.ndarray) -> str:
    """Return ', sample KEY' of a damaged shard's first sample whose CRC-32 is not the index's."""
    with path.open("rb") as file:
        for record in index:
            file.seek(int(record["image_offset"]))
            if zlib.crc32(file.read(int(record["image_size"]))) != record["image_crc32"]:
                return f" (sample {record['key'].decode()}: its CRC-32 is not the index's)"
    return " (its SHA-256 is not the manifest's; no image is affected)"
