"""State dicts in and out: the reference's `.pt` files, bare state dicts and safetensors.

Nothing is unpickled beyond tensors, containers and the reference's argparse namespace.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastrepa.errors import CheckpointError, FastrepaError
from fastrepa.reading.tensors import read_weights, reason, state_dict, whole_number
from fastrepa.runtime.files import aside


@dataclass(frozen=True)
class Reference:
    """A foreign file's contents by the reference's names, on the CPU.

    Of a bare state dict `model` and `ema` are the same, `steps` is 0 and the moments are empty.
    `emas` are further averages, `record` says which each is and `ema_since` when it began, where
    the file is one of ours. `args` is the command line of a training script, where it is there.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    optimizer_step: int = 0
    steps: int = 0
    emas: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    ema_since: dict[str, int] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)


def load_reference(path: str | Path) -> Reference:
    """A whole reference file, AdamW's moments included, or a bare state dict or safetensors."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    # The reference keeps its command line in the file; a Namespace runs nothing.
    stored = read_weights(path, CheckpointError, classes=[argparse.Namespace])
    if not _is_training_file(stored):
        bare = state_dict(stored, path, CheckpointError)
        return Reference(bare, bare)
    model, ema = (
        state_dict(stored[key], f"{path}: {key}", CheckpointError) for key in ("model", "ema")
    )
    steps = whole_number(stored.get("steps", 0), f"{path}: steps", CheckpointError)
    opt = stored.get("opt") or {}
    try:
        # torch numbers an optimiser's parameters in the order of the module's own.
        numbers = [n for group in opt.get("param_groups", []) for n in group["params"]]
        moments = opt.get("state", {})
        if moments and len(numbers) != len(model):
            raise CheckpointError(
                f"{path}: opt: {len(numbers)} parameters, the model has {len(model)}"
            )
        named = {
            name: moments[number]
            for name, number in zip(model, numbers, strict=False)
            if number in moments
        }
        for name, states in named.items():
            if any(states[k].shape != model[name].shape for k in ("exp_avg", "exp_avg_sq")):
                raise CheckpointError(f"{path}: opt: the moments of {name} have another shape")
        return Reference(
            model,
            ema,
            exp_avg={n: m["exp_avg"] for n, m in named.items()},
            exp_avg_sq={n: m["exp_avg_sq"] for n, m in named.items()},
            optimizer_step=whole_number(
                max((int(m["step"]) for m in named.values()), default=0),
                f"{path}: opt: step",
                CheckpointError,
            ),
            steps=steps,
            args=_arguments(stored.get("args")),
        )
    except FastrepaError:
        raise
    except Exception as e:  # the values are of whatever kinds the file has
        raise CheckpointError(f"{path}: opt: not the state of an AdamW ({reason(e)})") from None


def _arguments(stored: Any) -> dict[str, Any]:
    """The command line that a file was written by: a Namespace or a dict, by name."""
    held = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    return {str(k): v for k, v in held.items()} if isinstance(held, Mapping) else {}


def _is_training_file(stored: Any) -> bool:
    return isinstance(stored, Mapping) and "model" in stored and "ema" in stored


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `state`, [...] by name, into `model`, strictly. Raises as `check_weights`."""
    check_weights(model, state, source=source)
    model.load_state_dict(dict(state), strict=True)


def check_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Compare `state`, [...] by name, with a model, which may be on the meta device.

    Raises CheckpointError, naming the first tensor whose name or shape differs, or that has whole
    numbers where the model's has real ones.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise CheckpointError(f"{source}: {name} is missing: another architecture")
        if name not in own:
            raise CheckpointError(
                f"{source}: {name[:120]} is not in this model: another architecture"
            )
        given = state[name]
        if own[name].shape != given.shape:
            raise CheckpointError(
                f"{source}: {name} is {list(given.shape)}, this model's is "
                f"{list(own[name].shape)}: another architecture"
            )
        if own[name].is_floating_point() and not given.is_floating_point():
            raise CheckpointError(
                f"{source}: {name} is of {str(given.dtype).removeprefix('torch.')}, real numbers "
                f"were expected"
            )


def save_reference(
    path: str | Path,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    steps: int,
    opt: Mapping[str, Any] | None = None,
    args: argparse.Namespace | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write what the reference's own scripts read: {model, ema, opt, args, steps}, or bare EMA
    safetensors with `metadata`. `model`, `ema`: [...] by parameter name. `opt` is a torch AdamW's
    state dict over the model's parameters. The file is there whole or not at all.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        whole = {"format": "pt", **(metadata or {})}
        with aside(path) as partial:
            save_file({k: v.contiguous() for k, v in ema.items()}, partial, metadata=whole)
        return
    content: dict[str, Any] = {"model": dict(model), "ema": dict(ema), "steps": steps}
    if opt is not None:
        content["opt"] = dict(opt)
    if args is not None:
        content["args"] = args
    # An open file: torch's own way to one loses why writing failed.
    with aside(path) as partial, partial.open("wb") as file:
        torch.save(content, file)
