"""Labelled images, whatever holds them -> verified, shuffled shards (shards.py has the format).

The source is listed, the list is shuffled once with the seed, and each run of `shard_size` images
becomes one shard, made start to finish by one process. So the bytes depend on the images, the
settings and the version of Pillow, never on how many processes or ranks there are or how often they
were killed: finished shards are marked in `.OUT.partial`, and the same command goes on after them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fastrepa.commands.prepare.plan import (
    Settings,
    ShardPlan,
    check_settings,
    open_plan,
    read_settings,
    write_plan,
)
from fastrepa.commands.prepare.pool import write_shards
from fastrepa.commands.prepare.report import SetReport, make_report, read_report, report_bytes
from fastrepa.commands.prepare.writer import ShardDone, read_done
from fastrepa.data.classes import written_form
from fastrepa.data.format.index import KEY_DIGITS
from fastrepa.data.format.partial import (
    PLAN,
    REPORT,
    SPOOL,
    join_writers,
    owned,
    partial_folder,
    release,
)
from fastrepa.data.format.shards import (
    MANIFEST,
    SOURCES,
    ClassRecord,
    FileRecord,
    ImageFormat,
    Manifest,
    ShardSet,
    SkippedRecord,
    load_manifest,
)
from fastrepa.data.format.writing import write_manifest
from fastrepa.data.sources.entries import Listing
from fastrepa.data.sources.listing import list_source
from fastrepa.errors import DataError, nearest, printable, shown, worded
from fastrepa.runtime.files import aside, fsync, fsync_folder, write_whole
from fastrepa.runtime.hardware import usable_cores
from fastrepa.runtime.ownership import owned_by_rank_0
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import World, launched_world, of_rank_0, patient_world

Encode = Callable[[Path, World], None]
_BLOCK = 100_000  # names read at once


@dataclass(frozen=True)
class PrepareReport:
    """A preparation's outcome."""

    path: Path
    report: SetReport  # what `report.json` says
    num_bytes: int  # of the whole folder
    ignored: Sequence[str] = ()  # files in the source that are no images by their names
    images: int = 0  # made by this call, on all ranks; the others were there
    seconds: float = 0.0  # from the first of these to the last
    is_rank_0: bool = True  # rank 0
    was_there: bool = False  # the whole set, before this call


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    resolution: int,
    shard_size: int = 1000,
    image_format: ImageFormat = "png",
    quality: int = 95,
    seed: int = 0,
    workers: int | None = None,
    skip_bad: bool = False,
    progress: bool = True,
    inside: str | None = None,
    class_names: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    encode: Encode | None = None,
) -> PrepareReport:
    """Make the data set `out` from the images of `source` (collective over torchrun's ranks).

    Interrupted or failed, it keeps what is done in `.OUT.partial`, and the same call goes on there.

    Args:
        source: class folders, archives, WebDataset tars, parquet tables, ...: see `list_source`,
            which `inside`, `class_names`, `image_column` and `label_column` are for.
        out: folder to make; it must not exist yet, or be empty, or be a set of the same settings,
            which gets the columns that it lacks. It appears when complete. Several ranks must share
            it, and the source.
        resolution: side of every image in pixels.
        shard_size: images per shard.
        image_format: "png" (lossless), "jpeg" (4:4:4; sources that fit as they are stay as they
            are) or "webp".
        quality: 1..100 for jpeg and webp; webp at 100 is lossless.
        seed: of the shuffle.
        workers: processes of this rank; None: its share of the available cores; 0 or 1: this one.
        skip_bad: leave unusable images out, and name them in the report and the manifest,
            instead of stopping at the first.
        progress: show a progress bar.
        encode: called on every rank with the complete set of images (in the partial folder) before
            it gets its name, to add columns. After an interruption it is called again.

    Raises DataError, in one line, for whatever is wrong with source or out.
    """
    source = Path(source)
    settings = _checked_settings(resolution, shard_size, image_format, quality, seed)
    out = _place(source, Path(out))
    folder = partial_folder(out)
    with patient_world() as world, _failures(out, world), ExitStack() as stack:
        if of_rank_0(world, lambda: _is_finished(out, settings)):
            if encode is not None:
                with owned_by_rank_0(out, "fastrepa prepare", world, DataError):
                    encode(out, world)
            return _report(out, is_rank_0=world.is_rank_0, was_there=True)
        if world.is_rank_0:
            stack.enter_context(owned(out))
            if not (folder / MANIFEST).exists():
                listing = list_source(
                    source,
                    inside=inside,
                    class_names=Path(class_names) if class_names else None,
                    image_column=image_column,
                    label_column=label_column,
                    spool=folder / SPOOL,
                    progress=progress,
                )
                _check_listing(listing, skip_bad)
                write_plan(folder, listing, settings)
            elif (before := read_settings(folder)) is not None:
                check_settings(folder, before, settings)
        # Told by rank 0, not looked up: a network file system may remember for a minute that a file
        # was not there.
        complete = of_rank_0(world, (folder / MANIFEST).exists)
        if not world.is_rank_0:
            join_writers(folder)
        world.wait()
        images, seconds, ignored = 0, 0.0, []
        if not complete:
            plan = open_plan(folder)
            ignored = plan.ignored
            workers = _own_cores() if workers is None else workers
            images, seconds = _make_images(plan, folder, workers, skip_bad, world, progress)
        if encode is not None:
            encode(folder, world)
            world.wait()
        done = of_rank_0(world, lambda: _publish(folder, out, images, seconds, ignored))
        return replace(done, is_rank_0=world.is_rank_0)


def _publish(
    folder: Path, out: Path, images: int, seconds: float, ignored: list[str]
) -> PrepareReport:
    """Give the complete set its name."""
    release(folder)
    fsync_folder(folder)
    os.rename(folder, out)
    fsync_folder(out.parent)
    return _report(out, images=images, seconds=seconds, ignored=ignored)


def _report(out: Path, **of_this_call: Any) -> PrepareReport:
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    return PrepareReport(path=out, report=read_report(out), num_bytes=num_bytes, **of_this_call)


def _make_images(
    plan: ShardPlan, folder: Path, workers: int, skip_bad: bool, world: World, progress: bool
) -> tuple[int, float]:
    """Everything up to the manifest; returns how many images were made, and in what time."""
    finished = of_rank_0(world, lambda: _finished(plan, folder, skip_bad))
    started = time.monotonic()
    write_shards(
        plan, folder, finished, workers=workers, skip_bad=skip_bad, world=world, progress=progress
    )
    seconds = time.monotonic() - started
    if world.is_rank_0:
        _finish(plan, folder)
    world.wait()
    return plan.samples - sum(len(plan.keys(shard)) for shard in finished), seconds


def _finished(plan: ShardPlan, folder: Path, skip_bad: bool) -> set[int]:
    """The shards that earlier runs have finished."""
    marked = (int(name[6:-10]) for name in os.listdir(folder) if name.endswith(".done.json"))
    marks = {shard: read_done(folder, shard) for shard in sorted(marked)}
    if not skip_bad:
        # An earlier run may have left images out.
        for mark in marks.values():
            for record in mark.skipped.values() if mark else ():
                raise DataError(_unusable(plan.root, record.source, record.reason))
    return {shard for shard, mark in marks.items() if mark is not None}


def _finish(plan: ShardPlan, folder: Path) -> None:
    """Write what describes the finished shards; the manifest last."""
    done: list[ShardDone] = []
    for shard in range(plan.num_shards):
        mark = read_done(folder, shard)
        if mark is None:
            raise DataError(
                f"{folder}: shard {shard} has vanished; the same command makes it again"
            )
        done.append(mark)
    counts: Counter[int] = Counter()
    skipped: dict[int, SkippedRecord] = {}
    for mark in done:
        counts.update(mark.counts)
        skipped.update(mark.skipped)
    # Numbered labels may leave some out; a class of the source that is lost would be missed.
    for label in np.unique(plan.entries["label"]).tolist():
        if not counts[label]:
            name = plan.classes[label]
            raise DataError(printable(f"{plan.root / name}: class without a readable image"))
    _write_sources(plan, folder / SOURCES, skipped.keys())
    rejected = [SkippedRecord(source=name, reason=reason) for name, reason in plan.rejected]
    manifest = Manifest(
        resolution=plan.settings.resolution,
        image_format=plan.settings.image_format,
        quality=plan.settings.quality,
        seed=plan.settings.seed,
        num_samples=counts.total(),
        classes=tuple(
            ClassRecord(name=written_form(name), samples=counts[label])
            for label, name in enumerate(plan.classes)
        ),
        shards=tuple(mark.record for mark in done if mark.record),
        sources=FileRecord.of(folder / SOURCES),
        skipped=(*rejected, *(skipped[key] for key in sorted(skipped))),
    )
    write_whole(folder / REPORT, report_bytes(make_report(folder, plan, manifest, done)))
    fsync_folder(folder)
    write_manifest(folder, manifest)


def _write_sources(plan: ShardPlan, path: Path, skipped: Container[int]) -> None:
    with aside(path) as partial, partial.open("w", encoding="utf-8") as file:
        for first in range(0, plan.samples, _BLOCK):
            keys = range(first, min(first + _BLOCK, plan.samples))
            for key, name in zip(keys, plan.names(keys), strict=True):
                # json: one line whatever the name holds, bytes that are no UTF-8 included.
                file.write(json.dumps(None if key in skipped else name) + "\n")
        fsync(file)


@contextmanager
def _failures(out: Path, world: World) -> Iterator[None]:
    """Whatever ends the work becomes one line that says what is kept."""
    folder = partial_folder(out)
    try:
        yield
    except MemoryError:
        raise DataError(f"{out}: not enough memory; use fewer workers{_kept(folder)}") from None
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({worded(error)}){_kept(folder)}") from None
    except DataError as error:
        raise DataError(f"{error}{_kept(folder, str(error))}") from None
    except KeyboardInterrupt:
        if world.is_rank_0 and (kept := _kept(folder)):
            say(f"fastrepa prepare{kept}", file=sys.stderr)
        raise


def _kept(folder: Path, said: str = "") -> str:
    started = any(os.path.exists(folder / name) for name in (PLAN, MANIFEST))
    if not started or str(folder) in said:
        return ""
    return f"; what is done is kept in {folder}, and the same command goes on there"


def _own_cores() -> int:
    return max(1, usable_cores() // launched_world().local_size)


def _unusable(root: Path, name: str, reason: str) -> str:
    return printable(f"{root / name}: unreadable image ({reason}); --skip-bad leaves such out")


def _check_listing(listing: Listing, skip_bad: bool) -> None:
    if len(listing.entries) >= 10**KEY_DIGITS:
        raise DataError(
            f"{listing.root}: more images than the {10**KEY_DIGITS - 1} that a set can hold"
        )
    if listing.rejected and not skip_bad:
        first, more = listing.rejected[0], len(listing.rejected) - 1
        others = f" (and {more} more)" if more else ""
        raise DataError(
            printable(
                f"{listing.root / first.name}: unusable ({first.reason}){others}; --skip-bad "
                "leaves such out"
            )
        )
    if not len(listing.entries):
        raise DataError(f"{listing.root}: holds no usable image")


def _checked_settings(
    resolution: int, shard_size: int, image_format: ImageFormat, quality: int, seed: int
) -> Settings:
    formats = get_args(ImageFormat)
    if image_format not in formats:
        raise DataError(
            f"image format {image_format!r} is not one of {', '.join(formats)}"
            + nearest(image_format, formats)
        )
    limits = {
        "resolution": (resolution, 1, 8192),
        "shard size": (shard_size, 1, 10**6),
        "quality": (quality, 1, 100),
        "seed": (seed, 0, 2**64 - 1),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise DataError(f"{name} {value} is outside {low}..{high}")
    return Settings(
        resolution=resolution,
        shard_size=shard_size,
        image_format=image_format,
        quality=None if image_format == "png" else quality,
        seed=seed,
    )


def _place(source: Path, out: Path) -> Path:
    """Return the folder that `out` means, links followed, if a set can be put there; else DataError
    with what is in the way. It gets its name by renaming, at the very end.
    """
    try:
        place = out.resolve()
        if place.is_relative_to(source.resolve()):
            raise DataError(f"{out}: lies inside the source {source}; choose a place outside it")
        if place.exists() and not place.is_dir():
            raise DataError(f"{out}: exists and is no folder")
        if (place / MANIFEST).is_file():
            return place
        partial_folder(place).exists()  # its name is the longer one
        if not place.exists():
            return place
        if any(place.iterdir()):
            raise DataError(f"{out}: exists and is not empty; nothing was changed")
        if place.is_mount() or place == Path.cwd():
            what = "a mount point" if place.is_mount() else "the folder that you are in"
            raise DataError(f"{out}: is {what}, which cannot be replaced; name a folder inside it")
    except (OSError, RuntimeError) as error:  # a loop of links is the latter
        raise DataError(f"{shown(str(out))}: cannot be a folder ({worded(error)})") from None
    return place


def _is_finished(out: Path, settings: Settings) -> bool:
    """Tell whether there is a set already; DataError where it is one of other settings,
    or its images are not all there.
    """
    if not os.path.isfile(out / MANIFEST):
        return False
    there = load_manifest(out)
    most = max(shard.samples for shard in there.shards)
    fits = most == settings.shard_size or len(there.shards) == 1 or bool(there.skipped)
    wanted = settings.model_dump(exclude={"pillow", "shard_size"})
    differing = [
        f"{name.replace('_', ' ')} {getattr(there, name)}, not {value}"
        for name, value in wanted.items()
        if getattr(there, name) != value
    ]
    if most > settings.shard_size or not fits:
        differing.append(f"{most} images in a shard, not {settings.shard_size}")
    if differing:
        raise DataError(
            f"{out}: is a finished set of other settings ({'; '.join(differing)}); nothing was "
            "changed, name another folder"
        )
    ShardSet.open(out, verify="sizes", columns=False)  # what has lost images is not finished
    return True
