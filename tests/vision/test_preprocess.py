"""Every preprocessing of the table against a naive bicubic written from its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastrepa.vision.preprocess import Preprocess
from fastrepa.vision.registry import REGISTRY, default_side, find_recipe

A = -0.75


def cubic(distance, dtype):
    """Keys' convolution kernel with a = -0.75 at `distance` >= 0."""
    d = dtype(distance)
    if d <= 1:
        return ((dtype(A) + 2) * d - (dtype(A) + 3)) * d * d + 1
    if d < 2:
        return ((dtype(A) * d - 5 * dtype(A)) * d + 8 * dtype(A)) * d - 4 * dtype(A)
    return dtype(0)


def resize_matrix(source, target, dtype):
    """[target, source]: four taps around (i + 1/2) source/target - 1/2, the border repeated."""
    matrix = np.zeros((target, source), dtype)
    for i in range(target):
        centre = (dtype(i) + dtype(0.5)) * (dtype(source) / dtype(target)) - dtype(0.5)
        left = int(np.floor(centre))
        for tap in range(left - 1, left + 3):
            weight = cubic(abs(centre - dtype(tap)), dtype)
            matrix[i, min(max(tap, 0), source - 1)] += weight
    return matrix


def naive(image_u8, mean, std, side, resize_first, dtype):
    x = image_u8.astype(dtype) / dtype(255)
    matrix = resize_matrix(x.shape[-1], side, dtype)

    def resize(x):
        return (matrix @ x @ matrix.T).astype(dtype)

    def normalise(x):
        mean_, std_ = (np.array(v, dtype).reshape(1, 3, 1, 1) for v in (mean, std))
        return (x - mean_) / std_

    return normalise(resize(x)) if resize_first else resize(normalise(x))


# One of each preprocessing, at every size the reference knows and at one below. The strides are
# the encoders' patches.
CASES = [
    (name, stride, resolution, side)
    for name, stride, sides in (
        ("dinov2-vit-b", 14, (112, 224, 448)),
        ("clip-vit-l", 14, (112, 224, 448)),
        ("jepa-vit-h", 14, (112, 224, 448)),
        ("siglip-vit-so400m", 14, (112, 224, 448)),
        ("mae-vit-l", 16, (128, 256, 512)),
        ("mocov3-vit-b", 16, (128, 256, 512)),
        ("dino-vit-b", 16, (128, 256, 512)),
        ("siglip-vit-b", 16, (128, 256, 512)),
        ("tf_efficientnet_lite0", 16, (128, 256, 512)),
    )
    for resolution, side in zip((128, 256, 512), sides, strict=True)
]


@pytest.mark.parametrize(("name", "stride", "resolution", "side"), CASES)
def test_rows_against_the_definition(name, stride, resolution, side, photo, as_good_as):
    recipe = find_recipe(name)
    # High contrast, so that bicubic overshoots [0, 1] and a clamp would show.
    rng = np.random.default_rng(resolution)
    image = np.concatenate(
        [photo(resolution).numpy(), rng.choice([0, 255], (1, 3, resolution, resolution))]
    ).astype(np.uint8)
    resize_first = name == "clip-vit-l"
    args = image, recipe.mean, recipe.std, side, resize_first
    ours = Preprocess(recipe, default_side(recipe, stride, resolution))(torch.from_numpy(image))
    as_good_as(
        ours, torch.from_numpy(naive(*args, np.float32)), torch.from_numpy(naive(*args, np.float64))
    )


@pytest.mark.parametrize(("resolution", "side"), [(64, 256), (96, 112), (300, 224)])
def test_an_input_of_any_side(resolution, side, photo, as_good_as):
    """It is resized up, down and not in whole ratios, as `input` in the configuration asks."""
    recipe = REGISTRY["dinov2-vit-b"]
    args = photo(resolution).numpy(), recipe.mean, recipe.std, side, False
    ours = Preprocess(recipe, side)(photo(resolution))
    as_good_as(
        ours, torch.from_numpy(naive(*args, np.float32)), torch.from_numpy(naive(*args, np.float64))
    )


@pytest.mark.parametrize("name", ["dinov2-vit-b", "clip-vit-l"])
def test_order_is_the_references_bit_for_bit(name, photo):
    """The two orders differ in rounding only, so only equality can tell them apart."""
    recipe = REGISTRY[name]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (recipe.mean, recipe.std))
    x = photo(256) / 255.0
    if name == "clip-vit-l":
        x = torch.nn.functional.interpolate(x, 224, mode="bicubic")
        x = (x - mean) / std
    else:
        x = (x - mean) / std
        x = torch.nn.functional.interpolate(x, 224, mode="bicubic")
    assert torch.equal(Preprocess(recipe, 224)(photo(256)), x)


def test_wrong_images_are_refused():
    preprocess = Preprocess(REGISTRY["dinov2-vit-b"], 224)
    with pytest.raises(TypeError, match="uint8"):
        preprocess(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\[B,3,R,R\]"):
        preprocess(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
