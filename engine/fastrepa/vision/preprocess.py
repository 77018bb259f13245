"""Makes an encoder's input of a uint8 image, exactly as REPA prepares it, on the device.

    x = image / 255;  x = (x - mean) / std;  x = bicubic(x, side)      order "normalise-resize"
    x = image / 255;  x = bicubic(x, side);  x = (x - mean) / std      order "resize-normalise"

The resize is torch's bicubic with a = -0.75, align_corners=False, antialias=False and no clamp.
Everything runs in fp32. B batch, R image side, S encoder side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrepa.vision.registry import Recipe


class Preprocess(nn.Module):
    """Prepares image_u8 [B,3,R,R] uint8 -> [B,3,S,S] fp32, where S is `side`."""

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: Recipe, side: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.side = side
        self.order = recipe.order
        for name, value in (("mean", recipe.mean), ("std", recipe.std)):
            tensor = torch.tensor(value, dtype=torch.float32, device=device).view(1, 3, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, image_u8: Tensor) -> Tensor:
        if image_u8.dtype != torch.uint8:
            raise TypeError(f"image_u8 must be uint8, not {image_u8.dtype}")
        if image_u8.ndim != 4 or image_u8.shape[1] != 3:
            raise ValueError(f"image_u8 must be [B,3,R,R], not {list(image_u8.shape)}")
        x = image_u8.to(torch.float32) / 255
        if self.order == "resize-normalise":
            return self._normalise(self._resize(x))
        return self._resize(self._normalise(x))

    def _normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def _resize(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.side, self.side):
            return x
        size = (self.side, self.side)
        return F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=False)
