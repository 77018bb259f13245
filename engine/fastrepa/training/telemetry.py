"""A run's reports: progress bar, metrics.jsonl, TensorBoard, trackers, environment.json."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastrepa import __version__
from fastrepa.config import Config
from fastrepa.errors import DataError, decoration, worded, writing
from fastrepa.runtime.files import write_whole
from fastrepa.runtime.progress import Bar, Figures
from fastrepa.runtime.regions import NAMES
from fastrepa.runtime.terminal import Terminal
from fastrepa.runtime.world import launched_world

PACKAGES = (
    "torch", "triton", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "timm",
    "torchvision", "safetensors", "numpy", "pydantic", "diffusers", "flash-attn", "flash-attn-4",
    "xformers",
)  # fmt: skip

TRAINING = "training"  # what the bar says
QUIET = 15.0  # seconds without a line, where something slow is done and no bar shows it


def versions() -> dict[str, str]:
    """The versions of fastrepa, Python and the packages that compute."""
    out = {"fastrepa": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout fastrepa runs from; empty where there is none."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def machine() -> dict[str, Any]:
    """Return what a run ran on, for environment.json."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "command": sys.argv,
        "git": git_state(),
        "versions": versions(),
        "platform": platform.platform(),
        "device": device,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "world_size": launched_world().size,
    }


class Telemetry:
    """The first rank's voice; every other rank holds a silent one.

    `environment` joins what environment.json says of the machine.

    Lines of metrics.jsonl past `start_step` belong to steps that a crash undid: they are dropped.
    What is no line of a run's moves to metrics.jsonl.dropped.

    Raises ConfigError where the run folder cannot be written.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        *,
        start_step: int,
        active: bool,
        environment: dict[str, Any] | None = None,
    ) -> None:
        self.run, self.active, self.steps = run, active, config.training.steps
        self.console = Terminal(quiet=not active)
        self._tensorboard: Any = None
        self._trackers: dict[str, Any] = {}
        self._bar: Bar | None = None
        if not active:
            return
        self.metrics_path = run / "metrics.jsonl"
        self._unwritten = ""  # lines that wait for room on a full disk
        with writing(run):
            self._drop_undone(start_step)
            ran_on = machine() | (environment or {})
            write_whole(run / "environment.json", json.dumps(ran_on, indent=1).encode())
        earlier = self.history()
        seconds = earlier[-1].get("seconds", 0.0) if earlier else 0.0
        self._seconds_before = seconds if math.isfinite(seconds) else 0.0
        self._began = time.monotonic()
        if config.training.tensorboard:
            with decoration(run / "tensorboard", self._end_tensorboard):
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(run / "tensorboard", purge_step=start_step + 1)
        if config.training.wandb or config.training.trackio:
            from fastrepa.training.trackers import start_trackers

            self._trackers = start_trackers(run, config, warn=self.warn, say=self.say)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_bar()
        if self._tensorboard is not None:
            with decoration(self.run / "tensorboard", self._end_tensorboard):
                self._tensorboard.close()
        self._track(lambda tracker: tracker.finish())

    def _end_tensorboard(self, problem: str) -> None:
        self._tensorboard = None  # its thread has ended and takes no more
        self.warn(problem)

    def _track(self, do: Callable[[Any], None]) -> None:
        """Do something with wandb and trackio; one that fails is not asked again."""
        for name, tracker in list(self._trackers.items()):
            del self._trackers[name]
            with decoration(name, self.warn):
                do(tracker)
                self._trackers[name] = tracker

    def say(self, *lines: str) -> None:
        for line in lines:
            self.console.print(line, soft_wrap=True)

    def warn(self, text: str) -> None:
        logging.getLogger("fastrepa").warning(text)  # rank_0.log
        self.say(f"warning: {text}")

    def start(self, step: int) -> None:
        """Show the progress bar, where there is a terminal to show it on."""
        if self.active and self.console.is_terminal:
            self._bar = Bar(
                TRAINING, self.steps, "steps", done=step, stays=True,
                more=Figures(), console=self.console,
            ).__enter__()  # fmt: skip

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.move(step)

    @contextlib.contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[float], None]]:
        """Show how far something slow beside the steps is, which calls what this yields with how
        much more is done: in the bar; without one in a line now and then.
        """
        done, said, began = 0.0, time.monotonic(), time.monotonic()

        def advance(more: float) -> None:
            nonlocal done, said
            done, now = min(done + more, total), time.monotonic()
            if self._bar is not None:
                self._bar.move(self._bar.done, f"{what}, {done:.0f} of {total}")
            elif done < total and now - said >= QUIET:
                said, rest = now, (now - began) * (total / done - 1)
                self.say(f"{what}, {done:.0f} of {total} · ETA {rest / 60:.1f} min")

        try:
            yield advance
        finally:
            if self._bar is not None:
                self._bar.move(self._bar.done, TRAINING)

    def end_bar(self) -> None:
        """Leave the bar as it is: what is said from now on follows it."""
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None

    def log(self, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to every other listener.

        Adds `seconds`: the run's age, earlier processes' share included.
        """
        if not self.active:
            return
        metrics = {**metrics, "seconds": self._seconds_before + time.monotonic() - self._began}
        # NaN is no JSON: null, which `history` turns back.
        line = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._append(json.dumps(line) + "\n")
        step = int(metrics["step"])
        numbers = {k: v for k, v in metrics.items() if k != "step"}
        if self._tensorboard is not None:
            with decoration(self.run / "tensorboard", self._end_tensorboard):
                for key, value in numbers.items():
                    group = "share of time/" if key in NAMES else ""
                    self._tensorboard.add_scalar(group + key, value, step)
        self._track(lambda tracker: tracker.log(numbers, step))
        shown = {
            "loss": f"{metrics['loss']:.4f}",
            "align": f"{metrics['alignment_loss']:.3f}" if "alignment_loss" in metrics else None,
            "img/s": f"{metrics['images_per_s']:.0f}",
            "MFU": f"{metrics['mfu']:.1%}" if "mfu" in metrics else None,
            "memory": f"{metrics['peak_memory_bytes'] / 1e9:.1f} GB",
            "skipped": f"{metrics['skipped_steps']:.0f}" if metrics["skipped_steps"] else None,
            "data wait": f"{100 * metrics['data_wait']:.0f}%",
        }
        if self._bar is not None:
            self._bar.move(step, **shown)
        else:
            rest = (self.steps - step) * metrics["step_seconds"]
            figures = " · ".join(f"{k} {v}" for k, v in shown.items() if v is not None)
            self.say(f"step {step}/{self.steps} · {figures} · ETA {rest / 60:.1f} min")

    def _append(self, line: str) -> None:
        """Append to metrics.jsonl; on a full disk lines wait, whole, until there is room again."""
        waiting, self._unwritten = self._unwritten, self._unwritten + line
        path, size = self.metrics_path, None
        try:
            size = path.stat().st_size if path.exists() else 0
            with path.open("a", encoding="utf-8") as f:
                f.write(self._unwritten)
            self._unwritten = ""
        except OSError as e:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)
            if not waiting:
                self.warn(f"{path}: cannot be written ({worded(e)}); training goes on, lines wait")

    @contextlib.contextmanager
    def dispensable(self, name: str) -> Iterator[None]:
        """Around what training can do without: whatever fails there is a warning."""
        with decoration(self.run / name, self.warn):
            yield

    def picture(self, tag: str, path: Path, step: int) -> None:
        """Show a PNG in TensorBoard and the trackers too."""
        self._track(lambda tracker: tracker.picture(tag, path, step))
        if self._tensorboard is not None:
            from fastrepa.data.images import read_rgb

            with decoration(self.run / "tensorboard", self._end_tensorboard):
                self._tensorboard.add_image(tag, read_rgb(path), step, dataformats="HWC")

    def history(self) -> list[dict[str, float]]:
        """Every logged step so far; none where metrics.jsonl cannot be read, which is a warning."""
        from fastrepa.reading.metrics import read_metrics

        if not self.active:
            return []
        try:
            return read_metrics(self.metrics_path).by_step()
        except DataError as e:
            self.warn(str(e))
            return []

    def _drop_undone(self, start_step: int) -> None:
        from fastrepa.reading.metrics import read_metrics

        path = self.metrics_path
        found = read_metrics(path)
        kept = b"".join(raw + b"\n" for raw, line in found.lines if line["step"] <= start_step)
        if others := found.others:
            aside = path.with_name(f"{path.name}.dropped")
            with aside.open("ab") as file:
                file.writelines(raw + b"\n" for raw in others)
            lines = f"{len(others)} line{'s' * (len(others) > 1)}"
            self.warn(f"{path}: {lines} that no run wrote, or twice, moved to {aside.name}")
        if path.exists() and path.read_bytes() != kept:
            write_whole(path, kept)
