"""A real photo, the registry in small, and the one rule of accuracy, for the encoder tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastrepa.vision.registry import REGISTRY
from tests.vision.transformer import HEADS, WIDTH


def load_photo(side: int) -> Tensor:
    """matplotlib's sample portrait (public domain: Grace Hopper in uniform) as [1,3,side,side]."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image = Image.open(path).convert("RGB").crop((0, 0, 512, 512))
    pixels = np.array(image.resize((side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


@pytest.fixture(scope="session")
def photo():
    return load_photo


def distance(a: Tensor, exact: Tensor) -> float:
    return ((a.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.fixture(scope="session")
def as_good_as():
    """error(ours, float64) <= 2 x error(eager, float64) + one rounding unit."""

    def check(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert ours.shape == eager.shape == exact.shape
        assert ours.dtype == eager.dtype
        allowed = 2 * distance(eager, exact) + torch.finfo(ours.dtype).eps
        assert distance(ours, exact) <= allowed, (distance(ours, exact), allowed)

    return check


@pytest.fixture
def shrink(monkeypatch):
    """The registry's row with a narrow and shallow network, otherwise as it is."""

    def shrink(name, depth=2):
        row = REGISTRY[name]
        args = {**row.timm_args, "embed_dim": WIDTH, "depth": depth, "num_heads": HEADS}
        monkeypatch.setitem(REGISTRY, name, replace(row, timm_args=args, width=WIDTH))
        return REGISTRY[name]

    return shrink
