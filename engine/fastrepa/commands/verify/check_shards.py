"""Everything that can be wrong with a set of shards (shards.py has the format)."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from fastrepa.commands.verify.checks import Check, FileProblem, Findings, image_problem
from fastrepa.data.format.columns import CRC_BYTES, first_row
from fastrepa.data.format.index import BLOCK, key_text, padded
from fastrepa.data.format.partial import CONTACT_SHEET, REPORT
from fastrepa.data.format.shards import (
    EXTENSIONS,
    MANIFEST,
    FeaturesColumn,
    FileRecord,
    Manifest,
    MomentsColumn,
    QuickCheck,
    ShardRecord,
    load_manifest,
    size_problem,
)
from fastrepa.errors import DataError
from fastrepa.reading.text import parse_json
from fastrepa.runtime.ownership import LOCK
from fastrepa.runtime.terminal import typed

IMAGES_PER_CHECK = 256
BYTES_PER_CHECK = 32 << 20
_HASH_STEP = 8 << 20
_BESIDE = (MANIFEST, REPORT, CONTACT_SHEET)  # what belongs to a set and is in no list


def plan_shards(folder: Path, findings: Findings, *, quick: bool) -> list[Check]:
    """Check sizes, counts and indices of the set in `folder` now; what needs its contents, later.

    `quick` leaves out the latter. Problems and notes go to `findings`.
    """
    manifest = _manifest(folder, findings)
    if manifest is None:
        return []
    records = list(_records(manifest))
    twice = [name for name, times in Counter(r.file for r in records).items() if times > 1]
    for name in twice:
        findings.wrong(MANIFEST, f"lists {name} more than once")
    _note_others(folder, {record.file for record in records}, findings)
    quick_check = QuickCheck(folder, manifest)
    for fault in quick_check.faults():
        findings.wrong(fault.file, fault.problem, fault.sample)
    there, indices = quick_check.sound, quick_check.indices
    if (problem := size_problem(folder, manifest.sources)) is None:
        there.add(manifest.sources.file)
        _check_sources(folder, manifest, indices, findings)
    else:
        findings.wrong(manifest.sources.file, problem)
    findings.num_files = len({record.file for record in records}) + 1
    findings.num_bytes = sum(record.bytes for record in records if record.file in there)
    numbers: dict[str, list[int]] = {}
    for number, record in enumerate(manifest.classes):
        numbers.setdefault(record.name, []).append(number)
    for name, alike in numbers.items():  # ImageNet has two cranes
        if len(alike) > 1:
            listed = " and ".join(map(str, alike))
            findings.notes.append(f"{MANIFEST}: {name!r} is the name of classes {listed}")
    _check_keys(indices, findings)
    return [] if quick else list(_checks(quick_check, findings))


def repairs(folder: Path, problems: Sequence[FileProblem]) -> list[str]:
    """Say by which commands the problems of a set of shards go away."""
    if not problems:
        return []
    try:
        manifest = load_manifest(folder)
        columns = manifest.columns
    except DataError:
        columns = ()
    said, left = [], list(problems)
    for column in columns:
        files = {record.file for record in column.files}
        # That there are too few of them is a problem of the manifest's.
        too_few = f"{column.name} has "
        rest = [p for p in left if p.file not in files and not p.problem.startswith(too_few)]
        if len(rest) < len(left):
            said.append(f"{column.name} is made again, where it is damaged, by:")
            said.append(f"  {_encode(folder, manifest, column)}")
        left = rest
    if others := sorted({problem.file for problem in left}):
        named = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        said.append(
            f"{named}: cannot be made again in place; take the set from a copy, or prepare its "
            "source again into a new folder"
        )
    return said


def _encode(folder: Path, manifest: Manifest, column: MomentsColumn | FeaturesColumn) -> str:
    """The command that makes a column as it was made; `--replace` also looks at its contents."""
    if column.digest is None:
        quality = f" --quality {manifest.quality}" if manifest.quality is not None else ""
        return (
            f"fastrepa prepare SOURCE {typed(folder)} --resolution {manifest.resolution} "
            f"--shard-size {max(shard.samples for shard in manifest.shards)} "
            f"--format {manifest.image_format}{quality} --seed {manifest.seed}, "
            "with the source that it came from"
        )
    command = f"fastrepa data encode {typed(folder)}"
    if isinstance(column, MomentsColumn):
        command += f" --codec sd-vae --codec-weights {typed(column.weights)}"
    else:
        weights = "" if column.weights == "hub" else f"={column.weights}"
        command += f" --cache-features {typed(f'{column.encoder}{weights}@{column.input_side}')}"
    flip = " --flip" if column.views == 2 else ""
    return f"{command} --precision {column.precision}{flip} --replace"


def _checks(quick_check: QuickCheck, findings: Findings) -> Iterator[Check]:
    """List what is to be read; counts it in `findings`."""
    folder, manifest = quick_check.folder, quick_check.manifest
    indices = quick_check.indices
    for shard in manifest.shards:
        if shard.file in quick_check.sound:
            yield HashCheck(folder, shard)
        if shard.file in indices and (folder / shard.file).is_file():
            yield from _image_checks(folder, shard, indices[shard.file], manifest)
            findings.num_images += len(indices[shard.file])
    for column in manifest.columns:
        findings.columns[column.name] = 0
        for shard, record in zip(manifest.shards, column.files, strict=False):
            if record.file in quick_check.sound:
                yield HashCheck(folder, record)
            if (shard.file, record.file) in quick_check.opened:
                findings.columns[column.name] += shard.samples
                yield from _row_checks(folder, shard, record, column, indices.get(shard.file))


def _manifest(folder: Path, findings: Findings) -> Manifest | None:
    try:
        return load_manifest(folder)
    except DataError as error:
        # It names the first of the keys that pydantic refused; here they are all wanted.
        refusal = error.__context__
        if not isinstance(refusal, ValidationError):
            findings.wrong(MANIFEST, str(error).removeprefix(f"{folder / MANIFEST}: "))
            return None
        for one in refusal.errors():
            findings.wrong(MANIFEST, f"{'.'.join(map(str, one['loc']))}: {one['msg']}")
    return None


def _records(manifest: Manifest) -> Iterator[FileRecord]:
    for shard in manifest.shards:
        yield from (shard, shard.index)
    for column in manifest.columns:
        yield from column.files
    yield manifest.sources


def _note_others(folder: Path, known: set[str], findings: Findings) -> None:
    for path in sorted(folder.iterdir()):
        if path.name in known or path.name in _BESIDE or path.name == LOCK:
            continue
        if path.name.endswith(".tmp"):
            findings.notes.append(f"{path.name}: left by a run that was interrupted")
        elif ".moments." in path.name or ".features." in path.name:
            findings.notes.append(
                f"{path.name}: of a column that the manifest does not list; its encoding is "
                f"unfinished, the same fastrepa data encode goes on"
            )
        else:
            findings.notes.append(f"{path.name}: unknown; the manifest does not list it")


def _check_keys(indices: dict[str, np.ndarray], findings: Findings) -> None:
    """A key that several samples of the set have is named at every one after the first."""
    if not indices:
        return
    keys = np.concatenate([index["key"] for index in indices.values()])
    _, first = np.unique(keys, return_index=True)
    again = np.ones(len(keys), dtype=bool)
    again[first] = False
    ends = np.cumsum([len(index) for index in indices.values()])
    shards = list(indices)
    for place in np.flatnonzero(again):
        shard = shards[int(np.searchsorted(ends, place, side="right"))]
        findings.wrong(shard, "its key is another sample's, too", key_text(keys[place]))


def _check_sources(
    folder: Path, manifest: Manifest, indices: dict[str, np.ndarray], findings: Findings
) -> None:
    name = manifest.sources.file
    try:
        raw = (folder / name).read_bytes()
    except OSError as error:
        findings.wrong(name, f"cannot be read ({error.strerror})")
        return
    if hashlib.sha256(raw).hexdigest() != manifest.sources.sha256:
        findings.wrong(name, "altered (its SHA-256 is not the manifest's)")
    lines = raw.splitlines()
    for number, line in enumerate(lines):
        try:
            parse_json(line, name)
        except DataError:
            findings.wrong(name, f"line {number + 1} is not JSON")
    # Keys that are no numbers were named already.
    unnamed = np.array([line == b"null" for line in lines], dtype=bool)
    for index in indices.values():
        keys = index["key"][np.char.isdigit(index["key"])]
        places = keys.astype(np.int64)
        beyond = places >= len(unnamed)
        beyond[~beyond] = unnamed[places[~beyond]]
        for key in keys[beyond]:
            findings.wrong(name, "no source is named for it", key_text(key))


@dataclass(frozen=True)
class HashCheck:
    """A file's SHA-256."""

    folder: Path
    record: FileRecord

    @property
    def file(self) -> str:
        return self.record.file

    @property
    def num_bytes(self) -> int:
        return self.record.bytes

    def run(self, go_on: Callable[[], None]) -> list[FileProblem]:
        digest = hashlib.sha256()
        with (self.folder / self.file).open("rb", buffering=0) as file:
            while block := file.read(_HASH_STEP):
                digest.update(block)
                go_on()
        if digest.hexdigest() == self.record.sha256:
            return []
        return [FileProblem(self.file, None, "altered (its SHA-256 is not the manifest's)")]


@dataclass(frozen=True)
class ImagesCheck:
    """Some samples of a shard: tar headers, CRC-32, decodability, size, and the label's text."""

    folder: Path
    file: str
    index: np.ndarray
    resolution: int
    image_format: str

    @property
    def num_bytes(self) -> int:
        return int(self.index["image_size"].sum())

    def run(self, go_on: Callable[[], None]) -> list[FileProblem]:
        problems = []
        with (self.folder / self.file).open("rb") as file:
            for number, record in enumerate(self.index):
                go_on()
                start, size = int(record["image_offset"]), int(record["image_size"])
                file.seek(start - BLOCK)
                data = file.read(3 * BLOCK + padded(size))
                key = _key(self.index, number)
                problems += [
                    FileProblem(self.file, key, problem)
                    for problem in self._of_sample(data, record, key, size)
                ]
        return problems

    def _of_sample(self, data: bytes, record: np.void, key: str, size: int) -> Iterator[str]:
        if len(data) < BLOCK + size:
            yield "beyond the end of the file"
            return
        image, label = data[BLOCK : BLOCK + size], data[BLOCK + padded(size) :]
        yield from _header_problem(data[:BLOCK], f"{key}.{EXTENSIONS[self.image_format]}", size)
        if zlib.crc32(image) != record["image_crc32"]:
            yield "altered (its CRC-32 is not the index's)"
        if (problem := image_problem(image, self.resolution, self.image_format)) is not None:
            yield f"image {problem}"
        text = b"%d" % record["label"]
        named = list(_header_problem(label[:BLOCK], f"{key}.cls", None))
        yield from named
        if not named and label[BLOCK:].rstrip(b"\0\n ") != text:
            found = label[BLOCK:].rstrip(b"\0").decode("ascii", "replace")[:20]
            yield f"its .cls says {found!r}, the index {text.decode()}"


@dataclass(frozen=True)
class RowsCheck:
    """Some rows of a column: their CRC-32, and values that can be what they are said to be."""

    path: Path
    column: MomentsColumn | FeaturesColumn
    samples: int
    first: int
    keys: tuple[str, ...]  # of the rows from `first` on

    @property
    def file(self) -> str:
        return self.path.name

    @property
    def num_bytes(self) -> int:
        return self.column.dtype.itemsize * self.column.views * len(self.keys)

    def run(self, go_on: Callable[[], None]) -> list[FileProblem]:
        go_on()
        column = self.column
        shape, size = (len(self.keys), column.views), column.dtype.itemsize * column.views
        begin = first_row(self.path, column.dtype, self.samples, column.views) + self.first * size
        with self.path.open("rb") as file:
            file.seek(begin)
            raw = file.read(size * len(self.keys))
        if len(raw) < size * len(self.keys):
            return [FileProblem(self.file, None, "it became shorter while it was read")]
        rows = np.frombuffer(raw, column.dtype).reshape(shape)
        if isinstance(column, MomentsColumn):
            wrong = _of_moments(rows, column)
        else:
            wrong = _of_features(rows)
        wrong["altered (its CRC-32 is wrong)"] = _crc_differs(rows)
        return [
            FileProblem(
                self.file, self.keys[n] + (f" view {v}" if column.views > 1 else ""), problem
            )
            for problem, where in wrong.items()
            for n, v in np.argwhere(where)
        ]


def _of_moments(rows: np.ndarray, column: MomentsColumn) -> dict[str, np.ndarray]:
    """Return where [n, V] each problem of moments is found."""
    moments: Any = rows["moments"].astype(np.float32).reshape(*rows.shape, 2 * column.channels, -1)
    deviation = moments[:, :, column.channels :]
    return {
        "moments that are not finite": ~np.isfinite(moments).all((2, 3)),
        "a negative standard deviation": (deviation < 0).any((2, 3)),
    }


def _of_features(rows: np.ndarray) -> dict[str, np.ndarray]:
    scale, tokens = rows["scale"], rows["tokens"]
    return {
        "scales that are not finite and positive": ~(np.isfinite(scale) & (scale > 0)).all(2),
        "every token is zero": ~tokens.any((2, 3)),
        "tokens outside -127..127": (tokens == -128).any((2, 3)),
    }


def _crc_differs(rows: np.ndarray) -> np.ndarray:
    size = rows.dtype.itemsize
    raw = rows.reshape(-1).view(np.uint8).reshape(-1, size)
    sums = [zlib.crc32(row[: size - CRC_BYTES].data) for row in raw]
    return np.array(sums, dtype=np.uint32).reshape(rows.shape) != rows["crc32"]


def _image_checks(
    folder: Path, shard: ShardRecord, index: np.ndarray, manifest: Manifest
) -> Iterator[ImagesCheck]:
    sizes = index["image_size"].astype(np.int64)
    ends = index["image_offset"] + sizes
    # The others were named already.
    index = index[(index["image_offset"] >= BLOCK) & (sizes > 0) & (ends <= shard.bytes)]
    for first in range(0, len(index), IMAGES_PER_CHECK):
        part = index[first : first + IMAGES_PER_CHECK]
        yield ImagesCheck(folder, shard.file, part, manifest.resolution, manifest.image_format)


def _row_checks(
    folder: Path,
    shard: ShardRecord,
    record: FileRecord,
    column: MomentsColumn | FeaturesColumn,
    index: np.ndarray | None,
) -> Iterator[RowsCheck]:
    if index is not None and len(index) == shard.samples:
        keys = [_key(index, number) for number in range(len(index))]
    else:
        keys = [f"in row {number}" for number in range(shard.samples)]
    step = max(1, BYTES_PER_CHECK // (column.dtype.itemsize * column.views))
    for first in range(0, shard.samples, step):
        part = tuple(keys[first : first + step])
        yield RowsCheck(folder / record.file, column, shard.samples, first, part)


def _header_problem(block: bytes, name: str, size: int | None) -> Iterator[str]:
    """Yield a problem where the tar header at the place of member `name` is not its header."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        yield f"the tar header of {name} is damaged ({error})"
        return
    if member.name != name:
        yield f"the tar has {member.name!r} where {name} should be"
    elif size is not None and member.size != size:
        yield f"{name} has {member.size} bytes in the tar, {size} in the index"


def _key(index: np.ndarray, number: int) -> str:
    return key_text(index["key"][number])
