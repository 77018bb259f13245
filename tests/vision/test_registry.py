"""The registry against REPA's table of encoders, row by row; names that do not exist."""

from __future__ import annotations

import pytest
import timm

from fastrepa.config import EncoderConfig
from fastrepa.errors import ConfigError
from fastrepa.vision.features import plan_encoder
from fastrepa.vision.registry import REGISTRY, default_side, find_recipe, parse_encoders

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# name: (mean and std, resize before normalising?, final norm?, width, input side at 256 px)
TABLE = {
    **{
        f"{family}-vit-{size}": (IMAGENET, False, True, width, 224)
        for family in ("dinov2", "dinov2reg")
        for size, width in (("s", 384), ("b", 768), ("l", 1024), ("g", 1536))
    },
    **{
        f"mocov3-vit-{size}": (IMAGENET, False, True, width, 256)
        for size, width in (("s", 384), ("b", 768), ("l", 1024))
    },
    **{
        f"dinov3-vit-{size}": (IMAGENET, False, True, width, 256)
        for size, width in (
            ("s", 384),
            ("splus", 384),
            ("b", 768),
            ("l", 1024),
            ("hplus", 1280),
            ("7b", 4096),
        )
    },
    **{
        f"{family}-vit-{size}": (HALF, False, True, width, side)
        for family in ("siglip", "siglip2")
        for size, width, side in (("b", 768, 256), ("l", 1024, 256), ("so400m", 1152, 224))
    },
    "clip-vit-l": (CLIP, True, False, 1024, 224),
    "mae-vit-l": (IMAGENET, False, False, 1024, 256),
    "jepa-vit-h": (IMAGENET, False, True, 1280, 224),
    "dino-vit-b": (IMAGENET, False, True, 768, 256),
}


def test_every_row_of_the_table_is_there():
    assert REGISTRY.keys() == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_row(name):
    """Built without weights, so the largest encoders too. All give 16x16 tokens at 256 px."""
    (mean, std), resize_first, norm, width, side = TABLE[name]
    plan = plan_encoder(EncoderConfig(name=name), resolution=256)
    assert (plan.recipe.mean, plan.recipe.std) == (mean, std)
    assert plan.recipe.order == ("resize-normalise" if resize_first else "normalise-resize")
    assert (plan.width, plan.input_side, plan.own_grid) == (width, side, (16, 16))
    assert plan.norm == norm
    assert plan.plain


def test_timm_has_the_weights_it_is_asked_for():
    """Architecture and tag of each row are published ones, where the row says so."""
    published = set(timm.list_pretrained())
    for recipe in REGISTRY.values():
        assert (recipe.timm_name in published) == recipe.hub


def test_mocov3_heads():
    """MoCo v3's small model has 12 heads of 32, unlike timm's small transformer with 6 of 64."""
    heads = {size: REGISTRY[f"mocov3-vit-{size}"].timm_args["num_heads"] for size in "sbl"}
    assert heads == {"s": 12, "b": 12, "l": 16}


@pytest.mark.parametrize(
    ("name", "stride", "sides"),
    [
        ("dinov2-vit-b", 14, {64: 56, 128: 112, 256: 224, 384: 224, 512: 448, 1024: 896}),
        ("mae-vit-l", 16, {64: 64, 128: 128, 256: 256, 512: 512}),
        ("vit_small_patch14_dinov2", 14, {128: 112, 256: 224, 384: 336, 512: 448}),
        ("vit_base_patch16_224", 16, {128: 128, 256: 256}),
        ("vit_base_patch32_224", 32, {128: 256, 256: 512}),
    ],
)
def test_default_side(name, stride, sides):
    recipe = find_recipe(name)
    assert {r: default_side(recipe, stride, r) for r in sides} == sides


def test_timm_names_bring_their_own_mean_and_std():
    assert (
        find_recipe("tf_efficientnet_lite0").mean,
        find_recipe("tf_efficientnet_lite0").std,
    ) == HALF
    assert (find_recipe("resnet18").mean, find_recipe("resnet18").std) == IMAGENET
    assert (find_recipe("vit_base_patch16_224.mae").mean) == IMAGENET[0]
    assert (find_recipe("vit_base_patch16_224.augreg_in21k").mean) == HALF[0]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("dinov2-vit-bb", "dinov2-vit-b"),
        ("dino2-vit-b", "dinov2-vit-b"),
        ("tf_efficientnet_lite_0", "tf_efficientnet_lite0"),
        ("resnet18.nosuchtag", "resnet18"),
    ],
)
def test_misspelt_name_suggests_the_nearest(wrong, right):
    with pytest.raises(ConfigError) as error:
        plan_encoder(EncoderConfig(name=wrong), resolution=256)
    message = str(error.value)
    assert repr(wrong) in message
    assert f"did you mean '{right}" in message
    assert "\n" not in message


def test_names_of_encoders_on_the_command_line():
    a, b, c = parse_encoders(
        "dinov2-vit-b, clip-vit-l=w/ViT.safetensors,x.y_z=package:p@128", "--o"
    )
    assert (a.name, a.weights, a.input) == ("dinov2-vit-b", "hub", None)
    assert (b.name, b.weights, b.input) == ("clip-vit-l", "w/ViT.safetensors", None)
    assert (c.name, c.weights, c.input) == ("x.y_z", "package:p", 128)
    for bad in ("", "a,,b", "a=", "=w", "a@", "a@0", "a@12px"):
        with pytest.raises(ConfigError, match=r"^--o: .* is not NAME\[=WEIGHTS\]\[@INPUT\]"):
            parse_encoders(bad, "--o")
