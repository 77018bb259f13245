"""State dicts in and out: the reference's `.pt` files, bare state dicts and safetensors.

Nothing is unpickled beyond tensors, containers and the reference's argparse namespace.
"""

from __future__ import annotations

import argparse
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrepa.errors import CheckpointError


def load_state_dict_file(path: str | Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The generator's tensors by the reference's names, on the CPU, in the stored dtype.

    Reads safetensors, a bare state dict, or the reference's {model, ema, opt, args, steps}, where
    `ema` picks the averaged weights. Raises CheckpointError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).splitlines()[0]
        raise CheckpointError(f"{path}: holds more than tensors, refused ({reason})") from None
    except (OSError, RuntimeError, EOFError, struct.error, SafetensorError) as e:
        raise CheckpointError(f"{path}: not a readable checkpoint ({e})") from None
    if isinstance(stored, Mapping) and "model" in stored and "ema" in stored:
        stored = stored["ema" if ema else "model"]
    if not isinstance(stored, Mapping) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise CheckpointError(f"{path}: expected a state dict or {{model, ema, ...}} of tensors")
    return {str(k).removeprefix("module."): v for k, v in stored.items()}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `state` into `model`, strictly; CheckpointError names the first tensor that differs."""
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise CheckpointError(f"{source}: {name} is missing: another architecture")
        if name not in own:
            raise CheckpointError(f"{source}: {name} is not in this model: another architecture")
        if own[name].shape != state[name].shape:
            raise CheckpointError(
                f"{source}: {name} is {list(state[name].shape)}, this model's is "
                f"{list(own[name].shape)}: another architecture"
            )
    model.load_state_dict(dict(state), strict=True)


def save_reference(
    path: str | Path, *, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], steps: int
) -> None:
    """Write what the reference's own scripts read: {model, ema, steps}, or bare EMA safetensors."""
    path = Path(path)
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in ema.items()}, path)
    else:
        torch.save({"model": dict(model), "ema": dict(ema), "steps": steps}, path)
