"""DeepSpeed's checkpoint folders: the universal one written, that and ZeRO's own partitions read.

    OUT/latest_universal, latest                     the name of the folder below
    OUT/global_step500/
        zero/<parameter>/fp32.pt exp_avg.pt exp_avg_sq.pt step.pt     {"param": the whole tensor}
        zero/optimizer_state.pt                      the parameter group's settings
        mp_rank_00_model_states.pt                   the module's state dict, counters, "fastrepa"
        zero_pp_rank_0_mp_rank_00_model_states.pt    the same without weights, where stage 3 looks
        ema.safetensors, ...                         whole averages, which DeepSpeed has no room for

Universal, because a plain ZeRO checkpoint is cut for one stage and one number of ranks: an engine
of stages 1 to 3 with `"checkpoint": {"load_universal": true}` in its configuration loads this one
on any number, with optimiser states. Without the setting stages 0 to 2 load its weights alone
(load_module_only=True). Tried with DeepSpeed 0.19.8.

Everything is read as tensors alone (reading/tensors.py); beyond containers only the four plain
classes are let through that DeepSpeed itself writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastrepa.checkpoint.averages import named_emas
from fastrepa.checkpoint.format import RunState, StoredTensors
from fastrepa.checkpoint.kinds import EMA, MOMENTS, WEIGHT
from fastrepa.config import Config
from fastrepa.errors import CheckpointError
from fastrepa.model.conversion import Reference
from fastrepa.reading.tensors import read_weights, reason, state_dict, whole_number
from fastrepa.runtime.progress import counted

RECORD = "fastrepa"  # of ours among DeepSpeed's keys; load_checkpoint returns it as client state
STATES = ("fp32", *MOMENTS)  # DeepSpeed's names


def write_zero(
    folder: Path, kinds: Mapping[str, StoredTensors], config: Config, state: RunState
) -> None:
    """A universal checkpoint in a new folder. Raises OSError."""
    from deepspeed import __version__

    tag = folder / f"global_step{state.step}"
    tag.mkdir(parents=True)
    step = torch.tensor(float(state.optimizer_step))
    weights, trained = kinds[WEIGHT], kinds[MOMENTS[0]]
    for name in counted(weights, "writing"):
        to = tag / "zero" / name
        to.mkdir(parents=True)
        _save({"param": weights[name]}, to / "fp32.pt")
        if name in trained:
            for kind in MOMENTS:
                _save({"param": kinds[kind][name]}, to / f"{kind}.pt")
            _save(step, to / "step.pt")
    o = config.training.optimizer
    group = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    of_stage_3 = {"state": {0: {"step": step}}, "param_groups": [group]}
    _save(
        {
            "param_groups": [group],
            "optimizer_state_dict": of_stage_3,
            "clip_grad": config.training.clip,
            "ds_version": __version__,
        },
        tag / "zero" / "optimizer_state.pt",
    )
    common = {
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{n: tuple(trained[n].shape) for n in trained}],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": state.step - state.optimizer_step,
        "global_steps": state.step,
        "global_samples": state.samples_seen,
        "dp_world_size": state.world_size,
        "mp_world_size": 1,
        "ds_version": __version__,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        RECORD: asdict(state) | {"config": config.model_dump(mode="json")},
    }
    _save({"module": dict(weights), **common}, tag / "mp_rank_00_model_states.pt")
    _save({"module": {}, **common}, tag / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for kind, tensors in kinds.items():
        if kind.startswith(EMA):
            save_file(dict(tensors), tag / f"{kind}.safetensors", metadata={"format": "pt"})
    for latest in ("latest_universal", "latest"):
        (folder / latest).write_text(tag.name)


def _save(value: Any, path: Path) -> None:
    with path.open("wb") as file:  # torch's own way to a file loses why it failed
        torch.save(value, file)


def read_zero(folder: Path) -> Reference:
    """A DeepSpeed checkpoint: universal, or the partitions of stages 1 to 3 from any number of
    ranks. `folder` is what save_checkpoint was given, or one step's folder in it.

    Raises CheckpointError naming the file.
    """
    tag = _tag(folder)
    models = sorted(tag.glob("*_model_states.pt"), key=_rank)
    if not models:
        raise CheckpointError(f"{folder}: no DeepSpeed checkpoint (no *_model_states.pt)")
    whole = tag / "mp_rank_00_model_states.pt"
    main = _load(whole if whole in models else models[0])
    partitions = sorted(tag.glob("*_optim_states.pt"), key=_rank)
    try:
        if main["mp_world_size"] != 1 or any("mp_rank_00" not in f.name for f in models):
            raise CheckpointError(f"{tag}: tensor or pipeline parallel, which no SiT of ours is")
        if (tag / "zero").is_dir():
            states, step = _read_universal(tag / "zero", _shapes(main))
        elif partitions:
            states, step = _read_partitions(main, partitions)
        else:
            raise CheckpointError(
                f"{tag}: no ZeRO states in it (no zero/, no *_optim_states.pt): stage 0 has none"
            )
        fixed = _fixed(main, [_load(f) for f in models if f.name.startswith("zero_pp")])
        record = _record(main)
        weights = {n: v.detach().float() for n, v in fixed.items()} | states["fp32"]
        averages = {}
        if record:  # one of ours
            kinds = record["emas"] or (EMA,)
            averages = {kind: _load(tag / f"{kind}.safetensors") for kind in kinds}
        moments = {k: {n: v for n, v in states[k].items() if n not in fixed} for k in MOMENTS}
        weights = state_dict(weights, tag, CheckpointError)
        return Reference(
            weights,
            averages.pop(EMA, weights),
            **{k: state_dict(m, tag, CheckpointError) if m else m for k, m in moments.items()},
            optimizer_step=step,
            steps=_count(main["global_steps"], f"{tag}: global_steps"),
            emas=averages,
            record=record.get("emas", {}),
            ema_since=record.get("ema_since", {}),
        )
    except CheckpointError:
        raise
    except Exception as e:  # the values are of whatever kinds the files have
        raise CheckpointError(
            f"{tag}: not a DeepSpeed checkpoint that is known ({type(e).__name__}: {reason(e)})"
        ) from None


def _read_universal(
    zero: Path, shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Return (whole tensors by state and parameter, updates taken)."""
    states: dict[str, dict[str, Tensor]] = {key: {} for key in STATES}
    step = _load(zero / "optimizer_state.pt")
    count = step.get("optimizer_state_dict", {}).get("state", {}).get(0, {}).get("step", 0)
    for parameter in counted(sorted(p for p in zero.iterdir() if p.is_dir()), "reading"):
        for key in STATES:
            if (parameter / f"{key}.pt").is_file():
                value = _load(parameter / f"{key}.pt")
                value = value["param"] if isinstance(value, dict) else value
                # Flat where it was made of stage 3; what is not trained has no shape of its own.
                shape = shapes.get(parameter.name, value.shape)
                states[key][parameter.name] = value.detach().view(shape)
        if (parameter / "step.pt").is_file():
            count = _load(parameter / "step.pt")
    return states, _count(count, f"{zero}: step")


def _read_partitions(
    main: Mapping[str, Any], files: list[Path]
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Return the same of ZeRO's own files, one per rank: flat, laid end to end as the ranks are."""
    shapes = _shapes(main)
    pieces: dict[str, dict[str, list[Tensor]]] = {key: {n: [] for n in shapes} for key in STATES}
    step: Any = 0
    for file in counted(files, "reading"):
        stored = _load(file)["optimizer_state_dict"]
        third = "fp32_flat_groups" in stored
        weights = stored["fp32_flat_groups" if third else "single_partition_of_fp32_groups"]
        base = stored["optimizer_state_dict" if third else "base_optimizer_state"]["state"]
        for number, flat in enumerate(weights):
            step = base[number].get("step", step)
            tensors = {"fp32": flat, **{key: base[number][key] for key in MOMENTS}}
            if third:
                spans = _spans_of_stage_3(main["param_shapes"][number], len(files))
            else:
                mapping = stored["param_slice_mappings"][number]
                spans = {n: (a.start, a.numel) for n, a in mapping.items()}
            for key, tensor in tensors.items():
                for name, (start, numel) in spans.items():
                    pieces[key][name].append(tensor.detach()[start : start + numel])
    states = {
        key: {n: torch.cat(p)[: shapes[n].numel()].view(shapes[n]) for n, p in named.items()}
        for key, named in pieces.items()
    }
    return states, _count(step, f"{files[-1]}: step")


def _shapes(main: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return the shape of every trained parameter."""
    return {n: torch.Size(s) for group in main["param_shapes"] for n, s in group.items()}


def _spans_of_stage_3(
    shapes: Mapping[str, tuple[int, ...]], ranks: int
) -> dict[str, tuple[int, int]]:
    """Return where a parameter lies in a rank's flat group: stage 3 cuts every one by itself."""
    spans, start = {}, 0
    for name, shape in shapes.items():
        numel = -(-torch.Size(shape).numel() // ranks)
        spans[name] = (start, numel)
        start += numel
    return spans


def _fixed(main: Mapping[str, Any], ranks: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return what is in the module and was not trained; stage 3 has cut that too."""
    trained = _shapes(main).keys()
    buffers = set(main["buffer_names"])
    fixed = {
        n: v for n, v in main["module"].items() if n not in trained | buffers and v.numel() > 0
    }
    for name, shape in (main.get("frozen_param_shapes") or {}).items():
        if name not in fixed:
            flat = torch.cat([r["frozen_param_fragments"][name].flatten() for r in ranks])
            fixed[name] = flat[: torch.Size(shape).numel()].view(shape)
    return fixed


def _record(main: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read our own record of the averages, empty in other people's."""
    record: Mapping[str, Any] = main.get(RECORD, {})
    if not record:
        return {}
    emas = named_emas(record["emas"])
    since = record.get("ema_since", {}).items()
    return {
        "emas": {kind: ema.as_written() for kind, ema in emas.items()},
        "ema_since": {
            str(kind): _count(updates, f"{RECORD}: ema_since") for kind, updates in since
        },
    }


def _tag(folder: Path) -> Path:
    """The folder of one step."""
    for latest in ("latest_universal", "latest"):
        if (folder / latest).is_file():
            try:
                name = (folder / latest).read_text().strip()
            except (OSError, ValueError):  # no text
                raise CheckpointError(
                    f"{folder / latest}: not readable; the name of a folder was expected"
                ) from None
            if (folder / name).is_dir() and Path(name).name == name:
                return folder / name
            raise CheckpointError(f"{folder / latest}: names {name!r}, which is not a folder here")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a DeepSpeed checkpoint is one")
    return folder


def _rank(file: Path) -> int:
    found = re.search(r"pp_rank_(\d+)", file.name)
    return int(found[1]) if found else -1


def _load(file: Path) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    plain = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    return read_weights(file, CheckpointError, classes=plain, content="DeepSpeed writes")


def _count(value: Any, source: str) -> int:
    """Return what DeepSpeed counts as an int, a float or a tensor of one."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    return whole_number(number, source, CheckpointError)
