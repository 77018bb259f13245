"""The generator of a run, a checkpoint or an export, ready to draw images on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastrepa.checkpoint import choice
from fastrepa.checkpoint.choice import Wanted
from fastrepa.checkpoint.format import RunState
from fastrepa.config import Config, SampleConfig, TrainingConfig, config_from_dict
from fastrepa.errors import CheckpointError
from fastrepa.model.compilation import check_compile, compile_generator
from fastrepa.model.sit import SiT
from fastrepa.runtime.world import World

Generator = TypeVar("Generator", bound=nn.Module)

TRIES = 5  # to read a checkpoint that the run may prune meanwhile


@dataclass(frozen=True)
class Loaded:
    """A generator in eval mode, its configuration and checkpoint's facts; `fingerprint` is the
    SHA-256 that tells its weights from others, `ema` the name of the average.
    """

    model: SiT
    config: Config
    state: RunState
    fingerprint: str
    ema: str


def load_generator(path: Path, world: World, device: torch.device, wanted: Wanted) -> Loaded:
    """The averaged model that is wanted of a run, a checkpoint of it or an export, the same one on
    all ranks (collective).

    While a run goes on a newer checkpoint may come, and prune it. Raises CheckpointError.
    """
    for _ in range(TRIES):
        model, config, state = choice.load_ema_model(path, device, wanted)
        try:
            mine = choice.identity(path, state.step)
        except OSError:  # just pruned
            mine = ""
        everyone = [mine] * world.size
        if world.size > 1:
            torch.distributed.all_gather_object(everyone, mine, group=world.group)
        if mine and set(everyone) == {mine}:
            ema = choice.name_of_ema(path, wanted, config, state)
            return Loaded(model, config, state, mine, ema)
    raise CheckpointError(f"{path}: its checkpoints are replaced before they can be read")


def ready_to_sample(
    model: Generator, sample_config: SampleConfig, training: TrainingConfig, device: torch.device
) -> Generator:
    """The generator in the precision that `sample.precision` names, compiled as `sample.compile`
    says; in place.

    Raises ConfigError where `device` cannot do that.
    """
    check_compile("sample.compile", sample_config.compile, device)
    precision = training.precision if sample_config.precision == "run" else sample_config.precision
    model = model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    compile_generator(model, sample_config.compile, device)
    return model


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The run's configuration with its `sample` section overridden, validated as a whole."""
    given = {k: v for k, v in settings.items() if v is not None}
    tree = config.model_dump(mode="json")
    return config_from_dict({**tree, "sample": {**tree["sample"], **given}}, source="sample")


def draw_options(config: Config, state: RunState) -> dict[str, Any]:
    """Return what `generate` is told of a generator beside its codec, the seed and batches."""
    return {
        "sample_config": config.sample,
        "path": config.objective.path,
        "input_shape": (state.channels, state.side, state.side),
        "null_label": config.model.num_classes,
    }
