"""A generator of a few channels, and a run of it that was never trained."""

from __future__ import annotations

from typing import Any

import torch

from fastrepa.checkpoint.format import RunState
from fastrepa.config import Config, config_from_dict
from fastrepa.model.sit import SiT
from fastrepa.vision.codec import PixelCodec

SIDE, CLASSES = 16, ["Animals & Nature", "Food", "food", "Objects", "3"]
CODEC = PixelCodec(SIDE, SIDE)


def tiny_config() -> Config:
    return config_from_dict(
        {
            "run": "unused",
            "data": {
                "path": "unused",
                "resolution": SIDE,
                "codec": {"name": "pixel", "side": SIDE},
            },
            "model": {"width": 48, "depth": 2, "heads": 4, "patch": 4, "num_classes": len(CLASSES)},
            "sample": {"num": 10, "sampler": "ode", "steps": 4, "cfg": 2.0},
            "training": {"precision": "bf16"},
        }
    )


def tiny_model() -> SiT:
    """A generator whose every weight is at work (a fresh one outputs zero)."""
    model = SiT.from_config(tiny_config(), side=SIDE, channels=3, encoder_widths=())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    return model.eval()


def fake_run(run: Any, device: torch.device, wanted: Any = None) -> tuple[SiT, Config, Any]:
    info = RunState(
        step=500, optimizer_step=500, samples_seen=5000, side=SIDE, channels=3, encoder_widths=[],
        classes=CLASSES, world_size=1,
    )  # fmt: skip
    return tiny_model().to(device), tiny_config(), info
