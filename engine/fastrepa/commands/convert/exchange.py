"""Runs to other people's files and back: `fastrepa convert`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastrepa.checkpoint.averages import choose_ema, stored_emas
from fastrepa.checkpoint.choice import Step, export_state, is_export, read_export, with_chosen
from fastrepa.checkpoint.format import (
    RunState,
    StoredTensors,
    check_finite,
    checkpoint_path,
    checkpoints,
    part_name,
    read_state,
    seal,
)
from fastrepa.checkpoint.host_tensors import HostTensors, write_durably
from fastrepa.checkpoint.kinds import KINDS, WEIGHT
from fastrepa.commands.convert.diffusers_folder import write_folder
from fastrepa.commands.convert.posthoc import posthoc_ema
from fastrepa.commands.convert.reference_args import (
    Shape,
    config_of,
    disagreements,
    misfits,
    read_shape,
)
from fastrepa.commands.convert.zero_format import read_zero, write_zero
from fastrepa.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    config_from_dict,
    load_config,
    load_run_config,
    overridden,
    run_folder,
    save_config,
)
from fastrepa.config.loading import SAVED
from fastrepa.data.datasets import open_data, with_classes
from fastrepa.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    print_warning,
    worded,
    writing,
)
from fastrepa.model.conversion import check_weights, load_reference, save_reference
from fastrepa.model.sit import SiT
from fastrepa.reading.tensors import SafeTensors
from fastrepa.runtime.files import aside, fsync_folder, sweep
from fastrepa.runtime.ownership import owned
from fastrepa.training.telemetry import versions

FORMATS = ("reference", "safetensors", "zero", "diffusers")
SOURCES = ("reference", "zero")
Beside = Callable[[Path, Config, RunState], None]
ONE_AVERAGE = ("safetensors", "diffusers")  # what has the weights of one model


def export_run(
    run: Path,
    out: Path,
    to: str,
    *,
    weights: str = "ema",
    ema: str | None = None,
    ema_sigma_rel: float | None = None,
    step: Step = None,
    overrides: Sequence[str] = (),
    beside: Beside | None = None,
) -> RunState:
    """A run's checkpoint, by default the newest good one, as one new file or, for zero, a new
    folder.

    reference: {model, ema, opt, args, steps}, which REPA's own scripts load and continue.
    safetensors: the averaged weights (`weights` "raw": the trained ones), with the step and the
    resolved configuration as metadata. `ema` names another average than the first for these two;
    `ema_sigma_rel` makes one that was never stored (posthoc.py).
    zero: a universal checkpoint of DeepSpeed's (zero_format.py), with every average.
    diffusers: a folder that diffusers loads (diffusers_folder.py), of the same weights as
    safetensors; `beside` may write more into it.
    `run` may be an export (checkpoint/choice.py), whose weights become a reference's file without
    moments, or a folder for diffusers. Raises FastrepaError; an existing file is never replaced.
    """
    _check_asked(out, to, weights, ema, ema_sigma_rel)
    _check_new(out)
    if is_export(run):
        if weights == "raw" or (ema, ema_sigma_rel, step) != (None, None, None):
            raise ConfigError(
                f"{run}: holds one set of weights; leave --weights, --ema, --ema-sigma-rel and "
                f"--step out"
            )
        return _hand_on(run, out, to, overrides, beside)
    config = load_run_config(run_folder(run), overrides)
    with owned(out.parent, "fastrepa convert", CheckpointError, file=out.name):
        _check_new(out)
        path, state, kinds, chosen, name = with_chosen(
            run,
            step,
            config,
            lambda path: _opened(path, config, to, weights, ema, ema_sigma_rel),
        )
        try:
            if to == "zero":
                with aside(out) as partial:
                    write_zero(partial, kinds, config, state)
                return state
            order = list(_empty_model(config, state).state_dict())
            raw, averaged = ({n: kinds[k][n] for n in order} for k in (WEIGHT, chosen))
            if ema_sigma_rel is not None:
                averaged, missed = posthoc_ema(run_folder(run), path, ema_sigma_rel)
                check_finite(path, "ema", averaged)
                name = (
                    f"sigma_rel={ema_sigma_rel} after training, {missed:.2%} of its profile missing"
                )
            if weights == "raw" and to in ONE_AVERAGE:
                averaged = raw
            if to == "diffusers":
                which = name if weights == "ema" else weights
                with aside(out) as partial:
                    write_folder(partial, averaged, config, state, which)
                    if beside is not None:
                        beside(partial, config, state)
                return state
            opt = None
            if to == "reference":
                opt = _adamw_state(config.training.optimizer, raw, kinds, state)
            save_reference(
                out,
                model=raw,
                ema=averaged,
                steps=state.step,
                opt=opt,
                args=_reference_args(config),
                metadata={
                    "weights": weights,
                    "ema": name,
                    "step": str(state.step),
                    "config": config.model_dump_json(),
                    "classes": json.dumps(state.classes),
                    "trained": json.dumps(state.trained),
                    **state.versions,
                },
            )
        except (OSError, RuntimeError, SafetensorError) as e:
            raise CheckpointError(f"{out}: cannot be written ({worded(e)})") from None
    return state


def _hand_on(
    export: Path, out: Path, to: str, overrides: Sequence[str], beside: Beside | None
) -> RunState:
    """An export as a file of another kind."""
    if to not in ("reference", "diffusers"):
        raise ConfigError(
            f"--to: {to}, but {export} holds weights alone: reference, diffusers, hub"
        )
    about, tree, stored = read_export(export)
    config = config_from_dict(overridden(tree, overrides), source=str(export))
    state = export_state(export, about, stored, config)
    check_finite(export, about["weights"], stored)
    check_weights(_empty_model(config, state), stored, source=str(export))
    with owned(out.parent, "fastrepa convert", CheckpointError, file=out.name):
        _check_new(out)
        try:
            if to == "reference":
                whole, args = dict(stored), _reference_args(config)
                save_reference(out, model=whole, ema=whole, steps=state.step, args=args)
                return state
            which = about["ema"] if about["weights"] == "ema" else about["weights"]
            with aside(out) as partial:
                write_folder(partial, stored, config, state, which)
                if beside is not None:
                    beside(partial, config, state)
        except (OSError, RuntimeError, SafetensorError) as e:
            raise CheckpointError(f"{out}: cannot be written ({worded(e)})") from None
    return state


def _check_asked(
    out: Path, to: str, weights: str, ema: str | None, ema_sigma_rel: float | None
) -> None:
    """Raises ConfigError for options that are not allowed, or not together."""
    if to not in FORMATS:
        raise ConfigError(f"--to: {to!r} is not one of {', '.join(FORMATS)}, hub")
    if weights not in ("ema", "raw"):
        raise ConfigError(f"--weights: {weights!r} is not one of ema, raw")
    if to == "zero" and (ema is not None or ema_sigma_rel is not None):
        raise ConfigError("--ema: a zero folder has every stored average; leave it out")
    if ema_sigma_rel is not None:
        if ema is not None or weights == "raw":
            raise ConfigError("--ema-sigma-rel: is an average of its own; leave the others out")
        if not 0 < ema_sigma_rel <= 0.28:
            raise ConfigError(f"--ema-sigma-rel: {ema_sigma_rel} is not above 0 and at most 0.28")
    suffixes = {"safetensors": (".safetensors",), "reference": (".pt", ".pth")}.get(to, ())
    if suffixes and out.suffix not in suffixes:
        raise ConfigError(f"{out}: a {to} file is called *{' or *'.join(suffixes)}")


def _check_new(out: Path) -> None:
    """Raises CheckpointError for what is there, be it a link, and for a name that cannot be."""
    with writing(out, CheckpointError), suppress(FileNotFoundError):
        out.lstat()
        raise CheckpointError(f"{out}: exists already; name another file")


def _opened(
    path: Path, config: Config, to: str, weights: str, ema: str | None, ema_sigma_rel: float | None
) -> tuple[Path, RunState, dict[str, StoredTensors], str, str]:
    """Return (`path`, its state, its tensors by kind, the average that is asked for and its name),
    once what goes to others has been found finite. Files stay readable though the run prunes them.
    """
    state = read_state(path)
    stored = stored_emas(state.emas, config.training.ema[0])
    chosen = choose_ema(stored, ema, source=path)
    kinds = {kind: StoredTensors(path, kind) for kind in (*KINDS, *stored)}
    needed = {"zero": [*kinds], "reference": [*KINDS, chosen]}.get(to, [chosen])
    if ema_sigma_rel is not None:
        needed += [WEIGHT, *stored]
    elif weights == "raw" and to in ONE_AVERAGE:
        needed = [WEIGHT]
    for kind in dict.fromkeys(needed):
        check_finite(path, kind, kinds[kind])
    return path, state, kinds, chosen, str(stored[chosen])


def import_reference(
    file: Path,
    run: Path,
    config: Path | None = None,
    *,
    source: str = "reference",
    overrides: Sequence[str] = (),
) -> RunState:
    """A foreign file as the first checkpoint of a run, which `fastrepa train` then continues.

    reference: a .pt of REPA's, a bare state dict or safetensors, which starts at step 0 with fresh
    moments. zero: a checkpoint folder of DeepSpeed's (zero_format.py). The run folder has a
    config.yaml, or gets the one named or else what the file's own arguments say; `overrides` are
    on top of these. Raises FastrepaError naming the file, or the first tensor that does not fit.
    """
    if source not in SOURCES:
        raise ConfigError(f"--from: {source!r} is not one of {', '.join(SOURCES)}")
    given = None if config is None else with_classes(load_config(config, overrides, run=run))
    _check_unused(run, given)
    read = read_zero(file) if source == "zero" else load_reference(file)
    shape = read_shape(read.model, file)
    resolved, told = (
        (given, False) if given else _found_config(read.args, shape, file, run, overrides)
    )
    for words in () if told else disagreements(read.args, resolved):
        print_warning(f"{file}: {words}; the configuration is taken")
    begun = ("ema",) if read.optimizer_step else ()  # no power function from the start
    state = RunState(
        step=read.steps,
        optimizer_step=read.optimizer_step,
        samples_seen=read.steps * resolved.training.global_batch,
        side=shape.side,
        channels=shape.channels,
        encoder_widths=shape.encoder_widths,
        classes=_classes(resolved.data),
        trained=list(range(resolved.model.num_classes)),  # of a set that is not known
        world_size=1,
        versions=versions(),
        emas=read.record,
        ema_since=read.ema_since if read.record else dict.fromkeys(begun, read.optimizer_step),
    )
    if resolved.model.patch != shape.patch:
        raise CheckpointError(f"{file}: another architecture; {misfits(shape, resolved)}")
    model = _empty_model(resolved, state)
    try:
        for tensors in (read.model, read.ema, *read.emas.values()):
            check_weights(model, tensors, source=str(file))
    except CheckpointError as e:
        raise CheckpointError(f"{e}; {misfits(shape, resolved)}") from None
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    zeros = {n: torch.zeros_like(read.model[n], dtype=torch.float32) for n in trained}
    kinds: dict[str, Mapping[str, Tensor]] = {
        "weight": read.model,
        "ema": read.ema,
        **read.emas,
        "exp_avg": zeros | read.exp_avg,
        "exp_avg_sq": zeros | read.exp_avg_sq,
    }
    for kind, values in kinds.items():
        check_finite(file, kind, values)
    final = checkpoint_path(run, state.step)
    with owned(run, "fastrepa convert", CheckpointError), writing(final, CheckpointError):
        _check_unused(run, given)
        sweep(final.parent)
        with aside(final) as partial:
            partial.mkdir(parents=True, exist_ok=True)
            digests = {}
            for kind, values in kinds.items():
                host = HostTensors({n: tuple(t.shape) for n, t in values.items()}, pin=False)
                for name, value in values.items():
                    host.put(name, value)
                name = part_name(kind, 0, 1)
                digests[name] = write_durably(partial / name, host.file_chunks())
            seal(partial, digests, state)
            if not (run / SAVED).exists():
                save_config(resolved, run / SAVED)
        fsync_folder(final.parent)
    return state


def _found_config(
    args: Mapping[str, Any], shape: Shape, file: Path, run: Path, overrides: Sequence[str]
) -> tuple[Config, bool]:
    """Return (the configuration of a call without --config, whether the file's arguments say it).

    A run's own counts before the file's arguments. Raises ConfigError where there is none.
    """
    own = with_classes(load_run_config(run)) if (run / SAVED).exists() else None
    if own is not None and not overrides:
        return own, False
    told: Config | None = None
    if args:
        told = config_of(args, shape, file, run, overrides)
    elif is_export(file) and "config" in SafeTensors(file, CheckpointError).metadata:
        tree = {**read_export(file)[1], "run": str(run)}
        told = config_from_dict(overridden(tree, overrides), source=str(file))
    elif own is None:
        raise ConfigError(f"--config is needed: {file} has no args; it is {shape}")
    if own not in (None, told):  # unless of this very call, killed
        raise ConfigError(f"{overrides[0]}: {run} has a {SAVED} of its own; change it there")
    assert told is not None
    return told, True


def _check_unused(run: Path, config: Config | None) -> None:
    """Raises FastrepaError for a run that has begun, or another configuration of it."""
    if checkpoints(run):
        raise CheckpointError(f"{run}: has checkpoints already; name a new run folder")
    if config is None or not (run / SAVED).exists():
        return
    # Of this very call, killed before its checkpoint had its name: it goes on.
    if load_run_config(run) != config:
        raise ConfigError(f"--config: {run} has a config.yaml already; leave one of them out")


def _empty_model(config: Config, state: RunState) -> SiT:
    """Build the model on the meta device, for its names, shapes and their order."""
    with torch.device("meta"):
        return SiT.from_config(
            config, side=state.side, channels=state.channels, encoder_widths=state.encoder_widths
        )


def _classes(config: DataConfig) -> list[str]:
    """The data set's class names where it is here; sampling by number works without."""
    try:
        return list(open_data(config.path, resolution=config.resolution).classes)
    except DataError:
        return []


def _adamw_state(
    optimizer: OptimizerConfig,
    raw: Mapping[str, Tensor],
    kinds: Mapping[str, StoredTensors],
    state: RunState,
) -> dict[str, Any]:
    """The state dict of torch's own AdamW over every parameter, as the reference makes it."""
    params = {name: nn.Parameter(value, requires_grad=False) for name, value in raw.items()}
    adamw = torch.optim.AdamW(
        params.values(),
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    for name in kinds["exp_avg"]:
        adamw.state[params[name]] = {
            "step": torch.tensor(float(state.optimizer_step)),
            "exp_avg": kinds["exp_avg"][name],
            "exp_avg_sq": kinds["exp_avg_sq"][name],
        }
    return adamw.state_dict()


def _reference_args(config: Config) -> argparse.Namespace:
    """The reference's command-line arguments, as far as this configuration determines them."""
    m, t, o = config.model, config.training, config.training.optimizer
    return argparse.Namespace(
        model=m.name or f"SiT width {m.width} depth {m.depth} heads {m.heads} patch {m.patch}",
        num_classes=m.num_classes,
        encoder_depth=config.alignment.block,
        qk_norm=m.qk_norm,
        resolution=config.data.resolution,
        batch_size=t.global_batch,
        max_train_steps=t.steps,
        learning_rate=o.lr,
        adam_beta1=o.betas[0],
        adam_beta2=o.betas[1],
        adam_weight_decay=o.weight_decay,
        adam_epsilon=o.eps,
        max_grad_norm=t.clip,
        seed=config.seed,
        path_type=config.objective.path,
        prediction="v" if config.objective.prediction == "velocity" else "x",
        cfg_prob=m.label_dropout,
        enc_type=",".join(e.name for e in config.vision.encoders) or None,
        proj_coeff=config.alignment.weight,
        weighting=config.objective.time,
    )
