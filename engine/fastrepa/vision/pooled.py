"""One feature an image in a frozen encoder's space: what distances between sets are measured in.

    x = image / 255;  x = clamp(bicubic(x, side), 0, 1);  x = (x - mean) / std
    feature = the network's own pooled feature, which its classifier would read

That is timm's `forward_head(..., pre_logits=True)`: DINOv2's class token (as FD-DINOv2 takes it:
Stein et al. 2023, arXiv 2306.04675), the mean over the last map of an EfficientNet. Unlike the
targets of alignment (features.py), images of any size are brought to the side that the network was
trained at, with antialiasing, as metrics are to be (Parmar et al. 2022, "On Aliased Resizing").
B batch, Z feature width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrepa.config import EncoderConfig
from fastrepa.errors import ConfigError, worded
from fastrepa.vision.features import UNBUILDABLE, blueprint, load_network
from fastrepa.vision.registry import REGISTRY, Recipe, find_recipe
from fastrepa.vision.weights import digest


@dataclass(frozen=True)
class PooledPlan:
    """A pooled encoder's shapes, known without its weights: side in pixels, width Z."""

    recipe: Recipe
    side: int
    width: int
    timm_args: dict[str, Any]


def space_name(encoder: str) -> str:
    """Name an encoder's space, as results do: "efficientnet_lite0", "dinov2_vitb14", "resnet50".

    timm's ports lose their "tf_" and their tag; a row of the registry is family, size and patch.
    """
    recipe = REGISTRY.get(encoder)
    if recipe is None:
        return re.sub(r"\W", "_", encoder.removeprefix("tf_").partition(".")[0])
    family, size = encoder.split("-vit-")
    patch = re.search(r"patch(\d+)", recipe.timm_name)
    assert patch is not None
    return f"{family}_vit{size}{patch[1]}"


def plan_pooled(config: EncoderConfig) -> PooledPlan:
    """Side and width of the encoder's pooled feature; nothing of its weights is read.

    The side is `config.input`, or the one the network was trained at (224 for the rows of REPA's
    encoders). Raises ConfigError for an unknown name and a side that the network cannot take.
    """
    recipe, where = find_recipe(config.name), f"evaluation encoder {config.name}"
    if recipe.own:
        raise ConfigError(f"{where}: has tokens alone; write a metric with features of its own")
    pretrained = timm.get_pretrained_cfg(recipe.timm_name)
    trained = pretrained.input_size[-1] if pretrained else 224
    side = config.input or (224 if recipe.side == "224*" else trained)
    args = dict(recipe.timm_args)
    if getattr(pretrained, "fixed_input_size", False):
        args["img_size"] = side
    model: Any = blueprint(recipe, args, where)
    if not hasattr(model, "forward_head"):
        raise ConfigError(f"{where}: this timm model has no pooled feature")
    try:
        shape = _pooled(model, torch.empty(1, 3, side, side, device="meta")).shape
    except UNBUILDABLE as error:
        reason = worded(error, 160)
        raise ConfigError(f"{where}: cannot take an input of {side} px ({reason})") from error
    if len(shape) != 2:
        raise ConfigError(f"{where}: its pooled feature has shape {list(shape)}")
    return PooledPlan(recipe, side, shape[1], args)


class PooledEncoder(nn.Module):
    """An encoder with one feature an image, outside autograd.

    `forward(image_u8 [B,3,H,W] uint8) -> [B,Z]` fp32, for any H and W.

    Like a FrozenEncoder it stays in eval mode. width: Z; side: pixels the network sees; digest:
    SHA-256 of its fp32 weights; name: how results call its space.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig, device: torch.device | str = "cpu") -> None:
        """Raises ConfigError as plan_pooled, and WeightsError for weights missing or misfitting."""
        super().__init__()
        plan = plan_pooled(config)
        network = load_network(config, plan.recipe, plan.timm_args, _drop_classifier)
        self.name = space_name(config.name)
        self.side, self.width, self.digest = plan.side, plan.width, digest(network)
        self.network = (
            network.to(device).to(memory_format=torch.channels_last).requires_grad_(False)
        )
        for name, value in (("mean", plan.recipe.mean), ("std", plan.recipe.std)):
            tensor = torch.tensor(value, dtype=torch.float32, device=device).view(1, 3, 1, 1)
            self.register_buffer(name, tensor, persistent=False)
        self.train(False)

    @torch.no_grad()
    def forward(self, image_u8: Tensor) -> Tensor:
        if image_u8.dtype != torch.uint8:
            raise TypeError(f"image_u8 must be uint8, not {image_u8.dtype}")
        x = image_u8.to(self.mean.device, torch.float32) / 255
        if x.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
            x = x.clamp(0, 1)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return _pooled(self.network, x).float()

    def train(self, mode: bool = True) -> PooledEncoder:
        """Stays in eval mode: `mode` is ignored."""
        return super().train(False)


def _pooled(network: Any, x: Tensor) -> Tensor:
    return network.forward_head(network.forward_features(x), pre_logits=True)


def _drop_classifier(network: Any) -> None:
    """Drop it in place; the pooled feature passes all the rest."""
    network.reset_classifier(0)
