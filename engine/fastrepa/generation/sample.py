"""`fastrepa sample`: a run's images as files, by one process or by all of torchrun's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrepa.checkpoint.choice import NEWEST, Wanted, is_export
from fastrepa.checkpoint.format import RunState
from fastrepa.checkpoint.identity import classes_beside, trained_classes
from fastrepa.config import Config, run_folder
from fastrepa.data.classes import choose_classes, named
from fastrepa.errors import ConfigError, FastrepaError, decoration, print_warning, worded, writing
from fastrepa.generation.folder import (
    GRID,
    Claim,
    check_complete,
    check_whose,
    claim_folder,
    image_path,
    read_png,
    torn_images,
    write_adm_npz,
    write_png,
)
from fastrepa.generation.generate import (
    BATCH_SIZE,
    default_labels,
    generate,
    rank_batches,
)
from fastrepa.generation.loading import (
    draw_options,
    load_generator,
    ready_to_sample,
    with_settings,
)
from fastrepa.generation.pictures import save_grid
from fastrepa.generation.sampler import model_evaluations
from fastrepa.randomness import KeyedRandom
from fastrepa.runtime.ownership import owned
from fastrepa.runtime.progress import Bar
from fastrepa.runtime.world import World, destroy_world, init_or_alone, of_rank_0
from fastrepa.vision.codec import build_codec

GRID_IMAGES = 64


def _nobody(text: str) -> None:
    pass


@dataclass(frozen=True)
class SampleFolder:
    """The images that `sample_run` left, and where."""

    folder: Path
    num: int
    there: int
    """Images that were there before."""
    more: int
    """Further images of the same settings, which stay."""
    removed: int
    """Files of other settings that are gone."""
    grid: Path | None
    """None: it could not be drawn."""
    npz: Path | None
    seconds: float
    is_rank_0: bool
    """Whether this process is the one that speaks."""


def sample_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    classes: Sequence[str | int] | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    npz: bool = False,
    wanted: Wanted = NEWEST,
    overwrite: bool = False,
    device: torch.device | None = None,
    say: Callable[[str], None] = _nobody,
    **settings: Any,
) -> SampleFolder:
    """Draw images from averaged weights into a folder.

    `run` is a run, a checkpoint folder of it or an export (checkpoint/choice.py), and `wanted` says
    which weights of it: by default the newest checkpoint's, of the run's first average.
    `settings` are keys of SampleConfig (num, sampler, steps, cfg, guidance_low, guidance_high,
    precision, compile); those that are None or missing come from the run's configuration. Image i
    gets class i of `classes` in turn: names or numbers (`choose_classes`), by default all that were
    trained. `say` is told, on the first rank, how they were understood. Writes `000000.png`, ...,
    `grid.png` (the first 64), with `npz` the ADM evaluation suite's `samples_NxHxWx3.npz`, and
    `sampling.json`, which says how they were made.
    `out` defaults to RUN/generated, of an export to NAME_generated beside it. Under torchrun every
    process calls this and does a share; the folder must be one that all of them see. Called again
    with the same settings (`num` may differ), it goes on where it was stopped, and removes nothing;
    images of others go with `overwrite`.

    Raises FastrepaError for a folder that holds anything else, is in use by another process or
    cannot be written, ConfigError for a setting or class that is not allowed, CheckpointError for a
    run that cannot be loaded.
    """
    started = time.perf_counter()
    run = Path(run)
    folder = _beside(run) if out is None else Path(out)
    if batch_size < 1:
        raise ConfigError(f"--batch-size: {batch_size} is less than 1")
    KeyedRandom(seed)  # an impossible seed is an error before anything is loaded
    world = init_or_alone(device)
    device = device or world.device
    loaded = load_generator(run, world, device, wanted)
    info, config = loaded.state, with_settings(loaded.config, settings)
    model = ready_to_sample(loaded.model, config.sample, config.training, device)
    chosen = chosen_classes(classes, info, config, say=say if world.is_rank_0 else _nobody)
    record = {
        "run": str(run), "checkpoint_step": info.step,
        "checkpoint": loaded.fingerprint, "ema": loaded.ema,
        "seed": seed, "batch_size": batch_size, **config.sample.model_dump(),
        **_recorded_classes(chosen, info.classes, not classes, config.model.num_classes),
        "model_evaluations": model_evaluations(config.sample.sampler, config.sample.steps),
    }  # fmt: skip
    with ExitStack() as held:
        claim = of_rank_0(world, lambda: _claimed(held, folder, record, overwrite))
        labels = default_labels(config.sample.num, config.model.num_classes, chosen)
        codec = build_codec(config.data.codec, resolution=config.data.resolution, device=device)
        draw = partial(
            generate, model, codec, seed=seed, batch_size=claim.batch_size,
            **draw_options(config, info),
        )  # fmt: skip
        there = _draw_missing(draw, labels, claim, folder, world)
        files = of_rank_0(world, lambda: _gather(folder, _names(labels, info.classes), npz))
    seconds = time.perf_counter() - started
    if world.size > 1:
        destroy_world()
    grid, packed = files if world.is_rank_0 else (files[0], None)
    return SampleFolder(
        folder, len(labels), there, claim.more, claim.removed, grid, packed, seconds,
        world.is_rank_0,
    )  # fmt: skip


def _beside(path: Path) -> Path:
    if is_export(path):
        return path.with_name(f"{path.stem}_generated")
    return run_folder(path) / "generated"


def _claimed(held: ExitStack, folder: Path, record: dict[str, Any], overwrite: bool) -> Claim:
    """Own the folder until `held` ends, and make it ready."""
    check_whose(folder)  # of somebody else's not even the lock is tried
    held.enter_context(owned(folder, "fastrepa sample"))
    return claim_folder(folder, record, overwrite=overwrite)


def _draw_missing(
    draw: Callable[..., Tensor], labels: Tensor, claim: Claim, folder: Path, world: World
) -> int:
    """Draw this rank's share of the images that are missing; returns how many were there, on all
    ranks alike (collective).
    """
    num = len(labels)

    def look() -> tuple[set[int], int]:
        there = sum(image_path(folder, i).is_file() for i in range(num))
        if not there:
            return set(), 0
        height, width = draw(labels[:0], sample_ids=torch.arange(0)).shape[2:]
        torn = torn_images(folder, num, height, width)
        if torn:
            print_warning(
                f"{image_path(folder, torn[0])}: not whole ({len(torn)} of {there} images); made "
                "again"
            )
        return set(torn), there - len(torn)

    torn, there = of_rank_0(world, look)
    missing = [
        ids
        for ids in rank_batches(num, claim.batch_size, world.rank, world.size)
        if not all(image_path(folder, i).is_file() and i not in torn for i in ids.tolist())
    ]
    shown = world.is_rank_0 and sys.stderr.isatty()
    # The images of all processes, which are as far as this one.
    with Bar("sampling", num, "images", done=there, rate=True, stays=True, shown=shown) as bar:
        advance = partial(
            draw, progress=lambda made: bar.move(min(num, bar.done + made * world.size))
        )
        _write_images(advance, labels, missing, folder)
    world.wait()  # every rank has written its images
    return there


def chosen_classes(
    requested: Sequence[str | int] | None,
    info: RunState,
    config: Config,
    *,
    option: str = "--classes",
    say: Callable[[str], None] = _nobody,
) -> list[int]:
    """Numbers of the classes to draw, all of them trained; ConfigError, naming `option`, for one
    that was not.
    """
    count = config.model.num_classes
    trained = trained_classes(info, count)
    if changed := classes_beside(info, Path(config.data.path)):
        say(f"{config.data.path}: {changed}; the run's names are those of its checkpoint")
    if not requested:
        if untrained := count - len(trained):
            say(f"{untrained} of the model's {count} classes had no images in training: not drawn")
        return trained
    chosen = choose_classes(requested, info.classes, count, option=option, say=say)
    for number in chosen:
        if number not in trained:
            known = ", ".join(named(info.classes, c) for c in trained[:20])
            raise ConfigError(
                f"{option}: class number {number} was never trained, as it had no images; "
                f"trained are {known}{', ...' * (len(trained) > 20)}"
            )
    return chosen


def _recorded_classes(
    chosen: Sequence[int], names: Sequence[str], by_default: bool, num_classes: int
) -> dict[str, Any]:
    """Return what sampling.json says of the classes, which images have in turn: all of the model's,
    or their names, or numbers where there are none; numbers too where two have the same name.
    """
    if by_default and len(chosen) == num_classes:
        return {"classes": "all"}
    drawn: list[Any] = [names[c] if c < len(names) else c for c in chosen]
    unclear = any(list(names).count(name) > 1 for name in drawn)
    return {"classes": drawn, **({"class_numbers": list(chosen)} if unclear else {})}


def _names(labels: Tensor, names: Sequence[str]) -> list[str]:
    """Name the class of each image; one without a name is a number."""
    return [names[c] if c < len(names) else str(c) for c in labels.tolist()]


def _gather(folder: Path, names: Sequence[str], npz: bool) -> tuple[Path | None, Path | None]:
    """Draw the grid of a complete folder; with `npz` pack its images. Returns where both are."""
    num = len(names)
    check_complete(folder, num)
    grid, packed = None, None
    with decoration(folder / GRID):
        shown = [read_png(image_path(folder, i)) for i in range(min(num, GRID_IMAGES))]
        save_grid(torch.stack(shown), folder / GRID, names=names[:GRID_IMAGES])
        grid = folder / GRID
    if npz:
        with writing(folder, FastrepaError):
            packed = write_adm_npz(folder, num)
    return grid, packed


def _write_images(
    draw: Callable[..., Tensor], labels: Tensor, batches: Sequence[Tensor], folder: Path
) -> None:
    """Draw the images of every batch of numbers and write them, a file each."""
    with ThreadPoolExecutor(4) as writers:
        for ids in batches:
            images = draw(labels[ids], sample_ids=ids)
            try:
                list(writers.map(write_png, images, [image_path(folder, int(i)) for i in ids]))
            except OSError as e:
                raise FastrepaError(f"{folder}: cannot be written ({worded(e)})") from None
