"""Checkpoints: whole float32 tensors in safetensors files, and how a run finds its newest good one.

    checkpoints/step_0000500/
        weights.safetensors  ema.safetensors         every tensor, by the reference's names
        ema_sigma_rel_0.05.safetensors  ...          and of every further average (averages.py)
        exp_avg.safetensors  exp_avg_sq.safetensors  the trained ones only
        rng_rank_00000.safetensors                   torch's generators of every rank
        state.json                                   step, data position, what the model is
        manifest.json                                bytes and SHA-256 of all of these

Several ranks write a part each, whole tensors all the same: ema-00001-of-00004.safetensors, ...
Nothing is pickled. A checkpoint is written in a temporary folder, flushed to disk and renamed, so
that a folder called step_* is complete (writer.py).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastrepa.checkpoint.averages import choose_ema, resumed_emas, stored_emas
from fastrepa.checkpoint.host_tensors import write_durably
from fastrepa.checkpoint.kinds import WEIGHT, Whole
from fastrepa.config import Config, KeepBestConfig, TrainingConfig, load_run_config
from fastrepa.errors import CheckpointError
from fastrepa.model.conversion import load_weights
from fastrepa.model.sit import SiT
from fastrepa.runtime.files import fsync_folder, sha256_of
from fastrepa.runtime.world import World

FORMAT = 2
READABLE = (1, 2)  # 1: one file of each kind, written by the first rank


@dataclass(frozen=True)
class RunState:
    """A checkpoint's facts beside its tensors (state.json)."""

    step: int
    optimizer_step: int
    samples_seen: int
    side: int
    channels: int
    encoder_widths: list[int]
    classes: list[str]
    world_size: int
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # the last logged line
    emas: dict[str, Any] = field(default_factory=dict)  # kind -> 0.9999, {"sigma_rel": 0.05}, ...
    ema_since: dict[str, int] = field(default_factory=dict)  # updates taken before it began, if any
    trained: list[int] | None = None  # numbers of the classes that had images; None: not recorded
    num_samples: int = 0  # of the data set; 0: not recorded
    data_digest: str = ""  # of its images and labels (DataSet.digest)
    format: int = FORMAT


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:07d}"


def newest_checkpoint(run: Path, *, verify: bool = True) -> Path | None:
    """The newest checkpoint whose files are as its manifest says, None where there is none at all.

    A damaged one is named in a warning and passed over for the one before it; CheckpointError where
    every one is damaged.
    """
    found = checkpoints(run)
    problem = None
    for path in reversed(found):
        problem = damage(path) if verify else None
        if problem is None:
            return path
        warnings.warn(
            f"checkpoint {path.name} is damaged ({problem}); trying the one before", stacklevel=2
        )
    if found:
        raise CheckpointError(f"{run / 'checkpoints'}: no undamaged checkpoint ({problem})")
    return None


def fingerprint(run: Path, step: int) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which has those of its files."""
    return sha256_of(checkpoint_path(run, step) / "manifest.json")


def read_state(path: Path) -> RunState:
    """Read state.json of a checkpoint folder."""
    try:
        fields = json.loads((path / "state.json").read_text())
        state = RunState(**fields)
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{path / 'state.json'}: not readable ({e})") from None
    if state.format not in READABLE:
        raise CheckpointError(
            f"{path}: checkpoint format {state.format}, this version reads {READABLE}"
        )
    return state


def seal(folder: Path, files: Mapping[str, Any], state: RunState) -> None:
    """Complete a checkpoint's folder, whose tensors are in `files` (name: digest), on the disk."""
    text = json.dumps(asdict(state), indent=1).encode()
    files = {**files, "state.json": write_durably(folder / "state.json", [text])}
    manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
    write_durably(folder / "manifest.json", [json.dumps(manifest, indent=1).encode()])
    fsync_folder(folder)


def load_model_weights(path: Path, model: SiT) -> None:
    """The checkpoint's weights into a model that is not yet sharded; strict."""
    load_weights(model, StoredTensors(path, WEIGHT), source=str(path))


def load_engine_state(path: Path, whole: Whole, state: RunState, world: World) -> list[str]:
    """Float32 masters, optimiser states, EMAs and generators into a started engine (collective).

    Returns lines that say which averages could not simply go on.
    """
    emas = whole.emas
    sources, said = resumed_emas(emas, stored_emas(state.emas, emas[0]), state.step)
    for kind, source in sources.items():
        since = state.optimizer_step if source == WEIGHT else state.ema_since.get(source, 0)
        whole.ema_since.update({kind: since} if since else {})
    for kind in whole.kinds:
        stored = StoredTensors(path, sources.get(kind, kind))
        for name in whole.params:
            whole.set(name, kind, stored[name])
    whole.release()
    whole.optimizer_step = state.optimizer_step
    rng = path / f"rng_rank_{world.rank:05d}.safetensors"
    if rng.exists():  # a rank that joined later starts its generators from the seed
        stored_rng = load_file(rng)
        torch.set_rng_state(stored_rng["cpu"])
        if "cuda" in stored_rng and world.device.type == "cuda":
            torch.cuda.set_rng_state(stored_rng["cuda"])
    return said


def load_ema_model(
    run: str | Path, device: torch.device, ema: str | None = None
) -> tuple[SiT, Config, RunState]:
    """The averaged model of a run's newest checkpoint, in eval mode, float32; `ema` names another
    average than the first.
    """
    run = Path(run)
    config = load_run_config(run)
    path = newest_checkpoint(run)
    if path is None:
        raise CheckpointError(f"{run}: no checkpoint yet (checkpoints/ is empty)")
    state = read_state(path)
    model = SiT.from_config(
        config, side=state.side, channels=state.channels, encoder_widths=state.encoder_widths
    )
    key = choose_ema(stored_emas(state.emas, config.training.ema[0]), ema, source=path)
    load_weights(model, StoredTensors(path, key), source=str(path))
    return model.to(device).eval(), config, state


def checkpoints(run: Path) -> list[Path]:
    """Every finished checkpoint folder, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step_*") if p.is_dir())


def superseded(run: Path, saved: Path, policy: TrainingConfig) -> list[Path]:
    """The checkpoints that the policy keeps no longer, now that `saved` is there.

    Kept are the newest `keep_checkpoints` (0: all), every `keep_every` steps, the best by
    `keep_best`, and `saved` itself. One with a file missing or cut short counts for none of these;
    steps after `saved` belong to a future that a resume undid, and are left alone.
    """
    if not policy.keep_checkpoints:
        return []
    past = [p for p in checkpoints(run) if p.name <= saved.name]
    sound = {p: read_state(p) for p in past if damage(p, contents=False) is None}
    kept = {saved, *list(sound)[-policy.keep_checkpoints :]}
    if policy.keep_every:
        kept |= {p for p, state in sound.items() if state.step % policy.keep_every == 0}
    if policy.keep_best:
        best = _best(sound, policy.keep_best)
        kept |= {best} if best else set()
    return [p for p in past if p not in kept]


def _best(found: Mapping[Path, RunState], rule: KeepBestConfig) -> Path | None:
    """The checkpoint whose last logged metric is the least or the greatest; the newer of equals."""
    sign = 1.0 if rule.mode == "max" else -1.0
    values = {p: state.metrics.get(rule.metric, math.nan) for p, state in found.items()}
    known = [p for p, value in values.items() if math.isfinite(value)]
    return max(known, key=lambda p: (sign * values[p], p.name), default=None)


def rng_state(world: World) -> dict[str, Tensor]:
    """Return the states of this rank's generators: uint8 [n] on the host, by device type."""
    out = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """Say what differs from the manifest, None where all is well; without `contents` sizes only."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} differs in size from its manifest"
            if contents and sha256_of(path) != expected["sha256"]:
                return f"{name} differs from its checksum"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        return f"manifest.json: {e}"
    return None


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one kind in a checkpoint, read one at a time from however many files."""

    def __init__(self, folder: Path, kind: str) -> None:
        stem = _stem(kind)
        paths = sorted(folder.glob(f"{stem}.safetensors")) + sorted(
            folder.glob(f"{stem}-*-of-*.safetensors")
        )
        if not paths:
            raise CheckpointError(f"{folder}: {stem}.safetensors is missing")
        self._file: dict[str, Any] = {}
        for path in paths:
            try:
                stored = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as e:
                raise CheckpointError(f"{path}: not readable ({e})") from None
            self._file.update(dict.fromkeys(stored.keys(), stored))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def part_name(kind: str, rank: int, size: int) -> str:
    """The file of one rank: ema.safetensors, or ema-00001-of-00004.safetensors."""
    part = "" if size == 1 else f"-{rank + 1:05d}-of-{size:05d}"
    return f"{_stem(kind)}{part}.safetensors"


def _stem(kind: str) -> str:
    return "weights" if kind == WEIGHT else kind
