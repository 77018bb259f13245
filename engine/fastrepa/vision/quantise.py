"""Patch tokens as int8 with a scale of their own: what the feature cache stores.

    scale[t] = max_z |x[t,z]| / 127        tokens[t,z] = round(x[t,z] / scale[t])

x [B,T,Z] float; scale [B,T] fp16; tokens [B,T,Z] int8 in -127 .. 127. The scale is rounded up to
fp16 before it divides, so that no rounding of its own is left in the product. An alignment by
cosine does not even see the scale; losses that keep the length of features do.

The error of a value is at most half a step, scale / 2, so the cosine of a token to x is at least
1 - c^2 / (8 * 127^2) with c = max / rms of its values (c^2 <= Z): 0.9991 for c = 11. (Where the
scale is below 6e-5, fp16's smallest normal number, the step is coarser by its rounding.)
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127
_FP16_MIN, _FP16_MAX = 2.0**-24, 65504.0


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale fp16 [B,T], tokens int8 [B,T,Z]) of x [B,T,Z]; a token of zeros stays one.

    Raises ValueError for values that are not finite, or too large for an fp16 scale.
    """
    x = x.to(torch.float32)
    peak = x.abs().amax(-1)
    # One look at the device for both: NaN compares false.
    if not bool((peak <= LEVELS * _FP16_MAX).all()):
        raise ValueError("features that are not finite, or above 127 * 65504")
    scale = (peak / LEVELS).clamp(min=_FP16_MIN).to(torch.float16)
    # Rounded down, it would leave the peak beyond 127 steps: take the next fp16 number above.
    short = scale.to(torch.float32) * LEVELS < peak
    scale = (scale.view(torch.int16) + short.to(torch.int16)).view(torch.float16)
    return scale, (x / scale.to(torch.float32).unsqueeze(-1)).round().to(torch.int8)


def dequantise(scale: Tensor, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return x [B,T,Z] in `dtype`: the fp32 product of scale [B,T] and tokens, rounded once."""
    return (tokens.to(torch.float32) * scale.to(torch.float32).unsqueeze(-1)).to(dtype)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of every token of x and y [B,T,Z], fp32 [B,T]; 1 where both are zero."""
    x, y = x.to(torch.float32), y.to(torch.float32)
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    both_zero = (x.norm(dim=-1) == 0) & (y.norm(dim=-1) == 0)
    return torch.where(both_zero, 1.0, (x * y).sum(-1) / norms.clamp(min=1e-30))
