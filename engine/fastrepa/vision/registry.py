"""The frozen encoders by name: timm architecture, preprocessing, which tokens are taken, width.

Two kinds of names are known. A registry name ("dinov2-vit-b") is a row of `REGISTRY`: the encoders
of REPA (Yu et al. 2024, arXiv 2410.06940) as its reference implementation feeds them, and the newer
DINOv3 and SigLIP in the same manner. Any other name is taken as a timm model ("resnet50.a1_in1k",
"vit_base_patch16_224", "tf_efficientnet_lite0") under the generic rule:

- a plain vision transformer gives its patch tokens after the final norm;
- any other network gives the deepest feature map at stride 16, one token per cell;
- mean and std are those of timm's pretrained configuration, and the image is normalised, then
  resized if it must be.

The side of the encoder's input, where the configuration names none (`default_side`):

- "224*" (REPA): 224 * (resolution // 256). Below 256 px, where that would be nothing, the
  same proportion goes on: 14 px for every 16 of the image, so 112 for a 128 px image.
- "none": the image as it is.
- "per-16" (timm models by their own name): one token for every 16 image pixels, which is the
  image as it is for patch or stride 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import timm

from fastrepa.config import EncoderConfig
from fastrepa.config.values import is_own
from fastrepa.errors import ConfigError, nearest
from fastrepa.reading.text import expanded, whole_number

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
STRIDE = 16

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """Says how one encoder is built and fed.

    `mean` and `std` are in units of the [0, 1] image. `side` names the rule of `default_side`, and
    `order` says when the resize happens. `norm`:
    whether the tokens pass the final LayerNorm. `width` is Z where the row promises it. `timm_args`
    go to `timm.create_model`. `hub`: timm can fetch the weights; `download`: where original weights
    are, for error messages. `own`: a class in a file of the user's (own.py), and not timm's.
    """

    name: str
    timm_name: str
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    side: Literal["224*", "none", "per-16"] = "none"
    order: Literal["normalise-resize", "resize-normalise"] = "normalise-resize"
    norm: bool = True
    width: int | None = None
    timm_args: Mapping[str, Any] = field(default_factory=dict)
    hub: bool = True
    download: str | None = None
    own: bool = False


def _dinov2(name: str, timm_name: str, width: int, weights: str) -> Recipe:
    download = f"{_META}/dinov2/{weights.partition('_reg4')[0]}/{weights}_pretrain.pth"
    return Recipe(name, timm_name, side="224*", width=width, download=download)


def _dinov3(name: str, timm_name: str, width: int) -> Recipe:
    """Younger than the paper: patch 16, so the image as it is. The qkvb variants keep the original
    query and value biases; timm's plain names leave them out.
    """
    return Recipe(name, timm_name, width=width)


def _siglip(name: str, timm_name: str, width: int) -> Recipe:
    """The gap variants are the same trunks without the attention pool, which gives no tokens."""
    side: Literal["224*", "none"] = "224*" if "patch14" in timm_name else "none"
    return Recipe(name, timm_name, mean=HALF, std=HALF, side=side, width=width)


def _mocov3(name: str, timm_name: str, width: int, heads: int, download: str) -> Recipe:
    """The small model has 12 heads where timm's has 6; the weights are on no hub."""
    return Recipe(
        name, timm_name, width=width, timm_args={"num_heads": heads, "num_classes": 0}, hub=False,
        download=download,
    )  # fmt: skip


_META = "https://dl.fbaipublicfiles.com"
_MOCO = f"{_META}/moco-v3/vit-{{0}}-300ep/vit-{{0}}-300ep.pth.tar"

# A line per encoder: its name, timm's, and the width of its tokens.
_ROWS = (
    _dinov2("dinov2-vit-s", "vit_small_patch14_dinov2.lvd142m", 384, "dinov2_vits14"),
    _dinov2("dinov2reg-vit-s", "vit_small_patch14_reg4_dinov2.lvd142m", 384, "dinov2_vits14_reg4"),
    _dinov2("dinov2-vit-b", "vit_base_patch14_dinov2.lvd142m", 768, "dinov2_vitb14"),
    _dinov2("dinov2reg-vit-b", "vit_base_patch14_reg4_dinov2.lvd142m", 768, "dinov2_vitb14_reg4"),
    _dinov2("dinov2-vit-l", "vit_large_patch14_dinov2.lvd142m", 1024, "dinov2_vitl14"),
    _dinov2("dinov2reg-vit-l", "vit_large_patch14_reg4_dinov2.lvd142m", 1024, "dinov2_vitl14_reg4"),
    _dinov2("dinov2-vit-g", "vit_giant_patch14_dinov2.lvd142m", 1536, "dinov2_vitg14"),
    _dinov2("dinov2reg-vit-g", "vit_giant_patch14_reg4_dinov2.lvd142m", 1536, "dinov2_vitg14_reg4"),
    _dinov3("dinov3-vit-s", "vit_small_patch16_dinov3_qkvb.lvd1689m", 384),
    _dinov3("dinov3-vit-splus", "vit_small_plus_patch16_dinov3_qkvb.lvd1689m", 384),
    _dinov3("dinov3-vit-b", "vit_base_patch16_dinov3_qkvb.lvd1689m", 768),
    _dinov3("dinov3-vit-l", "vit_large_patch16_dinov3_qkvb.lvd1689m", 1024),
    _dinov3("dinov3-vit-hplus", "vit_huge_plus_patch16_dinov3_qkvb.lvd1689m", 1280),
    _dinov3("dinov3-vit-7b", "vit_7b_patch16_dinov3.lvd1689m", 4096),
    Recipe(
        "clip-vit-l", "vit_large_patch14_clip_quickgelu_224.openai", mean=CLIP_MEAN, std=CLIP_STD,
        side="224*", order="resize-normalise", norm=False, width=1024,
    ),
    _siglip("siglip-vit-b", "vit_base_patch16_siglip_gap_256.webli", 768),
    _siglip("siglip-vit-l", "vit_large_patch16_siglip_gap_256.webli", 1024),
    _siglip("siglip-vit-so400m", "vit_so400m_patch14_siglip_gap_224.webli", 1152),
    _siglip("siglip2-vit-b", "vit_base_patch16_siglip_gap_256.v2_webli", 768),
    _siglip("siglip2-vit-l", "vit_large_patch16_siglip_gap_256.v2_webli", 1024),
    _siglip("siglip2-vit-so400m", "vit_so400m_patch14_siglip_gap_224.v2_webli", 1152),
    Recipe(
        "mae-vit-l", "vit_large_patch16_224.mae", norm=False, width=1024,
        download=f"{_META}/mae/pretrain/mae_pretrain_vit_large.pth",
    ),
    _mocov3("mocov3-vit-s", "vit_small_patch16_224", 384, 12, _MOCO.format("s")),
    _mocov3("mocov3-vit-b", "vit_base_patch16_224", 768, 12, _MOCO.format("b")),
    _mocov3("mocov3-vit-l", "vit_large_patch16_224", 1024, 16, "the MoCo v3 authors"),
    Recipe(
        "jepa-vit-h", "vit_huge_patch14_gap_224.in1k_ijepa", side="224*", width=1280,
        download=f"{_META}/ijepa/IN1K-vit.h.14-300e.pth.tar",
    ),
    Recipe(
        "dino-vit-b", "vit_base_patch16_224.dino", width=768,
        download=f"{_META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ),
)  # fmt: skip

REGISTRY: dict[str, Recipe] = {row.name: row for row in _ROWS}


@cache
def _timm_names() -> frozenset[str]:
    """Every architecture of the installed timm, with and without a pretrained tag."""
    return frozenset(timm.list_models()) | frozenset(timm.list_pretrained())


def find_recipe(name: str) -> Recipe:
    """The row of `name`; ConfigError naming it and the nearest allowed name otherwise."""
    if name in REGISTRY:
        return REGISTRY[name]
    if is_own(name):
        from fastrepa.vision.own import own_recipe

        return own_recipe(name)
    if name not in _timm_names():
        raise ConfigError(
            f"vision.encoders: no encoder named {name!r}"
            f"{nearest(name, [*REGISTRY, *sorted(_timm_names())])}; allowed: "
            f"{', '.join(REGISTRY)}, or any timm model"
        )
    pretrained = timm.get_pretrained_cfg(name)
    mean, std = (pretrained.mean, pretrained.std) if pretrained else (IMAGENET_MEAN, IMAGENET_STD)
    return Recipe(name, name, mean=_triple(mean), std=_triple(std), side="per-16")


def parse_encoders(text: str, option: str) -> tuple[EncoderConfig, ...]:
    """Encoders from `NAME[=WEIGHTS][@INPUT]`, separated by commas; WEIGHTS as in `vision.encoders`.

    "dinov2-vit-b", "dinov2-vit-b=dinov2_vitb14_pretrain.pth,clip-vit-l", "resnet50.a1_in1k@224".
    ConfigError, naming the command line's option, for an input that is no number of pixels, or an
    empty name.
    """
    encoders = []
    for part in text.split(","):
        rest, at, side = part.strip().rpartition("@") if "@" in part else (part.strip(), "", "")
        name, equals, weights = rest.partition("=")
        weights = weights.strip()
        if not name or (equals and not weights) or (at and not whole_number(side)):
            raise ConfigError(
                f"{option}: {part.strip()!r} is not NAME[=WEIGHTS][@INPUT], such as "
                f"dinov2-vit-b or dinov2-vit-b=weights.pth@224"
            )
        encoders.append(
            EncoderConfig(
                name=name,
                weights=expanded(weights) or "hub",
                input=whole_number(side) if at else None,
            )
        )
    return tuple(encoders)


def encoder_label(config: EncoderConfig) -> str:
    """Name and, where one is set, input side, as the command line has them: "resnet50@224"."""
    return config.name + (f"@{config.input}" if config.input else "")


def default_side(recipe: Recipe, stride: int, resolution: int) -> int:
    """The encoder's input side in pixels for an image of `resolution`, by the recipe's rule.

    `stride` is the pixels per token, along a side, of the network.
    """
    if recipe.side == "none":
        return resolution
    if recipe.side == "224*" and resolution >= 256:
        return 224 * (resolution // 256)
    return stride * (resolution // STRIDE)


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = values
    return (red, green, blue)
