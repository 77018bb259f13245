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
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from fastrepa.checkpoint.averages import named_emas, resumed_emas, stored_emas
from fastrepa.checkpoint.host_tensors import first_not_finite, write_durably
from fastrepa.checkpoint.kinds import KINDS, WEIGHT, Whole
from fastrepa.config import KeepBestConfig, TrainingConfig
from fastrepa.errors import CheckpointError, shown
from fastrepa.model.conversion import load_weights
from fastrepa.model.sit import SiT
from fastrepa.reading.tensors import SafeTensors, read_weights, reason
from fastrepa.reading.text import read_json
from fastrepa.runtime.files import fsync_folder, sha256_of
from fastrepa.runtime.world import World

FORMAT = 2
READABLE = (1, 2)  # 1: one file of each kind, written by the first rank
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Size = Annotated[int, Field(strict=True, ge=1, le=2**20)]
T = TypeVar("T")
TRIES = 5  # to read a checkpoint that the run may prune meanwhile
_NAME = re.compile(r"step_([0-9]{7}|[1-9][0-9]{7,18})")


@dataclass(frozen=True)
class RunState:
    """A checkpoint's facts beside its tensors (state.json)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: Count
    optimizer_step: Count
    samples_seen: Count
    side: Size
    channels: Size
    encoder_widths: list[Size]
    classes: list[str]
    world_size: Size
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # the last logged line
    emas: dict[str, Any] = field(default_factory=dict)  # kind -> 0.9999, {"sigma_rel": 0.05}, ...
    # Updates taken before an average began, if any.
    ema_since: dict[str, Count] = field(default_factory=dict)
    trained: list[Count] | None = None  # numbers of the classes that had images; None: not recorded
    num_samples: Count = 0  # of the data set; 0: not recorded
    data_digest: str = ""  # of its images and labels (DataSet.digest)
    threads: Count = 0  # of a rank's CPU, which sums as they are; 0: not recorded, or on a GPU
    format: int = FORMAT


_STATE = TypeAdapter(RunState)


class NotFinite(CheckpointError):
    """A checkpoint that holds a NaN or an infinity where none may be."""


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:07d}"


def step_number(path: Path) -> int | None:
    """Return the step that a checkpoint's name says; None where `checkpoint_path` makes no such."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else None


def checkpoints(run: Path, *, until: Path | None = None) -> list[Path]:
    """Every finished checkpoint folder, up to `until` where that is given, oldest first. Others'
    names, such as step_0000004_best, do not count.
    """
    last = math.inf if until is None else step_number(until) or 0
    paths = [p for p in (run / "checkpoints").glob("step_*") if p.is_dir()]
    found = {step: p for p in paths if (step := step_number(p)) is not None and step <= last}
    return [found[step] for step in sorted(found)]


def with_newest(run: Path, read: Callable[[Path], T]) -> T:
    """Return what `read` makes of the newest checkpoint whose files are as its manifest says.

    A damaged one, and one for which `read` raises NotFinite, is named in a warning and passed over
    for the one before it. While it is read the run may prune it: then the newest is taken again.
    Raises CheckpointError where none is good, and what else `read` raises.
    """
    for _ in range(TRIES):
        found = checkpoints(run)
        if not found:
            raise CheckpointError(f"{run}: no checkpoint yet (checkpoints/ is empty)")
        bad: list[str] = []
        for path in reversed(found):
            try:
                problem = damage(path)
                if problem is None:
                    return read(path)
                problem = f"{path.name} is damaged ({problem})"
            except NotFinite as e:
                problem = f"{path.name}: {str(e).removeprefix(f'{path}: ')}"
            except (CheckpointError, OSError):
                if path.is_dir():
                    raise
            if not path.is_dir():
                break
            bad.append(str(problem))
            if path != found[0]:
                warnings.warn(f"checkpoint {problem}; trying the one before", stacklevel=2)
        else:
            raise CheckpointError(f"{run / 'checkpoints'}: no undamaged checkpoint; {bad[0]}")
    raise CheckpointError(f"{path}: pruned before it could be read, and so were others before it")


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is undamaged and finite (`with_newest`); None: there is none at
    all.
    """

    def checked(path: Path) -> Path:
        for kind in (*KINDS, *read_state(path).emas):
            check_finite(path, kind, StoredTensors(path, kind))
        return path

    return with_newest(run, checked) if checkpoints(run) else None


def check_finite(source: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises NotFinite, naming the first tensor [...] that holds a NaN or an infinity."""
    if (name := first_not_finite(tensors)) is not None:
        raise NotFinite(f"{source}: {kind}: {name[:120]} is not finite")


def fingerprint(run: Path, step: int) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which has those of its files."""
    return sha256_of(checkpoint_path(run, step) / "manifest.json")


def read_state(path: Path) -> RunState:
    """Read state.json of a checkpoint folder; CheckpointError names what is wrong in it."""
    file = path / "state.json"
    fields = read_json(file, CheckpointError)
    if not _known_format(fields):
        raise CheckpointError(
            f"{path}: checkpoint format {shown(fields['format'])}, this version reads {READABLE}"
        )
    try:
        state = _STATE.validate_python(fields)
        named_emas(state.emas)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(str(part)[:80] for part in first["loc"]) or "emas"
        raise CheckpointError(f"{file}: not readable ({key}: {first['msg']})") from None
    except ValueError as e:
        raise CheckpointError(f"{file}: not readable (emas: {e})") from None
    return state


def _known_format(fields: Any) -> bool:
    return not isinstance(fields, dict) or fields.get("format", FORMAT) in READABLE


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
        for name, param in whole.params.items():
            shape = tuple(getattr(param, "ds_shape", param.shape))
            if name not in stored or tuple(stored[name].shape) != shape:
                raise CheckpointError(f"{path}: {kind} has no {name} {list(shape)}")
            whole.set(name, kind, stored[name])
    whole.release()
    whole.optimizer_step = state.optimizer_step
    rng = path / f"rng_rank_{world.rank:05d}.safetensors"
    if rng.exists():  # a rank that joined later starts its generators from the seed
        stored_rng = read_weights(rng, CheckpointError)
        try:
            torch.set_rng_state(stored_rng["cpu"])
            if "cuda" in stored_rng and world.device.type == "cuda":
                torch.cuda.set_rng_state(stored_rng["cuda"])
        except (KeyError, TypeError, RuntimeError) as e:
            raise CheckpointError(
                f"{rng}: not the states of torch's generators ({reason(e)})"
            ) from None
    return said


def superseded(run: Path, saved: Path, policy: TrainingConfig) -> list[Path]:
    """The checkpoints that the policy keeps no longer, now that `saved` is there.

    Kept are the newest `keep_checkpoints` (0: all), every `keep_every` steps, the best by
    `keep_best`, and `saved` itself. One with a file missing or cut short counts for none of these;
    steps after `saved` belong to a future that a resume undid, and are left alone.
    """
    if not policy.keep_checkpoints:
        return []
    past = checkpoints(run, until=saved)
    sound = {p: state for p in past if (state := _of_sound(p))}
    kept = {saved, *list(sound)[-policy.keep_checkpoints :]}
    if policy.keep_every:
        kept |= {p for p, state in sound.items() if state.step % policy.keep_every == 0}
    if policy.keep_best:
        best = _best(sound, policy.keep_best)
        kept |= {best} if best else set()
    return [p for p in past if p not in kept]


def improves(run: Path, step: int, scores: Mapping[str, float], rule: KeepBestConfig) -> bool:
    """Tell whether `scores`, measured at `step`, are better by `rule` than all that whole
    checkpoints up to there have; what is not finite is never.
    """
    value = scores.get(rule.metric, math.nan)
    past = checkpoints(run, until=checkpoint_path(run, step))
    sound = {p: state for p in past if (state := _of_sound(p))}
    best = _best(sound, rule)
    if best is None or not math.isfinite(value):
        return math.isfinite(value)
    before = sound[best].metrics[rule.metric]
    return value > before if rule.mode == "max" else value < before


def _of_sound(path: Path) -> RunState | None:
    """Read the state of a checkpoint that this version can read and that has all its files."""
    try:
        return read_state(path) if damage(path, contents=False) is None else None
    except CheckpointError:  # of a later version
        return None


def stranger(path: Path) -> str | None:
    """Say why a folder may hold anything that its run did not write there, None where it does not.

    All of it must be files that its manifest lists, and state.json, as far as it can be read, of
    this version and of the step that the folder has its name from.
    """
    if path.is_symlink():
        return "it is a link"
    try:
        manifest = read_json(path / "manifest.json", CheckpointError)
        listed = {*manifest["files"], "manifest.json"}
    except (CheckpointError, KeyError, TypeError):
        return "its manifest.json does not say what is in it"
    try:
        there = sorted(path.iterdir())
    except OSError as e:
        return e.strerror
    if others := [p.name for p in there if p.name not in listed or not p.is_file()]:
        return f"{others[0]} in it is none of its files"
    try:
        state = read_json(path / "state.json", CheckpointError)
    except CheckpointError:
        return None  # its own, and damaged
    if not _known_format(state):
        return "it is of another version"
    return _other_step(path, state)


def _other_step(path: Path, state: Any) -> str | None:
    """Say that a checkpoint, whose state.json holds `state`, has the name of another step."""
    step, named = state.get("step") if isinstance(state, dict) else None, step_number(path)
    if None in (step, named) or step == named:
        return None
    return f"state.json is of step {shown(step)}"


def _best(found: Mapping[Path, RunState], rule: KeepBestConfig) -> Path | None:
    """The checkpoint whose last logged metric is the least or the greatest; the newer of equals."""
    sign = 1.0 if rule.mode == "max" else -1.0
    values = {p: state.metrics.get(rule.metric, math.nan) for p, state in found.items()}
    known = [p for p, value in values.items() if math.isfinite(value)]
    return max(known, key=lambda p: (sign * values[p], found[p].step), default=None)


def best_checkpoint(run: Path, rule: KeepBestConfig) -> Path | None:
    """A run's best checkpoint by `rule`; None where none that is whole has the metric."""
    found = {p: state for p in checkpoints(run) if (state := _of_sound(p))}
    return _best(found, rule)


def rng_state(world: World) -> dict[str, Tensor]:
    """Return the states of this rank's generators: uint8 [n] on the host, by device type."""
    out = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """Say what differs from the manifest, None where all is well; without `contents` sizes only.

    The manifest lists every file that is read of a checkpoint, or what is not listed could be
    anything. Files that change after this look are not noticed; they can give other numbers, and no
    more than that.
    """
    try:
        manifest = read_json(folder / "manifest.json", CheckpointError)
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or not files:
            return "manifest.json lists no files"
        for name, expected in files.items():
            if problem := _difference(folder, name, expected, contents):
                return problem
        return _unlisted(folder, files)
    except CheckpointError as e:
        return str(e).removeprefix(f"{folder}/")
    except OSError as e:
        return f"{e.filename or folder}: {e.strerror or e}"


def _difference(folder: Path, name: str, expected: Any, contents: bool) -> str | None:
    """Say how a file of the manifest is not what is written there of it."""
    if Path(name).name != name or not name.isprintable():
        return f"manifest.json names {name[:80]!r}, which is no file of this folder"
    size, digest = (
        (expected.get("bytes"), expected.get("sha256")) if isinstance(expected, dict) else (0, 0)
    )
    if type(size) is not int or not isinstance(digest, str):
        return f"manifest.json: {name} has no bytes and sha256"
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} differs in size from its manifest"
    if contents and sha256_of(path) != digest:
        return f"{name} differs from its checksum"
    return None


def _unlisted(folder: Path, files: Mapping[str, Any]) -> str | None:
    """Say which file of a checkpoint is not in its manifest, or not there at all."""
    if "state.json" not in files:
        return "manifest.json leaves out state.json"
    fields = read_json(folder / "state.json", CheckpointError)
    if not _known_format(fields):
        return None  # whole, and of a later version, which read_state says
    if other := _other_step(folder, fields):
        return other
    for kind in (*KINDS, *read_state(folder).emas):
        names = [path.name for path in _paths(folder, kind)]
        whole = [part_name(kind, rank, len(names)) for rank in range(len(names))]
        if not names or names != whole:
            return f"{(names or [part_name(kind, 0, 1)])[0]}: not all of its parts are there"
        if left := next((name for name in names if name not in files), None):
            return f"manifest.json leaves out {left}"
    return None


def _paths(folder: Path, kind: str) -> list[Path]:
    """Return the files of one kind: one, or a part of each rank."""
    stem = _stem(kind)
    return sorted(folder.glob(f"{stem}.safetensors")) + sorted(
        folder.glob(f"{stem}-*-of-*.safetensors")
    )


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one kind in a checkpoint, read one at a time from however many files."""

    def __init__(self, folder: Path, kind: str) -> None:
        paths = _paths(folder, kind)
        if not paths:
            raise CheckpointError(f"{folder}: {part_name(kind, 0, 1)} is missing")
        self.folder = folder
        self._file: dict[str, SafeTensors] = {}
        for path in paths:
            stored = SafeTensors(path, CheckpointError)
            self._file.update(dict.fromkeys(stored, stored))

    def __getitem__(self, name: str) -> Tensor:
        return self._file[name][name]

    def __contains__(self, name: object) -> bool:
        return name in self._file

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
