"""Lines that a run prints: its first, its warnings, its last."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrepa.checkpoint.format import RunState, checkpoint_path
from fastrepa.checkpoint.identity import other_samples
from fastrepa.config import Config, TrainingConfig, VisionConfig, load_config
from fastrepa.data.datasets import DataSet
from fastrepa.errors import ConfigError
from fastrepa.model.compilation import COMPILED
from fastrepa.runtime.terminal import say, typed
from fastrepa.runtime.world import World
from fastrepa.training.zero.settings import as_run
from fastrepa_kernels import launch

if TYPE_CHECKING:
    from fastrepa.training.trainer import Trainer

# What may change between a run and its continuation without changing what is learned.
FREE_KEYS = ("run", "training.steps", "training.log_every", "training.sample_every",
             "training.checkpoint_every", "training.keep", "training.tensorboard",
             "training.wandb", "training.micro_batch", "training.compile", "training.ema",
             "training.recompute", "training.memory_budget_gb", "vision.look_ahead",
             "vision.compile", "data.path", "data.decode", "data.readers", "data.read_ahead",
             "data.prefetch", "sample", "evaluation", "zero", "survival", "attention", "kernels",
             "deterministic")  # fmt: skip


def first_line(trainer: Trainer) -> str:
    """Say in one line what a run computes on and which paths are active."""
    c, w, codec = trainer.config, trainer.world, trainer.codec
    where = (
        torch.cuda.get_device_name(w.device)
        if w.device.type == "cuda"
        else f"cpu ({torch.get_num_threads()} threads)"
    )
    model = c.model.name or f"SiT {c.model.width} wide, {c.model.depth} deep, patch {c.model.patch}"
    parameters = sum(math.prod(_shape(p)) for p in trainer.engine.module.parameters())
    stage = as_run(c.zero, c.training, w.size).stage
    parts = {
        "device": f"{where} x {w.size}",
        "model": f"{model}, {parameters / 1e6:.1f} M parameters",
        "precision": c.training.precision,
        "ZeRO": str(c.zero.stage)
        + (f", as {stage}" if stage != c.zero.stage else "")
        + (f", states on {c.zero.offload}" if c.zero.offloads else ""),
        "recompute": str(c.training.recompute),
        "keep": c.training.keep if c.fused else "none",
        "attention": trainer.attention.backend,
        "kernels": c.kernels + COMPILED[c.training.compile],
        "encoder": trainer.targets.describe() + (", ahead" if trainer.look_ahead.active else ""),
        "codec": f"{codec.name} {codec.channels}x{codec.side}x{codec.side}"
        + (" (cached)" if trainer.cached_latents else ""),
        "batch": f"{c.training.global_batch} = {w.size} x {trainer.forwards} x {trainer.micro}",
    }
    if c.deterministic:
        parts["deterministic"] = "yes"
    return " · ".join(f"{k} {v}" for k, v in parts.items())


def slow_precision(training: TrainingConfig, world: World) -> str:
    """A warning where bf16 is slower than fp32, by a lot: a CPU without instructions for it."""
    fast = world.device.type != "cpu" or launch.cpu_multiplies(torch.bfloat16)
    if not training.bf16 or fast:
        return ""
    return (
        "training.precision: this CPU has no instructions for bf16, whose products are then many "
        "times slower than those of fp32; training.precision=fp32 is the faster here"
    )


def warn_of_changes(run: Path, config: Config) -> None:
    """Name what differs from the configuration this run was started with, where it matters."""
    try:
        before = load_config(run / "config.yaml")
    except ConfigError:
        return
    for key, (old, new) in _differences(before.model_dump(), config.model_dump()):
        if not key.startswith(FREE_KEYS):
            say(f"warning: {key} was {old!r} and is now {new!r}: this run's curve changes")


def warn_of_other_samples(before: RunState, data: DataSet) -> None:
    """Say where the set is no longer what it was when the checkpoint was written."""
    for words in other_samples(before, data):
        say(f"warning: {words}: this run's curve changes")


def untrained_classes(data: DataSet, trained: Sequence[int], num_classes: int) -> str:
    """Say how many of the model's classes have no images, if any; `trained` have had some."""
    untrained = num_classes - len(trained)
    if not untrained:
        return ""
    empty = data.class_sizes.count(0)
    of_the_set = f"{len(data.classes)}" + (f", {empty} of them without images" if empty else "")
    return (
        f"model.num_classes is {num_classes}, the set has {of_the_set}: {untrained} "
        f"class{'es' * (untrained > 1)} will never be trained"
    )


def _differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in a.keys() | b.keys():
            yield from _differences(a.get(name), b.get(name), f"{key}.{name}".lstrip("."))
    elif a != b:
        yield key, (a, b)


def farewell(
    run: Path, training: TrainingConfig, vision: VisionConfig, step: int, last: Mapping[str, float]
) -> list[str]:
    """Say what the finished run did, where to look, and what to try next: of what is there.

    last: the last line of its metrics.
    """
    names = ", ".join(encoder.name for encoder in vision.encoders)
    aligned = f", aligned to {names}" if names else ""
    saved, boards = f"{checkpoint_path(run, step)}/", f"{run}/tensorboard/"
    metrics = [f"{run}/metrics.jsonl", *([boards] if training.tensorboard else [])]
    fastrepa, config = _program("fastrepa"), typed(run / "config.yaml")
    commands = {
        f"{fastrepa} sample {typed(run)} --num 64 --cfg 3 --seed 1": saved,
        f"{fastrepa} train {config} training.steps={2 * step}": saved,
    }
    if training.tensorboard:
        commands[f"{_program('tensorboard')} --logdir {typed(run)}"] = boards
    next_ones = [f"  {command}" for command, needed in commands.items() if os.path.exists(needed)]
    of_last = (last.get(key, math.nan) for key in ("loss", "images_per_s", "seconds"))
    loss, images_per_s, seconds = of_last
    return [
        "",
        f"{step} steps of {training.global_batch} images{aligned}: "
        f"loss {loss:.4f}, {images_per_s:.0f} images/s, {seconds / 60:.1f} minutes",
        *_where("samples", f"{run}/samples/"),
        *_where("curves", f"{run}/curves.png"),
        *_where("metrics", *metrics),
        *_where("checkpoint", saved),
        *(["next:", *next_ones] if next_ones else []),
    ]


def _where(what: str, *paths: str) -> list[str]:
    """A line that names those of the paths that are there, if any."""
    there = [path for path in paths if os.path.exists(path)]
    return [f"  {what:<13}{', '.join(there)}"] if there else []


def _program(name: str) -> str:
    """A command of this environment, as it can be typed here: by name where the shell finds it."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return typed(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path)


def _shape(p: Tensor) -> tuple[int, ...]:
    """A parameter's whole shape, also where ZeRO-3 has taken it apart."""
    return tuple(getattr(p, "ds_shape", p.shape))
