"""A preparation's report: `report.json` inside the set, and tables on the screen.

The file holds no times and nothing about the machine: it depends on the source and settings alone.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fastrepa.commands.prepare.plan import ShardPlan
from fastrepa.commands.prepare.writer import TRAITS, ShardDone
from fastrepa.data.format.index import load_index
from fastrepa.data.format.partial import REPORT
from fastrepa.data.format.shards import Manifest, SkippedRecord
from fastrepa.errors import DataError, printable
from fastrepa.reading.text import read_json
from fastrepa.runtime.terminal import counted, print_table, quoted, typed

_SHOWN = 5  # examples of each reason and of duplicates on the screen


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Record):
    """The smallest, the middle and the largest of some numbers."""

    min: int
    median: int
    max: int

    @classmethod
    def of(cls, values: Iterable[int]) -> Spread:
        array = np.fromiter(values, dtype=np.int64)
        # The lower of two middles: a number that occurs.
        middle = np.partition(array, (len(array) - 1) // 2)[(len(array) - 1) // 2]
        return cls(min=int(array.min()), median=int(middle), max=int(array.max()))


class Duplicates(_Record):
    """Sources that became the same stored bytes."""

    sources: list[str]
    labels_differ: bool


class PassedOver(_Record):
    """Files of the source that are no images by their names, of one extension."""

    extension: str  # ".heic", "" for none
    files: int
    pictures: int  # of them: pictures by their first bytes, or in no class folder
    first: list[str]


class SetReport(_Record):
    """`report.json`, typed."""

    images: int
    classes: int
    shards: int
    bytes: int  # of the shards and their indices
    resolution: int
    image_format: str
    quality: int | None
    samples_per_class: Spread
    bytes_per_image: Spread
    source_short_side: Spread  # pixels, upright
    source_long_side: Spread
    source_formats: dict[str, int]
    source_modes: dict[str, int]  # Pillow's pixel modes
    animated: int  # of several frames or pages, of which the first was taken
    enlarged: int  # smaller than the resolution
    original: int  # JPEGs of just this size, stored as they were
    misnamed: int  # of another format than their extension says
    dim: int = 0  # of 16 bits, with no sample in the upper three quarters of their range
    ignored: int  # files of the source that are no images by their names
    passed_over: list[PassedOver] = []  # what they are; not in older reports
    rejected: list[SkippedRecord]
    duplicates: list[Duplicates]
    counts: dict[str, int]  # samples of each class, in label order; "NAME (LABEL)" if it has twins


def make_report(
    folder: Path, plan: ShardPlan, manifest: Manifest, done: Sequence[ShardDone]
) -> SetReport:
    """The report of finished shards, whose marks `done` are in order."""
    formats: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    traits: Counter[str] = Counter(dict.fromkeys(TRAITS, 0))
    for mark in done:
        formats.update(mark.formats)
        modes.update(mark.modes)
        traits.update(mark.traits)
    sides = np.array([side for mark in done for side in mark.sides], dtype=np.int64)
    indices = [load_index(folder / shard.index.file) for shard in manifest.shards]
    sizes = np.concatenate([index["image_size"] for index in indices])
    return SetReport(
        images=manifest.num_samples,
        classes=len(manifest.classes),
        shards=len(manifest.shards),
        bytes=sum(shard.bytes + shard.index.bytes for shard in manifest.shards),
        resolution=manifest.resolution,
        image_format=manifest.image_format,
        quality=manifest.quality,
        samples_per_class=Spread.of(record.samples for record in manifest.classes),
        bytes_per_image=Spread.of(sizes),
        source_short_side=Spread.of(sides.min(axis=1)),
        source_long_side=Spread.of(sides.max(axis=1)),
        source_formats=_sorted(formats),
        source_modes=_sorted(modes),
        **{trait: traits[trait] for trait in TRAITS},
        ignored=len(plan.ignored),
        passed_over=_passed_over(plan),
        rejected=list(manifest.skipped),
        duplicates=_duplicates(plan, indices, [h for mark in done for h in mark.hashes]),
        counts=_counts(manifest),
    )


def _counts(manifest: Manifest) -> dict[str, int]:
    """Count samples by class name; a class is its number, so twins are named with theirs."""
    names = Counter(record.name for record in manifest.classes)
    counts: dict[str, int] = {}
    for label, record in enumerate(manifest.classes):
        key = record.name
        while names[record.name] > 1 and key in names:
            key += f" ({label})"
        counts[key] = record.samples
    return counts


def _passed_over(plan: ShardPlan) -> list[PassedOver]:
    """Count passed-over files by extension, most files first; of the names, pictures' first."""
    pictures = set(plan.unread)
    kinds: dict[str, list[str]] = {}
    for name in plan.ignored:
        kinds.setdefault(os.path.splitext(name)[1].lower(), []).append(name)
    return [
        PassedOver(
            extension=extension,
            files=len(names),
            pictures=sum(name in pictures for name in names),
            first=sorted(names, key=lambda name: name not in pictures)[:_SHOWN],
        )
        for extension, names in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def report_bytes(report: SetReport) -> bytes:
    return (json.dumps(report.model_dump(), indent=1) + "\n").encode()


def read_report(folder: Path) -> SetReport:
    """The report inside a set. Raises DataError when it is missing or not one."""
    try:
        return SetReport.model_validate(read_json(folder / REPORT))
    except ValidationError:
        raise DataError(f"{folder / REPORT}: not the report of a preparation") from None


def print_report(
    report: SetReport, console: Console, path: Path, images: int, seconds: float
) -> None:
    """Tables for people. `images` were made by this command in `seconds`."""
    table = Table(title=str(path), title_justify="left", show_header=False)
    form = report.image_format + (f", quality {report.quality}" if report.quality else "")
    rows: dict[str, str | int] = {
        "holds": f"{counted(report.images, 'image')} of {counted(report.classes, 'class')}"
        f" in {counted(report.shards, 'shard')}",
        "stored": f"{report.bytes / 1e6:,.1f} MB, {report.resolution} px, {form}",
        "images per class": _spread(report.samples_per_class),
        "bytes per image": _spread(report.bytes_per_image),
        "sources: short side": _spread(report.source_short_side, " px"),
        "sources: long side": _spread(report.source_long_side, " px"),
        "sources: formats": _counted(report.source_formats),
        "sources: pixels": _counted(report.source_modes),
        "stored as they were": report.original,
        "enlarged": report.enlarged,
        "several frames, first taken": report.animated,
        "wrong extension": report.misnamed,
        "of 16 bits, but below 16384": report.dim
        and f"{report.dim:,}; perhaps of 10 to 14 bits, and stored as dark as they are",
        "ignored by their names": report.ignored,
        "rejected": len(report.rejected),
        "duplicates": sum(len(group.sources) - 1 for group in report.duplicates),
    }
    if images:
        rows["speed"] = f"{images / max(seconds, 1e-3):,.0f} images/s ({seconds:,.1f} s)"
    for name, value in rows.items():
        if value:  # what is not there says nothing
            table.add_row(name, f"{value:,}" if isinstance(value, int) else value)
    print_table(console, table)
    _print_passed_over(report.passed_over, console)
    _print_rejected(report.rejected, console)
    _print_duplicates(report.duplicates, console)
    if report.classes == 1:
        (name,) = report.counts
        console.print(
            f"all images are of one class, {name}; folders of their own make several",
            soft_wrap=True,
        )
    console.print("next:")
    for command in (
        f"fastrepa data show {typed(path)}",
        f"fastrepa train RECIPE.yaml run=runs/NAME {quoted(f'data.path={path}')} "
        f"model.num_classes={report.classes}",
    ):
        console.print(f"  {command}", soft_wrap=True)


def _print_passed_over(passed_over: Sequence[PassedOver], console: Console) -> None:
    if not passed_over:
        return
    table = Table(
        "extension", Column("files", justify="right"), Column("pictures", justify="right"),
        "such as", title="passed over: no images by their names, or in no class folder",
        title_justify="left",
    )  # fmt: skip
    for kind in passed_over:
        pictures = f"{kind.pictures:,}" if kind.pictures else ""
        name = kind.extension or "without extension"
        table.add_row(name, f"{kind.files:,}", pictures, _lines(kind.first))
    print_table(console, table)


def _print_rejected(rejected: Sequence[SkippedRecord], console: Console) -> None:
    if not rejected:
        return
    images = Column("images", justify="right")
    table = Table("reason", images, "such as", title="rejected", title_justify="left")
    by_reason: dict[str, list[str]] = {}
    for record in rejected:
        by_reason.setdefault(record.reason, []).append(record.source)
    for reason, sources in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        table.add_row(reason, f"{len(sources):,}", _lines(sources[:_SHOWN]))
    print_table(console, table)


def _print_duplicates(duplicates: Sequence[Duplicates], console: Console) -> None:
    if not duplicates:
        return
    differing = [group for group in duplicates if group.labels_differ]
    table = Table(
        Column("groups", justify="right"), "labels", "such as",
        title="duplicates (the same stored bytes)", title_justify="left",
    )  # fmt: skip
    same = [group for group in duplicates if not group.labels_differ]
    for groups, labels in ((same, "the same"), (differing, "differ")):
        if groups:
            examples = ["  =  ".join(group.sources[:3]) for group in groups[:_SHOWN]]
            table.add_row(f"{len(groups):,}", labels, _lines(examples))
    print_table(console, table)


def _lines(names: Sequence[str]) -> Text:
    return Text("\n".join(map(printable, names)))


def _duplicates(
    plan: ShardPlan, indices: Sequence[np.ndarray], hashes: Sequence[str]
) -> list[Duplicates]:
    # 16 bytes as two numbers: numpy sorts millions of these in a second.
    raw = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=">u8").reshape(-1, 2)
    keys = np.concatenate([index["key"] for index in indices]).astype(np.int64)
    labels = np.concatenate([index["label"] for index in indices])
    order = np.lexsort((keys, raw[:, 1], raw[:, 0]))
    ordered = raw[order]
    starts = np.flatnonzero(np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)])
    groups = [group for group in np.split(order, starts[1:]) if len(group) > 1]
    groups.sort(key=lambda group: keys[group[0]])
    return [
        Duplicates(
            sources=[printable(plan.names(range(keys[i], keys[i] + 1))[0]) for i in group],
            labels_differ=len(set(labels[group].tolist())) > 1,
        )
        for group in groups
    ]


def _sorted(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _spread(spread: Spread, unit: str = "") -> str:
    if spread.min == spread.max:
        return f"{spread.min:,}{unit}"
    return f"{spread.min:,} to {spread.max:,}{unit}, median {spread.median:,}"
