"""A whole training step of the generator: forward, both losses, backward, AdamW and EMA.

    python -m benchmarks.training_step --model SiT-S/2 --batch 2 --device cpu

Providers: ours (fused kernels), eager (their eager twins), compile (the eager twins under
torch.compile). bf16 weights with float32 masters, as the engine's ZeRO keeps them; same weights and
same batch for all, measured in alternation. Before any time is taken, every provider's losses are
held against eager's in float32: no time is recorded for a wrong result.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.run import RECORDS, append, environment, quantile

FEATURES = 768
KERNELS = {"ours": "fused", "eager": "eager", "compile": "eager"}


def build(model: str, kernels: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A SiT with one projector, seeded, its zero-initialised layers too (or nothing would flow)."""
    from fastrepa.config import SIT_MODELS
    from fastrepa.model.sit import SiT

    width, depth, heads, block = SIT_MODELS[model.partition("/")[0]]
    torch.manual_seed(0)
    sit = SiT(
        side=32, channels=4, width=width, depth=depth, heads=heads, num_classes=1000,
        patch=int(model.partition("/")[2]), encoder_widths=[FEATURES], alignment_block=block,
        kernels=kernels, label_dropout=0.0,
    )  # fmt: skip
    for p in sit.parameters():
        if p.requires_grad and not p.any() and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
    return sit.to(device=device, dtype=dtype)


def batch_of(size: int, device: torch.device, tokens: int = 256) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(1)
    x, velocity = torch.randn(2, size, 4, 32, 32, generator=g).to(device)
    t, targets = torch.rand(size, generator=g), torch.randn(size, tokens, FEATURES, generator=g)
    labels = torch.randint(0, 1000, (size,), generator=g)
    return x, t.to(device), labels.to(device), [targets.to(device, torch.bfloat16)], velocity


def losses(model: Callable[..., Any], batch: tuple[Any, ...]) -> Tensor:
    x, t, labels, targets, wanted = batch
    velocity, alignment = model(x, t, labels, targets)
    return (velocity - wanted).square().mean() + 0.5 * alignment


class Step:
    """One provider: bf16 weights, float32 masters, AdamW with EMA."""

    def __init__(self, model: str, provider: str, device: torch.device) -> None:
        from fastrepa.config import OptimizerConfig, TrainingConfig
        from fastrepa.training.ema import AdamWEMA

        self.kernels = KERNELS[provider]
        self.model = build(model, self.kernels, device, torch.bfloat16)
        self.forward = torch.compile(self.model) if provider == "compile" else self.model
        self.low = [p for p in self.model.parameters() if p.requires_grad]
        # One flat master, as a ZeRO partition is.
        self.master = torch.cat([p.detach().float().flatten() for p in self.low]).requires_grad_()
        self.optimizer = AdamWEMA(
            [self.master], OptimizerConfig(), emas=TrainingConfig().ema, kernels=self.kernels
        )
        self.optimizer.set_rate(1e-4)

    def __call__(self, batch: tuple[Any, ...]) -> None:
        losses(self.forward, batch).backward()
        self.master.grad = torch.cat([_grad(p).float().flatten() for p in self.low])
        self.optimizer.step()
        parts = self.master.detach().split([p.numel() for p in self.low])
        torch._foreach_copy_(
            [p.detach() for p in self.low],
            [part.view_as(p) for part, p in zip(parts, self.low, strict=True)],
        )
        self.model.zero_grad(set_to_none=True)


def measure_steps(
    model: str, batch: int, device: torch.device, providers: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Records of one training step for every provider, side by side."""
    data = batch_of(batch, device)
    with torch.no_grad():
        exact = losses(build(model, "eager", device, torch.float32), data).item()
    steps = {name: Step(model, name, device) for name in providers}
    errors = {}
    for name, step in steps.items():
        with torch.no_grad():
            errors[name] = abs(losses(step.forward, data).item() - exact) / abs(exact)
    allowed = 2 * errors["eager"] + torch.finfo(torch.bfloat16).eps
    wrong = {n: e for n, e in errors.items() if e > allowed}
    if wrong:
        raise RuntimeError(f"training step of {model}: wrong losses, nothing measured: {wrong}")
    times: dict[str, list[float]] = {name: [] for name in providers}
    peaks: dict[str, int] = {}
    for repeat in range(repeats + 2):  # two to warm up
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            step(data)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peaks[name] = torch.cuda.max_memory_allocated(device)
            if repeat >= 2:
                times[name].append(1000 * (time.perf_counter() - began))
    return [
        {
            "case": "training_step", "provider": name, "direction": "step",
            "shape": f"{model} b{batch} t256", "dtype": "bf16", "n": repeats,
            **{f"p{q}_ms": quantile(times[name], q / 100) for q in (20, 50, 80)},
            "images_per_s": 1000 * batch / quantile(times[name], 0.5),
            "peak_bytes": peaks.get(name, 0), "saved_bytes": 0, "error": errors[name],
        }
        for name in providers
    ]  # fmt: skip


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step")
    parser.add_argument("--model", default="SiT-B/2")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--providers", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    providers = list(dict.fromkeys(["eager", *options.providers]))
    records = measure_steps(options.model, options.batch, device, providers, options.repeats)
    append(RECORDS / f"training_step_{device.type}.jsonl", records, environment(device))
    for r in records:
        print(f"{r['provider']:8} {r['p50_ms']:10.1f} ms  {r['images_per_s']:8.1f} images/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
