"""flops: counts against torch's counter over what the engine really runs, within 1 %."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastrepa.config import EncoderConfig, config_from_dict
from fastrepa.training.frozen import frozen_flops
from fastrepa.vision.features import FrozenEncoder, _cut, plan_encoder


def config_of(encoder, **keys):
    return config_from_dict(
        {
            "run": "run",
            "data": {"path": "nowhere", "codec": {"name": "pixel", "side": 32}},
            "vision": {"encoders": [encoder] if encoder else []},
            "model": {"name": "SiT-S/2"},
            "kernels": "eager",
            **keys,
        }
    )


@pytest.mark.parametrize(
    "name",
    ["dinov2-vit-s", "dinov2-vit-b", "dinov2-vit-l", "dinov2reg-vit-b", "clip-vit-l", "mae-vit-l",
     "tf_efficientnet_lite0"],
)  # fmt: skip
def test_encoders(name):
    """The engine's own encoder, preprocessing and tokens included, on two images."""
    import timm

    encoder = {"name": name}
    plan = plan_encoder(EncoderConfig(**encoder), resolution=256)
    with torch.device("meta"), torch.no_grad():
        network = timm.create_model(plan.recipe.timm_name, **plan.timm_args)
        _cut(network, plan.index, plan.norm)
        frozen = FrozenEncoder(
            network, plan, name=name, digest="", grid=plan.own_grid[0], rule="exact",
            resolution=256, dtype=torch.float32, device="meta",
        )  # fmt: skip
        images = torch.empty(2, 3, 256, 256, dtype=torch.uint8)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            frozen(images)
    ours = frozen_flops(config_of(encoder), [plan], cached_latents=False)
    assert ours == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    assert ours > 1e8
    cached = config_of(None, vision={"encoders": [encoder], "targets": "cached"})
    assert frozen_flops(cached, [plan], cached_latents=False) == 0
