"""A configuration's measures: FLOPs by torch's counter, memory of what is frozen, what is run."""

import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastrepa.commands.bench.peak_memory import highest
from fastrepa.config import config_from_dict, load_config
from fastrepa.model.sit import SiT
from fastrepa.training.memory.activations import frozen_network
from fastrepa.training.memory.workload import measure_workload
from tests.runs import ROOT


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_flops_against_torchs_counter(size):
    vision = {"targets": "cached", "encoders": [{"name": "vit_tiny_patch16_224", "input": 256}]}
    config = config_from_dict(
        {
            "run": "run",
            "data": {"path": "nowhere", "codec": {"name": "pixel", "side": 32}},
            "model": {"name": f"SiT-{size}/2"},
            "vision": vision,
            "kernels": "eager",
            "training": {"precision": "fp32"},
        }
    )
    work = measure_workload(config)
    with torch.device("meta"):
        model = SiT.from_config(config, side=32, channels=3, encoder_widths=[192])
        inputs = torch.empty(2, 3, 32, 32), torch.empty(2), torch.zeros(2, dtype=torch.int64)
        target, drop = torch.empty(2, 256, 192), torch.zeros(2, dtype=torch.bool)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
            velocity, alignment = model(*inputs, [target], drop)
        with FlopCounterMode(display=False) as backward:
            (velocity.sum() + alignment).backward()
    counted = forward.get_total_flops() / 2
    assert work.forward_flops == pytest.approx(counted, rel=0.01)
    assert work.training_flops == pytest.approx(counted + backward.get_total_flops() / 2, rel=0.01)


def test_a_frozen_networks_memory_and_flops():
    import timm

    def build():
        return timm.create_model("vit_tiny_patch16_224", img_size=64).eval()

    def run(network, batch, dtype):
        return network(torch.empty(batch, 3, 64, 64, dtype=dtype))

    frozen, real = frozen_network(build, run, torch.float32), build()
    assert frozen.weights == sum(4 * p.numel() for p in real.parameters())
    with torch.no_grad():
        peak = highest(lambda: run(real, 32, torch.float32), torch.device("cpu"))
    assert frozen.at(32) == pytest.approx(peak, rel=0.1)
    d, t, blocks = 192, 17, 12
    products = blocks * (12 * t * d * d + 2 * t * t * d) + 16 * 768 * d + d * 1000
    assert frozen.flops == pytest.approx(2 * products, rel=0.01)


def test_frozen_networks_run_only_where_nothing_is_stored(monkeypatch):
    recipe = ROOT / "configs/imagenet256_sit_b2_dinov2b.yaml"
    common = ["data.path=nowhere", "data.latents=online", "vision.targets=online"]
    work = measure_workload(load_config(recipe, common))
    # DINOv2-B at 224 px: 12 blocks of 257 tokens and the patch embedding.
    blocks = 12 * (12 * 257 * 768**2 + 2 * 257**2 * 768)
    assert work.encoders[0][1].flops == pytest.approx(2 * (blocks + 256 * 588 * 768), rel=0.01)
    # Stable Diffusion's encoder at 256 px: its first two convolutions alone are 39 GFLOP.
    assert work.codec_encoder.flops > 2 * 256**2 * 9 * 128 * (3 + 128)
    assert work.codec_weights == 2 * work_parameters()
    assert "image" in work.input_is and "moments" not in work.input_is
    ready = ["data.path=nowhere", "data.latents=cached", "vision.targets=cached"]
    stored = measure_workload(load_config(recipe, ready))
    assert stored.encoders == () and stored.codec_encoder is None
    assert stored.codec_weights == work.codec_weights and stored.codec_decoder  # grids are drawn
    assert stored.input_bytes == 8 * 32 * 32 * 2 + 4 + 256 * (768 + 2) + 4
    monkeypatch.setitem(sys.modules, "diffusers", None)
    undrawn = measure_workload(load_config(recipe, [*ready, "training.sample_every=0"]))
    assert undrawn.codec_weights == work.codec_weights and not undrawn.codec_decoder


def work_parameters():
    from fastrepa.vision.codec import random_sd_vae

    with torch.device("meta"):
        return sum(p.numel() for p in random_sd_vae().parameters())
