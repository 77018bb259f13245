"""Products in e4m3, computed by torch's own: what they are, how alike, and who is refused."""

import copy

import pytest
import torch
from torch import nn

from fastrepa.config import EncoderConfig
from fastrepa.errors import ConfigError
from fastrepa.vision import fp8
from fastrepa.vision.features import build_encoder
from fastrepa.vision.fp8 import Fp8Linear, check_likeness, quantise_rows, use_fp8

DINO = EncoderConfig(name="dinov2-vit-s", weights="random", input=112)


@pytest.fixture
def dino():
    """DINOv2's network with seeded weights, and layer scales that let its blocks matter."""
    encoder = build_encoder(DINO, resolution=112, grid=8)
    generator = torch.Generator().manual_seed(3)
    for name, p in encoder.network.named_parameters():
        if name.endswith("gamma"):
            p.data.uniform_(0.1, 1.0, generator=generator)
    return encoder


def test_rows_by_their_largest():
    x = torch.randn(5, 32) * torch.tensor([[1e-30], [1e-3], [1.0], [1e4], [0.0]])
    rows, scale = quantise_rows(x)
    assert rows.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
    back = rows.float() * scale
    # Three bits behind the point: half a unit is 1/16 of a normal number.
    assert ((back - x).abs() <= x.abs() / 16 + scale * 2**-10).all()
    assert (rows[:4].float().abs().amax(1) == 448).all() and not rows[4].float().any()


def test_a_linear_layer(as_good_as):
    linear = nn.Linear(64, 48).requires_grad_(False)
    x = torch.randn(2, 7, 64)
    y = Fp8Linear(linear)(x)
    assert y.shape == (2, 7, 48) and y.dtype == torch.bfloat16
    (a, s), (b, t) = quantise_rows(x.flatten(0, 1)), quantise_rows(linear.weight)
    exact = (a.double() * s) @ (b.double() * t).T + linear.bias.double()
    eager = ((a.float() * s) @ (b.float() * t).T + linear.bias).bfloat16()
    as_good_as(y.flatten(0, 1), eager, exact)
    assert torch.cosine_similarity(y.float(), linear(x), dim=-1).min() > 0.998


def test_an_encoder_is_still_like_itself(dino, photo):
    images = torch.cat([photo(112), photo(112).flip(-1)])
    exact = dino(images)
    weights = copy.deepcopy(dino.network.state_dict())
    likeness = use_fp8(dino, images)
    assert fp8.LIKENESS < likeness < 1
    tokens = dino(images)
    assert tokens.dtype == torch.bfloat16
    measured = torch.cosine_similarity(tokens.float(), exact, dim=-1).mean().item()
    assert measured == likeness
    layers = [m for m in dino.network.modules() if isinstance(m, Fp8Linear)]
    assert len(layers) == 4 * 12  # qkv, proj, fc1, fc2 of twelve blocks
    assert not any(isinstance(m, nn.Linear) for m in dino.network.modules())
    # What the products do not use stays what it was, in bf16.
    left = dict(dino.network.named_parameters())
    assert left and all(torch.equal(p, weights[n].bfloat16()) for n, p in left.items())
    assert not any(p.requires_grad for p in dino.network.parameters())


def test_who_is_refused(dino, photo, monkeypatch):
    lite = build_encoder(
        EncoderConfig(name="tf_efficientnet_lite0", weights="random"), resolution=64, grid=4
    )
    with pytest.raises(ConfigError, match=r"'fp8' \(tf_efficientnet_lite0\): .* no linear layer"):
        use_fp8(lite, photo(64))
    with pytest.raises(ConfigError, match=r"'fp8' \(dinov2-vit-s\): there is no image"):
        use_fp8(dino, photo(112)[:0])
    check_likeness("x", 0.9991)
    for bad in (0.998, float("nan")):
        with pytest.raises(ConfigError, match=r"features of x too much: .* at least 0.999"):
            check_likeness("x", bad)
