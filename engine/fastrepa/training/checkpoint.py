"""Checkpoints: whole float32 tensors in safetensors files, and how a run finds its newest good one.

    checkpoints/step_0000500/
        weights.safetensors  ema.safetensors         every tensor, by the reference's names
        exp_avg.safetensors  exp_avg_sq.safetensors  the trained ones only
        rng_rank_00000.safetensors                   torch's generators of every rank
        state.json                                   step, data position, what the model is
        manifest.json                                bytes and SHA-256 of all of these

Nothing is pickled. A checkpoint is written in a temporary folder, flushed to disk and renamed, so
that a folder called step_* is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrepa.config import Config, load_config
from fastrepa.errors import CheckpointError, ConfigError
from fastrepa.model.conversion import load_weights
from fastrepa.model.sit import SiT
from fastrepa.training.ema import STATES
from fastrepa.training.zero import KINDS, WEIGHT, WholeTensors, World

FORMAT = 1
FILES = {WEIGHT: "weights.safetensors", **{k: f"{k}.safetensors" for k in STATES}}


@dataclass(frozen=True)
class RunState:
    """What a checkpoint says beside its tensors (state.json)."""

    step: int
    optimizer_step: int
    samples_seen: int
    side: int
    channels: int
    encoder_widths: list[int]
    classes: list[str]
    world_size: int
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:07d}"


def save_checkpoint(
    run: Path,
    whole: WholeTensors,
    fixed: Mapping[str, Tensor],
    state: RunState,
    world: World,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint (collective). `fixed` are the tensors that are not trained, by name.

    `keep` newest ones stay (0: all). Raises CheckpointError naming the folder where it cannot be
    written; whatever was saved before stays as it is.
    """
    final = checkpoint_path(run, state.step)
    partial = final.with_name(f".partial_{final.name}")
    try:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        save_file(_rng_state(world), partial / f"rng_rank_{world.rank:05d}.safetensors")
        for kind in KINDS:
            tensors = {} if kind in ("exp_avg", "exp_avg_sq") else dict(fixed)
            for name in whole.params:
                value = whole.get(name, kind)
                if world.is_first:
                    tensors[name] = value.float().cpu().contiguous()
            if world.is_first:
                save_file(tensors, partial / FILES[kind])
        dist.barrier()
        if world.is_first:
            (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
            _write_manifest(partial)
            _flush(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _flush_folder(final.parent)
            if keep:
                for old in _checkpoints(run)[:-keep]:
                    shutil.rmtree(old)
        dist.barrier()
    except (OSError, SafetensorError) as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written ({e}); earlier ones are intact"
        ) from None
    return final


def newest_checkpoint(run: Path, *, verify: bool = True) -> Path | None:
    """The newest checkpoint whose files are as its manifest says, None where there is none at all.

    A damaged one is named in a warning and passed over for the one before it; CheckpointError where
    every one is damaged.
    """
    found = _checkpoints(run)
    problem = None
    for path in reversed(found):
        problem = _damage(path) if verify else None
        if problem is None:
            return path
        warnings.warn(
            f"checkpoint {path.name} is damaged ({problem}); trying the one before", stacklevel=2
        )
    if found:
        raise CheckpointError(f"{run / 'checkpoints'}: no undamaged checkpoint ({problem})")
    return None


def read_state(path: Path) -> RunState:
    """state.json of a checkpoint folder."""
    try:
        fields = json.loads((path / "state.json").read_text())
        state = RunState(**fields)
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{path / 'state.json'}: not readable ({e})") from None
    if state.format != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {state.format}, this version reads format {FORMAT}"
        )
    return state


def load_model_weights(path: Path, model: SiT) -> None:
    """The checkpoint's weights into a model that is not yet sharded; strict."""
    load_weights(model, load_file(path / FILES[WEIGHT]), source=str(path))


def load_engine_state(path: Path, whole: WholeTensors, state: RunState, world: World) -> None:
    """Float32 masters, optimiser states, EMA and generators into a started engine (collective)."""
    for kind in KINDS:
        with safe_open(path / FILES[kind], framework="pt") as stored:
            for name in whole.params:
                whole.set(name, kind, stored.get_tensor(name))
    whole.optimizer_step = state.optimizer_step
    rng = path / f"rng_rank_{world.rank:05d}.safetensors"
    if rng.exists():  # a rank that joined later starts its generators from the seed
        stored_rng = load_file(rng)
        torch.set_rng_state(stored_rng["cpu"])
        if "cuda" in stored_rng and world.device.type == "cuda":
            torch.cuda.set_rng_state(stored_rng["cuda"])


def load_ema_model(run: str | Path, device: torch.device) -> tuple[SiT, Config, RunState]:
    """The averaged model of a run's newest checkpoint, in eval mode, float32."""
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: not a run folder (no config.yaml)")
    path = newest_checkpoint(run)
    if path is None:
        raise CheckpointError(f"{run}: no checkpoint yet (checkpoints/ is empty)")
    config, state = load_config(run / "config.yaml"), read_state(path)
    model = SiT.from_config(
        config, side=state.side, channels=state.channels, encoder_widths=state.encoder_widths
    )
    load_weights(model, load_file(path / FILES["ema"]), source=str(path))
    return model.to(device).eval(), config, state


def ema_model(
    config: Config, whole: WholeTensors, fixed: Mapping[str, Tensor], state: RunState, world: World
) -> SiT:
    """The averaged model of a running engine, on every rank, in eval mode (collective)."""
    with torch.device("meta"):
        model = SiT.from_config(
            config, side=state.side, channels=state.channels, encoder_widths=state.encoder_widths
        )
    averaged = dict(fixed) | {name: whole.get(name, "ema").clone() for name in whole.params}
    model.load_state_dict(averaged, strict=True, assign=True)
    return model.to(world.device).eval()


def _checkpoints(run: Path) -> list[Path]:
    return sorted(p for p in (run / "checkpoints").glob("step_*") if p.is_dir())


def _rng_state(world: World) -> dict[str, Tensor]:
    out = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as f:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(f, "sha256").hexdigest(),
        }


def _write_manifest(folder: Path) -> None:
    files = {p.name: _digest(p) for p in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def _damage(folder: Path) -> str | None:
    """What differs from the manifest, None where all is well."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name, expected in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _digest(folder / name) != expected:
                return f"{name} differs from its checksum"
    except (OSError, ValueError, KeyError, AttributeError) as e:
        return f"manifest.json: {e}"
    return None


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as f:
            os.fsync(f.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
