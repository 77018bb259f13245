"""flops: counts against torch's counter over what the engine really runs, within 1 %."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastrepa.config import EncoderConfig, config_from_dict
from fastrepa.model.flops import model_flops
from fastrepa.model.sit import SiT
from fastrepa.training.memory.frozen import frozen_flops
from fastrepa.vision.features import FrozenEncoder, cut, plan_encoder


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
        cut(network, plan.index, plan.norm)
        frozen = FrozenEncoder(
            network, plan, name=name, digest="", grid=plan.own_grid[0], rule="exact",
            resolution=256, dtype=torch.float32, device="meta",
        )  # fmt: skip
        images = torch.empty(2, 3, 256, 256, dtype=torch.uint8)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            frozen(images)
    online = config_of(encoder)
    ours = frozen_flops(online.data, online.vision, [plan], cached_latents=False)
    assert ours == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    assert ours > 1e8
    cached = config_of(None, vision={"encoders": [encoder], "targets": "cached"})
    assert frozen_flops(cached.data, cached.vision, [plan], cached_latents=False) == 0


def test_gradients_that_nobody_wants_are_not_counted():
    """They are those of the noisy latent and of the time's sines."""
    shape = {"width": 32, "depth": 1, "heads": 2, "patch": 4, "num_classes": 8}
    config = config_of(None, model=shape)
    model = SiT.from_config(config, side=32, channels=3, encoder_widths=[])

    def counted(wanted):
        x, t = (v.requires_grad_(wanted) for v in (torch.randn(2, 3, 32, 32), torch.rand(2)))
        with FlopCounterMode(display=False) as counter:
            model(x, t, torch.zeros(2, dtype=torch.int64)).sum().backward()
        return counter.get_total_flops()

    flops = model_flops(config.model, config.alignment, side=32, channels=3, encoder_widths=[])
    assert 3 * flops.forward - flops.training == (counted(True) - counted(False)) / 2
