"""Images by number: image i of a seed is the same one in any batch, on any process, in any run.

What an image starts from, and the noise that the sde adds on its way, are keyed by (seed, image
number): equal to the bit everywhere (fastrepa.randomness). What the network makes of them depends
on rounding, and a matrix product may round differently in another shape. So every forward has the
same shape, the last one filled up, and processes take whole batches (`rank_batches`):

    same batch size    the same pixels, bit for bit, for any number of images and processes on one
                       kind of device with deterministic kernels
    other batch size   the same images to the rounding of the forward: a few pixels, one level off

Shapes: N images, C channels, h and w latent side, H and W image side.
"""

from __future__ import annotations

import json
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from numpy.lib import format as npy
from torch import Tensor, nn

from fastrepa.checkpoint import averages
from fastrepa.checkpoint import format as checkpoint
from fastrepa.checkpoint.identity import classes_beside, trained_classes
from fastrepa.config import Config, SampleConfig, TrainingConfig, config_from_dict
from fastrepa.data.classes import choose_classes, named
from fastrepa.errors import ConfigError, DataError, FastrepaError, decoration, writing
from fastrepa.generation.pictures import save_grid, to_image
from fastrepa.generation.sampler import Velocity, model_evaluations, sample
from fastrepa.model.compilation import check_compile, compile_generator
from fastrepa.randomness import KeyedRandom, Stream
from fastrepa.reading.text import parse_json
from fastrepa.runtime.files import aside
from fastrepa.runtime.progress import Bar
from fastrepa.runtime.world import destroy_world, init_or_alone, of_rank_0
from fastrepa.vision.codec import Codec, build_codec

Generator = TypeVar("Generator", bound=nn.Module)

BATCH_SIZE = 32
GRID_IMAGES = 64
SAMPLE_BATCH = 16  # images per forward of a run's grids, the same for any number of ranks
RECORD = "sampling.json"
PNG_NAME = re.compile(r"\d{6,}\.png")
_OURS = re.compile(
    PNG_NAME.pattern
    + r"(\.partial)?|grid\.png|samples_\d+x\d+x\d+x3\.(npz|partial)|"
    + re.escape(RECORD)
)


def _nobody(text: str) -> None:
    pass


def default_labels(num: int, num_classes: int, classes: Sequence[int] | None = None) -> Tensor:
    """Labels [num] int64: the classes (all of them by default) in turn, by image number."""
    chosen = torch.tensor(list(classes) if classes else range(num_classes), dtype=torch.int64)
    return chosen[torch.arange(num) % len(chosen)]


def rank_batches(num: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """The image numbers [n] int64 of each batch of a rank: batches of 0 .. num - 1, dealt in turn.

    Which images share a batch, and where in it they stand, is the same for every world_size.
    """
    return list(torch.arange(num).split(batch_size))[rank::world_size]


def generate(
    model: Velocity | nn.Module,
    codec: Codec,
    labels: Tensor,
    *,
    seed: int,
    sample_ids: Tensor,
    batch_size: int,
    sample_config: SampleConfig,
    path: str,
    input_shape: tuple[int, int, int] | None = None,
    null_label: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Draw uint8 images [N,3,H,W] on the host, for labels [N] int64 and sample_ids [N] int64.

    `model` maps (x [B,C,h,w] float32, t [B], labels [B]) to a velocity; a module is put in eval
    mode meanwhile. It runs on batches of exactly `batch_size`: a last, shorter one is filled up
    with its last image. `input_shape` (C, h, w) defaults to the codec's and `null_label` to the
    model's number of classes. `progress` is told the images made since its last call, in
    fractions of an image as the sampler goes. `sample_config.num` is not used, and of its precision
    only whether it is tf32: `ready_to_sample` is for the rest.

    Raises ValueError where labels and sample_ids differ in length.
    """
    if labels.shape != sample_ids.shape or labels.dim() != 1:
        raise ValueError(f"labels {list(labels.shape)} and sample_ids {list(sample_ids.shape)}")
    device = next(model.parameters()).device if isinstance(model, nn.Module) else labels.device
    shape = input_shape or (codec.channels, codec.side, codec.side)
    if null_label is None:
        null_label = int(cast(Any, model).y_embedder.num_classes)
    if len(labels) == 0:
        with torch.no_grad():  # no image, but an image's shape
            return codec.decode(torch.zeros(1, *shape, device=device))[:0].cpu()
    random = KeyedRandom(seed)
    images: list[Tensor] = []
    with _evaluating(model), _products(sample_config.precision), torch.no_grad():
        for ids, wanted in zip(sample_ids.split(batch_size), labels.split(batch_size), strict=True):
            count = len(ids)
            ids = _fill(ids, batch_size).to(device, torch.int64)
            wanted = _fill(wanted, batch_size).to(device)

            def step_noise(step: int, ids: Tensor = ids) -> Tensor:
                return random.normal(Stream.SAMPLE_STEP, step, ids, shape, dtype=torch.float64)

            def advance(_: int, count: int = count) -> None:
                if progress is not None:
                    progress(count / sample_config.steps)

            latents = sample(
                model,
                random.normal(Stream.SAMPLE_NOISE, 0, ids, shape),
                wanted,
                sampler=sample_config.sampler,
                steps=sample_config.steps,
                cfg=sample_config.cfg,
                guidance_low=sample_config.guidance_low,
                guidance_high=sample_config.guidance_high,
                path=path,
                null_label=null_label,
                step_noise=step_noise,
                progress=advance,
            )
            images.append(codec.decode(latents)[:count].cpu())
    return torch.cat(images)


def ready_to_sample(
    model: Generator, sample_config: SampleConfig, training: TrainingConfig, device: torch.device
) -> Generator:
    """The generator in the precision that `sample.precision` names, compiled as `sample.compile`
    says; in place.

    Raises ConfigError where `device` cannot do that.
    """
    check_compile("sample.compile", sample_config.compile, device)
    precision = training.precision if sample_config.precision == "run" else sample_config.precision
    model = model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    compile_generator(model, sample_config.compile, device)
    return model


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Take float32 products in TF32 where `precision` is that, and as they were afterwards."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _fill(values: Tensor, length: int) -> Tensor:
    """Lengthen values [n] to [length] by repeating the last."""
    return torch.cat((values, values[-1:].expand(length - len(values))))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A module in eval mode (no label dropout), and as it was afterwards."""
    if not (isinstance(model, nn.Module) and model.training):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


# The command -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleFolder:
    """The images that `sample_run` left, and where."""

    folder: Path
    num: int
    there: int
    """Images that were there before."""
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
    ema: str | None = None,
    device: torch.device | None = None,
    say: Callable[[str], None] = _nobody,
    **settings: Any,
) -> SampleFolder:
    """Draw images from the averaged weights of a run's newest checkpoint into a folder.

    `ema` names another average than the run's first: 0.999, or sigma_rel=0.05.
    `settings` are keys of SampleConfig (num, sampler, steps, cfg, guidance_low, guidance_high,
    precision, compile); those that are None or missing come from the run's configuration. Image i
    gets class i of `classes` in turn: names or numbers (`choose_classes`), by default all that were
    trained. `say` is told, on the first rank, how they were understood. Writes `000000.png`, ...,
    `grid.png` (the first 64), with `npz` the ADM evaluation suite's `samples_NxHxWx3.npz`, and
    `sampling.json`, which says how they were made.
    `out` defaults to RUN/generated. Under torchrun every process calls this and does a share; the
    folder must be one that all of them see. Called again with the same settings (`num` may differ),
    it goes on where it was stopped; with others it starts anew.

    Raises FastrepaError for a folder that holds anything else or cannot be written, ConfigError
    for a setting or class that is not allowed, CheckpointError for a run that cannot be loaded.
    """
    started = time.perf_counter()
    run = Path(run)
    folder = run / "generated" if out is None else Path(out)
    if batch_size < 1:
        raise ConfigError(f"--batch-size: {batch_size} is less than 1")
    KeyedRandom(seed)  # an impossible seed is an error before anything is loaded
    world = init_or_alone(device)
    device = device or world.device
    model, config, info = checkpoint.load_ema_model(run, device, ema)
    config = with_settings(config, settings)
    model = ready_to_sample(model, config.sample, config.training, device)
    num = config.sample.num
    batch_size = min(batch_size, num)
    chosen = _chosen_classes(classes, info, config, say if world.is_rank_0 else _nobody)
    record = {
        "run": str(run), "checkpoint_step": info.step,
        "checkpoint": checkpoint.fingerprint(run, info.step),
        "ema": ema or str(averages.stored_emas(info.emas, config.training.ema[0])["ema"]),
        "seed": seed, "batch_size": batch_size, **config.sample.model_dump(),
        **_recorded_classes(chosen, info.classes, not classes, config.model.num_classes),
        "model_evaluations": model_evaluations(config.sample.sampler, config.sample.steps),
    }  # fmt: skip
    there = of_rank_0(world, lambda: claim_folder(folder, record))
    codec = build_codec(config.data.codec, resolution=config.data.resolution, device=device)
    labels = default_labels(num, config.model.num_classes, chosen)
    mine = rank_batches(num, batch_size, world.rank, world.size)
    missing = [ids for ids in mine if not all(image_path(folder, int(i)).is_file() for i in ids)]
    shown = world.is_rank_0 and sys.stderr.isatty()
    # The images of all processes, which are as far as this one.
    with Bar("sampling", num, "images", done=there, rate=True, stays=True, shown=shown) as bar:
        draw = partial(
            generate, model, codec, seed=seed, batch_size=batch_size, sample_config=config.sample,
            path=config.objective.path, input_shape=(info.channels, info.side, info.side),
            null_label=config.model.num_classes,
            progress=lambda made: bar.move(min(num, bar.done + made * world.size)),
        )  # fmt: skip
        _write_images(draw, labels, missing, folder)
    world.wait()  # every rank has written its images
    grid, packed = of_rank_0(world, lambda: _gather(folder, num, len(chosen), npz))
    seconds = time.perf_counter() - started
    if world.size > 1:
        destroy_world()
    npz_path = packed if world.is_rank_0 else None
    return SampleFolder(folder, num, there, grid, npz_path, seconds, world.is_rank_0)


def _chosen_classes(
    requested: Sequence[str | int] | None,
    info: checkpoint.RunState,
    config: Config,
    say: Callable[[str], None],
) -> list[int]:
    """Numbers of the classes to draw, all of them trained; ConfigError for one that was not."""
    count = config.model.num_classes
    trained = trained_classes(info, count)
    if changed := classes_beside(info, Path(config.data.path)):
        say(f"{config.data.path}: {changed}; the run's names are those of its checkpoint")
    if not requested:
        if untrained := count - len(trained):
            say(f"{untrained} of the model's {count} classes had no images in training: not drawn")
        return trained
    chosen = choose_classes(requested, info.classes, count, say=say)
    for number in chosen:
        if number not in trained:
            known = ", ".join(named(info.classes, c) for c in trained[:20])
            raise ConfigError(
                f"--classes: class number {number} was never trained, as it had no images; "
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


def _gather(folder: Path, num: int, classes: int, npz: bool) -> tuple[Path | None, Path | None]:
    """Draw the grid of a complete folder; with `npz` pack its images. Returns where both are."""
    _check_complete(folder, num)
    grid, packed = None, None
    with decoration(folder / "grid.png"):
        shown = [read_png(image_path(folder, i)) for i in range(min(num, GRID_IMAGES))]
        columns = classes if 1 < classes <= 16 and num >= 2 * classes else None
        save_grid(torch.stack(shown), folder / "grid.png", columns)
        grid = folder / "grid.png"
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
                raise FastrepaError(f"{folder}: cannot be written ({e})") from None


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The run's configuration with its `sample` section overridden, validated as a whole."""
    given = {k: v for k, v in settings.items() if v is not None}
    tree = config.model_dump(mode="json")
    return config_from_dict({**tree, "sample": {**tree["sample"], **given}}, source="sample")


# Files -----------------------------------------------------------------------------------------


def claim_folder(folder: Path, record: dict[str, Any]) -> int:
    """Make `folder` ready for images and leave `record` in it as sampling.json; returns how many
    of them it has.

    Images of a call with the same record stay, up to its `num`; those of another are removed. A
    folder that holds files but no sampling.json is somebody else's. Raises FastrepaError for that,
    for a file in the way, and where it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise FastrepaError(f"{folder}: is a file; --out wants a folder")
    written = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    with writing(folder, FastrepaError):
        folder.mkdir(parents=True, exist_ok=True)
        entries = list(folder.iterdir())
        if entries and not (folder / RECORD).is_file():
            raise FastrepaError(
                f"{folder}: holds files that `fastrepa sample` did not write"
                f" ({min(entries).name}, ...); nothing is overwritten, choose another --out"
            )
        before = (folder / RECORD).read_bytes() if entries else b""
        kept, same = 0, _but_num(before) == _but_num(written)
        for entry in entries:
            name = entry.name
            stays = same and PNG_NAME.fullmatch(name) and int(entry.stem) < record["num"]
            kept += bool(stays)
            if _OURS.fullmatch(name) and name != RECORD and not stays and not entry.is_dir():
                entry.unlink()
        (folder / RECORD).write_text(written)
        return kept


def _but_num(record: str | bytes) -> dict[str, Any] | None:
    """Return what decides an image; None for no record."""
    try:
        return {k: v for k, v in parse_json(record, RECORD).items() if k != "num"}
    except (DataError, AttributeError):
        return None


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


def _check_complete(folder: Path, num: int) -> None:
    if missing := [i for i in range(num) if not image_path(folder, i).is_file()]:
        raise FastrepaError(
            f"{image_path(folder, missing[0])}: missing ({len(missing)} of {num}); all processes"
            " must see one and the same output folder"
        )


def write_adm_npz(folder: Path, num: int) -> Path:
    """Pack the images 0 .. num - 1 of `folder` for the ADM evaluation suite.

    Key `arr_0`, uint8 [N,H,W,3], in `samples_NxHxWx3.npz` (Dhariwal and Nichol 2021). It is
    written image by image: 50,000 images of 256 px are 9.8 GB that never stand in memory. The
    file appears under its name when it is whole. Raises FastrepaError for a missing image.
    """
    _check_complete(folder, num)
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
            member.write(read_png(image_path(folder, i)).permute(1, 2, 0).numpy().tobytes())
    return target
