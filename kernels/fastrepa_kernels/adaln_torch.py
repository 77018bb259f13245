"""The torch path of adaln.py, for a CPU and for float64: some samples at a time, in its caches.

Shapes as there: x, branch, y, dy [B,T,D]; shift, scale, gate [B,D]; mean, rstd [B,T]. What a
variant does not take is None.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrepa_kernels import launch

_CPU_BLOCK = 1 << 18  # elements: five or so fp32 buffers of 1 MiB stay in a CPU's caches


def _samples(x: Tensor, *others: Tensor | None) -> Iterator[list[Any]]:
    """Yield as many samples of each tensor at a time as stay in a CPU's caches."""
    count = max(1, _CPU_BLOCK // max(1, x[:1].numel()))
    for start in range(0, x.shape[0], count):
        yield [None if t is None else t[start : start + count] for t in (x, *others)]


def norm_modulate_torch(x, branch, gate, shift, scale, eps, out_dtype):
    """Return (x_new, y, mean, rstd) as adaln._norm_modulate does."""
    wide = launch.arithmetic_dtype(x)
    kept = torch.empty_like(x) if branch is not None else None
    y = torch.empty_like(x, dtype=out_dtype)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=wide) for _ in range(2))
    for part in _samples(x, branch, gate, kept, shift, scale, y, mean, rstd):
        _norm_modulate_part(*part, eps=eps, wide=wide)
    return x.new_empty(0) if kept is None else kept, y, mean, rstd


def _norm_modulate_part(x, branch, gate, kept, shift, scale, y, mean, rstd, *, eps, wide):
    """Write kept, y and the statistics of some samples."""
    xw = x.to(wide)
    if kept is not None:
        update = xw, branch.to(wide), gate.to(wide)[:, None]
        if kept.dtype == wide:
            xw = torch.addcmul(*update, out=kept)
        else:
            xw = kept.copy_(torch.addcmul(*update)).to(wide)  # what backward will see
    # In passes that ATen vectorises: its own layer norm takes a CPU more than twice as long.
    h = torch.sub(xw, torch.mean(xw, -1, out=mean)[..., None])
    torch.linalg.vector_norm(h, dim=-1, out=rstd)
    rstd.square_().div_(xw.shape[-1]).add_(eps).rsqrt_()
    _modulate_torch(h.mul_(rstd[..., None]), shift, scale, out=y, buffer=h)


def _modulate_torch(h, shift, scale, out, buffer):
    """Write h (1 + scale) + shift to out, [B,T,D], through `buffer`, which may be h."""
    torch.mul(h, 1 + scale.to(h.dtype)[:, None], out=buffer)
    shift = shift.to(h.dtype)[:, None]
    if out.dtype == h.dtype:
        torch.add(buffer, shift, out=out)
    else:
        out.copy_(buffer.add_(shift))


def norm_gradients_torch(
    dy, dx_new, x, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, totals
):
    """Write dx, dbranch, y and, where they are not empty, the totals (dshift, dscale, dgate)."""
    wide = launch.arithmetic_dtype(x)
    dbranch = None if branch is None else dbranch
    into = [v.to(wide) if v.numel() else None for v in totals]  # v itself where it is wide
    for part in _samples(
        x, dy, dx_new, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, *into
    ):
        _norm_gradients_part(*part, wide=wide)
    for total, value in zip(totals, into, strict=True):
        if value is not None and value is not total:
            total.copy_(value)


def _norm_gradients_part(
    x, dy, dx_new, branch, gate, shift, scale, mean, rstd, dx, dbranch, y, dshift, dscale, dgate,
    *, wide,
):  # fmt: skip
    """Write dx, dbranch, y and the sums of some samples."""
    x, dy = x.to(wide), dy.to(wide)
    mean, rstd = mean[..., None], rstd[..., None]
    g = dy * (1 + scale.to(wide)[:, None])
    grad = torch.ops.aten.native_layer_norm_backward(
        g, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]
    if dx_new is None or dx_new.dtype != dx.dtype or dx.dtype != wide:
        dx.copy_(grad if dx_new is None else grad.add_(dx_new))
    else:
        grad = torch.add(grad, dx_new, out=dx)
    if dshift is not None or y is not None:
        h = torch.sub(x, mean, out=g).mul_(rstd)  # g has done its work
    if y is not None:
        _modulate_torch(h, shift, scale, out=y, buffer=torch.empty_like(h))
    if dshift is not None:
        torch.sum(dy, 1, out=dshift)
        torch.sum(h.mul_(dy), 1, out=dscale)
    if dgate is not None:
        torch.sum(torch.mul(branch.to(wide), grad, out=g), 1, out=dgate)
    if dbranch is not None:
        gate = gate.to(wide)[:, None]
        if dbranch.dtype == wide:
            torch.mul(grad, gate, out=dbranch)
        else:
            dbranch.copy_(torch.mul(grad, gate, out=g))
