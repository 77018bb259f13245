"""A run's numbers and grids for Weights & Biases and for trackio, each by its own library."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrepa.config import Config
from fastrepa.errors import DataError, FastrepaError, decoration, writing
from fastrepa.reading.text import read_json
from fastrepa.runtime.files import write_whole
from fastrepa.runtime.terminal import quoted


def start_trackers(
    run: Path, config: Config, *, warn: Callable[[str], None], say: Callable[..., None]
) -> dict[str, Tracker]:
    """Start what the configuration asks for, by its name.

    One that is not installed is a FastrepaError, one that cannot start a warning.
    """
    training = config.training
    found: dict[str, Tracker] = {}
    for name, project in (("wandb", training.wandb), ("trackio", training.trackio)):
        if project is None:
            continue
        try:
            library = importlib.import_module(name)
        except ImportError:
            raise FastrepaError(
                f"training.{name} is set, but {name} is not installed: "
                f"pip install 'fastrepa[{name}]'"
            ) from None
        with writing(run):
            key = _known_as(run, name)
        with decoration(name, warn):
            found[name] = Tracker(name, library, project, key, run, config)
            if name == "trackio":
                say(f"trackio: trackio show --project {quoted(project)}")
    return found


class Tracker:
    """One of the two; both go on with a run that they know by its key."""

    def __init__(
        self, name: str, library: Any, project: str, key: str, run: Path, config: Config
    ) -> None:
        self._name, self._library = name, library
        tree = config.model_dump(mode="json")
        if name == "wandb":
            self._run = library.init(
                project=project, name=run.resolve().name, dir=str(run), id=key, resume="allow",
                config=tree,
            )  # fmt: skip
            return
        with _silent():  # of trackio a run's name is its key
            self._run = library.init(
                project=project, name=key, resume="allow", config=tree, embed=False,
                auto_log_cpu=False, auto_log_gpu=False,
            )  # fmt: skip

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def picture(self, tag: str, path: Path, step: int) -> None:
        """Show a PNG, which the library copies."""
        self._run.log({tag: self._library.Image(str(path))}, step=step)

    def finish(self) -> None:
        """Wait until all of it has arrived."""
        if self._name == "wandb":
            self._run.finish()
            return
        with _silent():  # the module's, or it finishes once more at the end of the process
            self._library.finish()


def _silent() -> contextlib.redirect_stdout[io.StringIO]:
    """Swallow what trackio says of itself: a run has one voice."""
    return contextlib.redirect_stdout(io.StringIO())


def _known_as(run: Path, name: str) -> str:
    """The id by which a tracker knows a run: kept in its folder, a copy of which is another run."""
    note, folder = run / f"{name}.json", run.stat().st_ino
    with contextlib.suppress(DataError, KeyError, TypeError):
        kept = read_json(note)
        if kept["folder"] == folder:
            return str(kept["id"])
    # Before there was a note wandb's id was the run's name, with which its own folders end.
    dated = [p.name.partition("run-")[2] for p in (run / name).glob("*run-*-*")]
    begun = "" if note.exists() or not dated else max(dated).partition("-")[2]
    called = re.sub(r"[^\w.-]", "-", run.resolve().name)[:64]
    key = begun or f"{called}-{secrets.token_hex(4)}"
    write_whole(note, json.dumps({"id": key, "folder": folder}).encode())
    return key
