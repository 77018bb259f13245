"""Samples of an idle run, drawn for the page: one request at a time, in memory alone."""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastrepa.errors import ConfigError, FastrepaError, worded
from fastrepa.runtime.ownership import holder

MOST = 64  # images at once
KEPT = 12  # pictures, of which the oldest go


class Wanted(BaseModel):
    """Settings of a drawing; classes as `sample --classes` takes them, "" for all in turn."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    classes: str = Field("", max_length=500)
    num: int = Field(ge=1, le=MOST)
    seed: int = Field(ge=0, lt=2**32)
    cfg: float = Field(ge=1, le=50, allow_inf_nan=False)
    steps: int = Field(ge=1, le=1000)

    @property
    def words(self) -> str:
        """The settings, as a picture's caption."""
        classes = self.classes.strip() or "all classes"
        return f"{classes}, seed {self.seed}, guidance {self.cfg:g}, {self.steps} steps"


@dataclass
class Drawing:
    """A request and how far it is: loading, drawing, done or failed."""

    number: int
    wanted: Wanted
    state: str = "loading"
    done: float = 0.0
    said: str = ""
    png: bytes = b""


Draw = Callable[[Path, Wanted, Callable[[float], None]], tuple[bytes, str]]


class Painter:
    """Draws samples of a run in a thread of its own; every method may be called from any thread."""

    def __init__(self, run: Path, draw: Draw | None = None) -> None:
        self.run = run
        self._draw = draw or draw_samples
        self._lock = threading.Lock()
        self._drawings: list[Drawing] = []

    def begin(self, wanted: object) -> None:
        """Begin to draw. ConfigError for what is not allowed, a FastrepaError where the run is not
        idle or something is being drawn.
        """
        try:
            request = Wanted.model_validate(wanted)
        except ValidationError as e:
            first = e.errors()[0]
            key = ".".join(map(str, first["loc"])) or "request"
            raise ConfigError(f"{key}: {first['msg']}") from None
        with self._lock:
            if self._now() in ("loading", "drawing"):
                raise FastrepaError("one drawing at a time: another is under way")
            if busy := holder(self.run):
                raise FastrepaError(f"the run is not idle: {busy}")
            number = self._drawings[-1].number + 1 if self._drawings else 1
            drawing = Drawing(number, request)
            self._drawings = [*self._drawings, drawing][-KEPT:]
        threading.Thread(target=self._work, args=(drawing,), daemon=True).start()

    def state(self) -> dict[str, Any]:
        """Return what is shown: `busy` (who holds the run), `now`, and `drawn`, oldest first."""
        with self._lock:
            now = self._drawings[-1] if self._drawings else None
            busy = holder(self.run)
            return {
                "busy": f"The run is not idle: {busy}" if busy else "",
                "now": now and {
                    "number": now.number, "state": now.state, "done": now.done,
                    "total": now.wanted.num, "said": now.said,
                },
                "drawn": [
                    {"number": d.number, "words": f"{d.wanted.words}; {d.said}"}
                    for d in self._drawings if d.state == "done"
                ],
            }  # fmt: skip

    def picture(self, number: int) -> bytes | None:
        """The PNG of a drawing that is done and still kept."""
        with self._lock:
            return next((d.png for d in self._drawings if d.number == number and d.png), None)

    def _now(self) -> str:
        return self._drawings[-1].state if self._drawings else ""

    def _work(self, drawing: Drawing) -> None:
        def progress(more: float) -> None:
            with self._lock:
                drawing.state = "drawing"
                drawing.done = min(drawing.done + more, drawing.wanted.num)

        try:
            png, said = self._draw(self.run, drawing.wanted, progress)
            state = "done"
        except Exception as e:  # the page says it; the server goes on
            png, said, state = b"", worded(str(e).removeprefix("--")), "failed"
            if not isinstance(e, FastrepaError):
                said = f"{type(e).__name__}: {said}"
        _let_go_of_gpu()
        with self._lock:
            drawing.png, drawing.said, drawing.state = png, said, state


def _let_go_of_gpu() -> None:
    """Give back the memory that torch keeps for its next tensors: a training may want it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def draw_samples(run: Path, wanted: Wanted, progress: Callable[[float], None]) -> tuple[bytes, str]:
    """A grid as PNG of the newest checkpoint's averaged weights, and which checkpoint that is.

    Raises what `generation.sample.sample_run` does.
    """
    import torch

    from fastrepa.checkpoint.choice import NEWEST
    from fastrepa.generation.generate import BATCH_SIZE, default_labels, generate
    from fastrepa.generation.loading import (
        draw_options,
        load_generator,
        ready_to_sample,
        with_settings,
    )
    from fastrepa.generation.pictures import save_grid
    from fastrepa.generation.sample import chosen_classes
    from fastrepa.runtime.world import World
    from fastrepa.vision.codec import build_codec

    world = World()
    loaded = load_generator(run, world, world.device, NEWEST)
    asked = {"num": wanted.num, "cfg": wanted.cfg, "steps": wanted.steps}
    info, config = loaded.state, with_settings(loaded.config, asked)
    model = ready_to_sample(loaded.model, config.sample, config.training, world.device)
    asked_for = [wanted.classes] if wanted.classes.strip() else []
    chosen = chosen_classes(asked_for, info, config, option="classes")
    labels = default_labels(wanted.num, config.model.num_classes, chosen)
    progress(0.0)
    images = generate(
        model,
        build_codec(config.data.codec, resolution=config.data.resolution, device=world.device),
        labels,
        seed=wanted.seed,
        sample_ids=torch.arange(wanted.num),
        batch_size=min(wanted.num, BATCH_SIZE),
        progress=progress,
        **draw_options(config, info),
    )
    names = [info.classes[c] if c < len(info.classes) else str(c) for c in labels.tolist()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grid.png"
        save_grid(images, path, names=names)
        return path.read_bytes(), f"checkpoint of step {info.step:,}"
