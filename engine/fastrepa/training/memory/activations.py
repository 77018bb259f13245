"""Memory that a forward and backward pass holds beside the weights, found without computing it.

The real model runs on torch's fake tensors, which have shapes and no values, and a meter follows
every storage from its allocation to its release. So the prediction is about this code, fused or
eager, with or without recomputation, and not about a formula for it. What it cannot see are buffers
inside fused operations, which live for one operation and are small beside a block.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fastrepa.config import Config
from fastrepa.model.flops import counted_flops
from fastrepa.model.sit import SiT


def _inside_adaln_mlp_backward(args: tuple[Any, ...]) -> tuple[int, int]:
    """GELU's gradient and, where it was not kept, its output h, each as large as the pre-activation
    a; then the former with the norm's output and its gradient, each [N,D].
    """
    x, a, h, w1 = args[2], args[9], args[10], args[11]
    return 2 * a.nbytes - h.nbytes, a.nbytes + 2 * x.numel() * w1.itemsize


# What a fused operation holds inside itself, by its arguments: (before its results are made, beside
# them), in bytes.
INSIDE: dict[str, Callable[[tuple[Any, ...]], tuple[int, int]]] = {
    "fastrepa::adaln_mlp_backward": _inside_adaln_mlp_backward,
}
BATCHES = (2, 4)  # two batch sizes give the line that every other one lies on


@dataclass(frozen=True)
class MemoryCurve:
    """Live bytes, besides the weights, between one parameter's gradient and the next.

    fixed, per_image: bytes, the highest of interval i being fixed[i] + batch * per_image[i];
    done: elements of gradients that were complete before interval i. Gradients are counted while
    they are new, and not kept.
    """

    fixed: tuple[float, ...]
    per_image: tuple[float, ...]
    done: tuple[int, ...]

    def at(self, batch: int) -> list[float]:
        return [f + batch * p for f, p in zip(self.fixed, self.per_image, strict=True)]


def training_curve(
    config: Config, *, side: int, channels: int, encoder_widths: Sequence[int]
) -> MemoryCurve:
    """The curve of the generator's forward and backward, with the configuration's precision,
    training.recompute and training.keep (auto: none).
    """
    (low, done), (high, again) = (
        _trace(config, batch, side, channels, encoder_widths) for batch in BATCHES
    )
    assert done == again
    first, second = BATCHES
    per_image = [(b - a) / (second - first) for a, b in zip(low, high, strict=True)]
    fixed = [a - first * p for a, p in zip(low, per_image, strict=True)]
    return MemoryCurve(tuple(fixed), tuple(per_image), tuple(done))


@dataclass(frozen=True)
class Frozen:
    """A network that is only looked at: bytes of its weights, bytes of its forward at the highest
    (fixed + batch * per_image), FLOPs per image.
    """

    weights: int
    fixed: float
    per_image: float
    flops: int

    def at(self, batch: int) -> float:
        return self.fixed + batch * self.per_image


def frozen_network(
    build: Callable[[], nn.Module],
    run: Callable[[Any, int, torch.dtype], Any],
    dtype: torch.dtype,
) -> Frozen:
    """Measure what `run(network, batch, dtype)` takes outside autograd; it makes its own input."""
    flops, network = counted_flops(build, lambda network: run(network, 1, torch.float32))
    with FakeTensorMode(), torch.no_grad():
        _fake(network, dtype)
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        peaks = []
        for batch in BATCHES:
            with _Meter(network) as meter:
                run(network, batch, dtype)
            peaks.append(meter.peak)
    per_image = (peaks[1] - peaks[0]) / (BATCHES[1] - BATCHES[0])
    fixed = peaks[0] - BATCHES[0] * per_image
    return Frozen(weights, fixed, per_image, flops)


class _Meter(TorchDispatchMode):
    """Live and highest bytes of the storages that were made inside; a module's own are left out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in (*module.parameters(), *module.buffers()):
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, beside = INSIDE.get(func._schema.name, _nothing)(args)
        self.peak = max(self.peak, self.live + before)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._seen:
                    self._seen[storage] = True
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    # torch keeps a storage's Python object while anything in C++ holds it.
                    weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.live + beside)
        return out

    def _release(self, size: int) -> None:
        self.live -= size


def _nothing(args: tuple[Any, ...]) -> tuple[int, int]:
    return 0, 0


def _trace(
    config: Config,
    batch: int,
    side: int,
    channels: int,
    encoder_widths: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Return (highest bytes per interval, gradient elements complete before it)."""
    dtype = config.training.dtype
    peaks: list[int] = []
    done = [0]
    # "math" keeps the T x T probabilities; every other backend keeps what torch's flash does.
    attention = "math" if config.attention.backend == "math" else "sdpa-flash"
    with torch.device("meta"):
        model = SiT.from_config(
            config,
            side=side,
            channels=channels,
            encoder_widths=encoder_widths,
            attention=attention,
        )
    with FakeTensorMode():
        _fake(model, dtype)
        model.train()
        tokens = (side // model.patch) ** 2
        with _Meter(model) as meter:

            def close_interval(parameter: Tensor) -> None:
                peaks.append(meter.peak)
                done.append(done[-1] + parameter.numel())
                parameter.grad = None
                meter.peak = meter.live

            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(close_interval)
            x = torch.randn(batch, channels, side, side)
            t, drop = torch.rand(batch), torch.ones(batch, dtype=torch.bool)
            labels = torch.zeros(batch, dtype=torch.int64)
            targets = [torch.randn(batch, tokens, z, dtype=dtype) for z in encoder_widths]
            out = model(x, t, labels, targets or None, drop)
            velocity, alignment = out if targets else (out, 0.0)
            loss = (velocity - x).square().mean() + alignment
            del out, velocity, alignment
            loss.backward()
            peaks.append(meter.peak)
    return peaks, done


def _fake(network: nn.Module, dtype: torch.dtype) -> None:
    """Turn a network built on the meta device into fake CPU tensors, floating point in `dtype`."""
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fake = nn.Parameter(_empty(p, dtype), requires_grad=p.requires_grad)
            setattr(module, name, fake)
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, _empty(b, dtype))


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype if like.is_floating_point() else like.dtype)
