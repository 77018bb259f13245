"""A set's stored features against the encoder that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrepa.config import EncoderConfig
from fastrepa.data.format.shards import FeaturesColumn
from fastrepa.errors import ConfigError
from fastrepa.runtime.terminal import typed
from fastrepa.vision.features import EncoderPlan, weights_digest


def column_fields(config: EncoderConfig, plan: EncoderPlan) -> dict[str, Any]:
    """The fields of a `FeaturesColumn` that say what its tokens depend on, weights apart."""
    recipe = plan.recipe
    return {
        "encoder": config.name,
        "timm_name": recipe.timm_name,
        "input_side": plan.input_side,
        "grid": plan.own_grid[0],
        "width": plan.width,
        "mean": recipe.mean,
        "std": recipe.std,
        "order": recipe.order,
        "norm": plan.norm,
    }


def encode_command(data: Path, config: EncoderConfig, plan: EncoderPlan) -> str:
    """Return the command that stores what the encoder of `config` gives in a prepared set."""
    weights = "" if config.weights == "hub" else f"={config.weights}"
    spec = typed(f"{config.name}{weights}@{plan.input_side}")
    return f"fastrepa data encode {typed(data)} --cache-features {spec}"


def check_column(
    data: Path, column: FeaturesColumn, config: EncoderConfig, plan: EncoderPlan, *, weights: bool
) -> None:
    """ConfigError unless the column, of the set `data`, holds what the encoder of `config` gives.

    With `weights` the encoder's weights are read and their SHA-256 compared, except where column
    and configuration both take the hub's, which its name settles (no download for a comparison).
    """
    where = f"vision.encoders ({config.name}): the cached features"
    mirrored = " --flip" if column.views == 2 else ""
    again = f"cache them again: {encode_command(data, config, plan)}{mirrored} --replace"
    for name, wanted in column_fields(config, plan).items():
        if (stored := getattr(column, name)) != wanted:
            raise ConfigError(
                f"{where} were made with {name} {stored!r}, this configuration gives {wanted!r}; "
                f"{again}"
            )
    if not weights or config.weights == column.weights == "hub":
        return
    if weights_digest(config, plan) != column.digest:
        raise ConfigError(
            f"{where} were made with other weights ({column.weights!r}) than {config.weights!r}; "
            f"{again}"
        )
