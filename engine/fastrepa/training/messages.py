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
from fastrepa.config import Config, TrainingConfig, load_config
from fastrepa.data.datasets import DataSet
from fastrepa.errors import ConfigError
from fastrepa.model.compilation import COMPILED
from fastrepa.runtime.terminal import quoted, say, typed
from fastrepa.runtime.world import World
from fastrepa.training.schedule import learning_rate
from fastrepa.training.zero.settings import as_run
from fastrepa_kernels import launch

if TYPE_CHECKING:
    from fastrepa.training.trainer import Trainer

# What may change between a run and its continuation without changing what is learned.
FREE_KEYS = ("run", "training.steps", "training.log_every", "training.sample_every",
             "training.checkpoint_every", "training.keep", "training.tensorboard",
             "training.wandb", "training.trackio", "training.micro_batch", "training.compile",
             "training.ema", "training.recompute", "training.memory_budget_gb", "training.threads",
             "vision.look_ahead", "vision.compile", "data.path", "data.decode", "data.readers",
             "data.read_ahead", "data.prefetch", "data.cache_dir", "data.cache_gb", "sample",
             "evaluation", "zero", "survival", "attention", "kernels", "deterministic")  # fmt: skip


def first_line(trainer: Trainer, threads: str = "") -> str:
    """Say in one line what a run computes on and which paths are active.

    threads: words for the CPU's threads, where somebody has chosen them.
    """
    c, w, codec = trainer.config, trainer.world, trainer.codec
    where = (
        torch.cuda.get_device_name(w.device)
        if w.device.type == "cuda"
        else f"cpu ({threads or f'{torch.get_num_threads()} threads'})"
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


def warn_of_changes(run: Path, config: Config, step: int) -> None:
    """Name what differs from the configuration this run was started with, where it matters to what
    comes after `step`.
    """
    try:
        before = load_config(run / "config.yaml")
    except ConfigError:
        return
    for key, (old, new) in _differences(before.model_dump(), config.model_dump()):
        if not key.startswith(FREE_KEYS):
            say(f"warning: {key} was {old!r} and is now {new!r}: this run's curve changes")
    if words := moved_rate(before.training, config.training, step):
        say(f"warning: {words}")


def moved_rate(before: TrainingConfig, now: TrainingConfig, step: int) -> str:
    """Say where another number of steps moves the rate of a cosine, from which to which; a new one
    that starts at its end moves nothing.
    """
    old, new = before.schedule, now.schedule
    cosines = old.name == new.name == "cosine" and old.start == new.start
    if not cosines or before.steps == now.steps or not 0 < step < now.steps:
        return ""
    finished = step >= before.steps
    was, at = learning_rate(before, step - finished), learning_rate(now, step)
    if was == at:
        return ""
    what = "the finished cosine is opened again" if finished else "the cosine is stretched"
    cure = (
        f"; for a new one say training.schedule.start={before.steps} and a lower "
        f"training.optimizer.lr"
    )
    return (
        f"training.steps was {before.steps} and is now {now.steps}: {what}, and the rate goes from "
        f"{was:.3g} to {at:.3g} at once{cure if finished else ''}"
    )


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


def farewell(config: Config, step: int, last: Mapping[str, float]) -> list[str]:
    """Say what the finished run did, where to look, and what to try next: of what is there.

    last: the last line of its metrics.
    """
    run, training = Path(config.run), config.training
    names = ", ".join(encoder.name for encoder in config.vision.encoders)
    aligned = f", aligned to {names}" if names else ""
    board = [f"{run}/tensorboard/"] if training.tensorboard else []
    next_ones = [
        f"  {command}" for command, needed in _next(config, step) if os.path.exists(needed)
    ]
    of_last = (last.get(key, math.nan) for key in ("loss", "images_per_s", "seconds"))
    loss, images_per_s, seconds = of_last
    return [
        "",
        f"{step} steps of {training.global_batch} images{aligned}: "
        f"loss {loss:.4f}, {images_per_s:.0f} images/s, {seconds / 60:.1f} minutes",
        *_where("samples", f"{run}/samples/"),
        *_where("curves", f"{run}/curves.png"),
        *_where("metrics", f"{run}/metrics.jsonl", *board),
        *_where("checkpoint", f"{checkpoint_path(run, step)}/"),
        *(["next:", *next_ones] if next_ones else []),
    ]


def _next(config: Config, step: int) -> Iterator[tuple[str, Path]]:
    """Yield commands that this run is ready for, each with the path that it cannot do without."""
    run, fastrepa = Path(config.run), _program("fastrepa")
    saved, metrics, board = checkpoint_path(run, step), run / "metrics.jsonl", run / "tensorboard"
    guided = " --cfg 3" if config.model.label_dropout else ""
    yield f"{fastrepa} sample {typed(run)} --num 64{guided} --seed 1", saved
    yield f"{fastrepa} watch {typed(run)}", metrics
    yield f"{fastrepa} report {typed(run)}", metrics
    yield f"{fastrepa} evaluate {typed(run)} {_measured(config)}", saved
    if config.vision.encoders:
        yield f"{fastrepa} probe {typed(run)}", saved
    longer = _longer(config.training, step)
    yield f"{fastrepa} train {typed(run / 'config.yaml')} {longer}", saved
    if config.training.tensorboard:
        yield f"{_program('tensorboard')} --logdir {typed(run)}", board


def _measured(config: Config) -> str:
    """Further words of `evaluate`: to measure as the run did itself, or by its encoders."""
    e = config.evaluation
    words = [typed(e.reference or config.data.path), "--num", str(e.num if e.every else 256)]
    if encoders := e.encoders if e.every else config.vision.encoders:
        each = (
            x.name
            + (f"={x.weights}" if x.weights != "hub" else "")
            + (f"@{x.input}" * bool(x.input))
            for x in encoders
        )
        words += ["--encoders", quoted(",".join(each))]
    if e.every and e.metrics:
        words += ["--metrics", quoted(",".join(e.metrics))]
    return " ".join(words)


def _longer(training: TrainingConfig, step: int) -> str:
    """Overrides that train a finished run for as long again: after a cosine, a new one at half the
    rate, with a warm-up, for the old one would be taken back to its height at once.
    """
    s, words = training.schedule, [f"training.steps={2 * step}"]
    if s.name == "cosine":
        words.append(f"training.schedule.start={step}")
        words += [] if s.warmup else [f"training.schedule.warmup={max(1, step // 20)}"]
        words.append(f"training.optimizer.lr={training.optimizer.lr / 2:g}")
    return " ".join(words)


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
