"""Which weights are meant: a run's newest checkpoint, its best, that of a step, or an export.

An export is what `fastrepa convert --to safetensors` wrote: weights with the configuration, step
and classes as metadata, which needs no run folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fastrepa.checkpoint import averages
from fastrepa.checkpoint.format import (
    RunState,
    StoredTensors,
    best_checkpoint,
    check_finite,
    checkpoint_path,
    checkpoints,
    damage,
    fingerprint,
    read_state,
    step_number,
    with_newest,
)
from fastrepa.config import Config, config_from_dict, load_run_config, overridden, run_folder
from fastrepa.errors import CheckpointError, ConfigError, DataError
from fastrepa.model.conversion import load_weights
from fastrepa.model.sit import SiT
from fastrepa.reading.tensors import SafeTensors, sized
from fastrepa.reading.text import parse_json
from fastrepa.runtime.files import sha256_of

Step = int | Literal["best"] | None
T = TypeVar("T")
_LISTED = 12  # steps in a message


@dataclass(frozen=True)
class Wanted:
    """One checkpoint's weights: of which step, which average, and with what changed.

    step: None is the newest. ema: None is the first. overrides: `path.to.key=value` over the run's
    own configuration, such as where the autoencoder's weights lie now.
    """

    step: Step = None
    ema: str | None = None
    overrides: tuple[str, ...] = ()


NEWEST = Wanted()


def parse_step(text: str | None) -> Step:
    """Return what `--step` means; ConfigError for what is neither a number nor best."""
    if text is None or text == "best":
        return "best" if text else None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ConfigError(f"--step: {text!r} is neither the number of a step nor best")
    return int(text)


def is_export(path: Path) -> bool:
    """Tell whether a path is a file of weights, whose metadata should say what they are."""
    return path.suffix == ".safetensors" and path.is_file()


def can_draw(path: Path) -> bool:
    """Tell whether images can be drawn from what lies at a path: a run, a checkpoint, an export."""
    run = run_folder(path)
    return is_export(path) or ((run / "config.yaml").is_file() and (run / "checkpoints").is_dir())


def with_chosen(path: Path, step: Step, config: Config, read: Callable[[Path], T]) -> T:
    """Return what `read` makes of the checkpoint that is meant by a run, or a checkpoint of it.

    config: the run's; its `training.keep_best` says which is the best. The newest is
    `with_newest`'s; one that is asked for by name must be undamaged.
    Raises CheckpointError, which lists those there are, and ConfigError.
    """
    run = run_folder(path)
    if run != path:
        named = step_number(path)
        if step not in (None, named):
            raise ConfigError(f"--step: {step}, but {path} is the checkpoint of step {named}")
        step = named
    if step is None:
        return with_newest(run, read)
    if step == "best":
        chosen = _best(run, config)
    else:
        chosen = checkpoint_path(run, step)
        if not chosen.is_dir():
            raise CheckpointError(f"{run}: no checkpoint of step {step}; {_those_of(run)}")
    try:
        if (problem := damage(chosen)) is not None:
            raise CheckpointError(f"{chosen}: is damaged ({problem}); {_those_of(run)}")
        return read(chosen)
    except (CheckpointError, OSError):
        if chosen.is_dir():
            raise
    raise CheckpointError(f"{chosen}: pruned before it could be read; {_those_of(run)}")


def _best(run: Path, config: Config) -> Path:
    rule = config.training.keep_best
    if rule is None:
        raise ConfigError(
            f"--step: best is by training.keep_best, which {run} does not set; add "
            "training.keep_best.metric=NAME, or give the number of a step"
        )
    best = best_checkpoint(run, rule)
    if best is None:
        raise CheckpointError(
            f"{run}: no checkpoint has the metric {rule.metric} of training.keep_best; "
            f"{_those_of(run)}"
        )
    return best


def _those_of(run: Path) -> str:
    steps = [str(step_number(path)) for path in checkpoints(run)]
    if not steps:
        return "it has none"
    return f"it has {'..., ' * (len(steps) > _LISTED)}{', '.join(steps[-_LISTED:])}"


def load_ema_model(
    path: str | Path, device: torch.device, wanted: Wanted = NEWEST
) -> tuple[SiT, Config, RunState]:
    """The averaged model that is meant by a run, a checkpoint of it or an export, in eval mode,
    float32. Raises CheckpointError and ConfigError.
    """
    path = Path(path)
    if is_export(path):
        return _load_export(path, device, wanted)
    config = load_run_config(run_folder(path), wanted.overrides)

    def read(folder: Path) -> tuple[SiT, Config, RunState]:
        state = read_state(folder)
        stored = averages.stored_emas(state.emas, config.training.ema[0])
        key = averages.choose_ema(stored, wanted.ema, source=folder)
        return _model(StoredTensors(folder, key), key, config, state, folder, device)

    return with_chosen(path, wanted.step, config, read)


def _model(
    stored: Mapping[str, Tensor],
    kind: str,
    config: Config,
    state: RunState,
    source: Path,
    device: torch.device,
) -> tuple[SiT, Config, RunState]:
    check_finite(source, kind, stored)
    model = SiT.from_config(
        config, side=state.side, channels=state.channels, encoder_widths=state.encoder_widths
    )
    load_weights(model, stored, source=str(source))
    return model.to(device).eval(), config, state


def identity(path: Path, step: int) -> str:
    """SHA-256 of an export, or of the manifest of a run's checkpoint of `step`."""
    return sha256_of(path) if is_export(path) else fingerprint(run_folder(path), step)


def name_of_ema(path: Path, wanted: Wanted, config: Config, state: RunState) -> str:
    """Name the average that `load_ema_model` reads, as records have it."""
    if is_export(path):
        about = read_export(path)[0]
        return "raw" if about["weights"] == "raw" else about["ema"]
    return wanted.ema or str(averages.stored_emas(state.emas, config.training.ema[0])["ema"])


# Exports ----------------------------------------------------------------------------------------


def read_export(path: Path) -> tuple[dict[str, str], dict[str, Any], SafeTensors]:
    """Return an export's metadata, the tree of its configuration and its tensors.

    Raises CheckpointError for a file without them.
    """
    stored = SafeTensors(path, CheckpointError)
    about = stored.metadata
    lacking = [key for key in ("config", "step", "classes", "weights", "ema") if key not in about]
    if lacking:
        raise CheckpointError(
            f"{path}: its metadata has no {lacking[0]}; expected is a file that `fastrepa convert "
            "--to safetensors` wrote"
        )
    try:
        tree = parse_json(about["config"], f"{path}: config")
        tree["run"]  # what is no configuration has none
    except (DataError, TypeError, KeyError):
        raise CheckpointError(f"{path}: config in its metadata is not a run's") from None
    return about, tree, stored


def _load_export(path: Path, device: torch.device, wanted: Wanted) -> tuple[SiT, Config, RunState]:
    about, tree, stored = read_export(path)
    if wanted.ema is not None:
        raise ConfigError(f"--ema: {path} holds one set of weights, {about['ema']}; leave it out")
    config = config_from_dict(overridden(tree, wanted.overrides), source=str(path))
    state = export_state(path, about, stored, config)
    if wanted.step not in (None, state.step):
        raise ConfigError(f"--step: {wanted.step}, but {path} holds step {state.step} alone")
    return _model(stored, about["weights"], config, state, path, device)


def export_state(
    path: Path, about: Mapping[str, str], stored: Mapping[str, Tensor], config: Config
) -> RunState:
    """Return an export's facts as its checkpoint had them, as far as they matter for images.

    stored: its tensors [...] by name. Raises CheckpointError.
    """
    try:
        step = int(about["step"])
        classes = [str(name) for name in parse_json(about["classes"], path)]
        trained = [int(number) for number in parse_json(about.get("trained", "null"), path) or []]
    except (ValueError, TypeError, DataError):
        raise CheckpointError(f"{path}: step or classes in its metadata are not a run's") from None
    return RunState(
        step=step, optimizer_step=step, samples_seen=step * config.training.global_batch,
        **shape_of(stored, config.model.patch, path),
        classes=classes, world_size=1, trained=trained or None,
    )  # fmt: skip


def shape_of(model: Mapping[str, Tensor], patch: int, file: Path) -> dict[str, Any]:
    """Read side, channels and encoder_widths from the tensors [...] of a SiT themselves."""

    def shape(name: str, form: str) -> torch.Size:
        return sized(model, name, form, f"{file}: not a SiT of REPA's", CheckpointError).shape

    tokens = shape("pos_embed", "[1, T, D]")[1]
    count = len({n.split(".")[1] for n in model if n.startswith("projectors.")})
    return {
        "side": math.isqrt(tokens) * patch,
        "channels": shape("x_embedder.proj.weight", "[D, C, patch, patch]")[1],
        "encoder_widths": [shape(f"projectors.{i}.4.weight", "[Z, P]")[0] for i in range(count)],
    }


def options_of(
    step: str | None, ema: str | None, overrides: Iterable[str] | None, codec: Path | None
) -> Wanted:
    """Return what a command line's `--step`, `--ema`, overrides and `--codec-weights` ask for."""
    moved = (f"data.codec.weights={json.dumps(str(codec))}",) if codec else ()
    return Wanted(parse_step(step), ema, (*(overrides or ()), *moved))
