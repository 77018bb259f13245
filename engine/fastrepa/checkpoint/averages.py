"""The moving averages of a run: which ones a checkpoint holds, and one of them as a model.

A run keeps those of `training.ema`. The first is the state `ema` in every checkpoint; the others
are named by what they are (training/optimizer.py), and state.json says which is which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrepa.checkpoint.kinds import EMA, WEIGHT, Whole, ema_keys
from fastrepa.config import Config, EmaConfig
from fastrepa.errors import CheckpointError
from fastrepa.model.sit import SiT
from fastrepa.runtime.world import World
from fastrepa.vision.codec import Codec


def recorded(emas: Sequence[EmaConfig]) -> dict[str, Any]:
    """Return state name -> average, for state.json."""
    return {key: ema.as_written() for key, ema in zip(ema_keys(emas), emas, strict=True)}


def stored_emas(record: Mapping[str, Any], first: EmaConfig) -> dict[str, EmaConfig]:
    """The averages of a checkpoint by state name; one without a record holds `first` alone."""
    return named_emas(record) or {EMA: first}


def named_emas(record: Mapping[str, Any]) -> dict[str, EmaConfig]:
    """Return the averages of a record by state name.

    Names become names of files, so each must be the one that its average has: ValueError.
    """
    emas = {key: EmaConfig.model_validate(value) for key, value in record.items()}
    for key, ema in emas.items():
        if key not in ema_keys((ema, ema)):
            raise ValueError(f"{key[:80]!r} is not the name of an average")
    if emas and EMA not in emas:
        raise ValueError(f"no average is called {EMA!r}")
    return emas


def choose_ema(stored: Mapping[str, EmaConfig], name: str | None, *, source: Path) -> str:
    """The state that `name` means: 0.999, sigma_rel=0.05 or a state's own name; None: the first.

    Raises CheckpointError with those there are.
    """
    if name is None:
        return EMA
    for key, ema in stored.items():
        if name in (key, str(ema)) or (ema.decay is not None and _number(name) == ema.decay):
            return key
    known = ", ".join(map(str, stored.values()))
    raise CheckpointError(f"--ema: {name!r} is not stored in {source}, which has {known}")


def resumed_emas(
    wanted: Sequence[EmaConfig], stored: Mapping[str, EmaConfig], step: int
) -> tuple[dict[str, str], list[str]]:
    """Return (state name -> the stored kind it starts from, what there is to say of it, in lines).

    An average finds itself wherever it is stored; a fixed decay that was changed goes on from the
    average that there is; any other starts from the weights.
    """
    sources, said = {}, []
    before = stored[EMA]
    for key, ema in zip(ema_keys(wanted), wanted, strict=True):
        found = next((k for k, e in stored.items() if e == ema), None)
        changed = key == EMA and None not in (ema.decay, before.decay) and before not in wanted
        if found is None and changed:
            found = EMA
            said.append(f"EMA {ema} goes on from the average of {before} at step {step}")
        elif found is None:
            said.append(f"EMA {ema} is new: it starts from the weights of step {step}")
        sources[key] = found or WEIGHT
    for key, ema in stored.items():
        if key not in sources.values():
            said.append(f"EMA {ema} is kept no longer; checkpoints up to step {step} have it")
    return sources, said


@contextmanager
def ema_model(
    config: Config,
    whole: Whole,
    fixed: Mapping[str, Tensor],
    codec: Codec,
    world: World,
    *,
    needed: bool = True,
) -> Iterator[SiT | None]:
    """The first average of a running engine as a model in eval mode, for sampling (collective).

    Gathered tensor by tensor, in the dtype that training computes in and without projectors, by
    the ranks that say it is `needed`; the others get None. It is gone when the context ends.
    fixed: what is not trained, by name, each [...] as the model has it.
    """
    with torch.device("meta"):
        model = SiT.from_config(config, side=codec.side, channels=codec.channels, encoder_widths=())
    dtype = config.training.dtype
    averaged = {n: fixed[n].to(world.device) for n in fixed}
    for name in model.state_dict():
        if name in whole.params:
            value = whole.get(name, EMA)
            if needed:
                averaged[name] = value.to(world.device, dtype)
            del value
    whole.release()
    if not needed:
        yield None
        return
    model.load_state_dict(averaged, strict=True, assign=True)
    averaged.clear()
    try:
        yield model.eval()
    finally:
        model.to("meta")  # whoever still refers to it holds no memory
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
