"""Ten losses of the published recipe on a tiny model, from formulas that training has no part in.

A step is spelt out: keyed draws on Python's integers, latents of stored moments, SiT and projectors
sample by sample (tests/model/oracle.py), the loss, clipping, the rate and AdamW. From
`fastrepa` nothing is imported. `python -m tests.engine.training.recipe_oracle` writes the numbers
that `test_parity.py` holds the trainer to; they change only with the recipe itself.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.kernels.scalar import scalar_box_muller, scalar_philox
from tests.model import oracle

FIXTURE = Path(__file__).with_name("recipe_losses.json")
STEPS, BATCH, SEED = 10, 6, 3
LATENT, NOISE, TIME, LABEL_DROP = range(4)  # the streams of draws
CHANNELS, SIDE, PATCH, CLASSES = 4, 4, 2, 5
WIDTH, DEPTH, HEADS, BLOCK, PROJECTOR = 24, 3, 2, 2, 20
TOKENS = (SIDE // PATCH) ** 2

# Keys of the configuration: what REPA publishes, then every other shape that a recipe may take.
PUBLISHED: dict[str, Any] = {
    "objective.path": "linear",
    "objective.prediction": "velocity",
    "objective.time": "uniform",
    "objective.time_mean": 0.0,
    "objective.time_std": 1.0,
    "alignment.weight": 0.5,
    "model.label_dropout": 0.1,
    "model.qk_norm": False,
    "training.optimizer.lr": 1e-2,
    "training.optimizer.betas": [0.9, 0.999],
    "training.optimizer.weight_decay": 0.0,
    "training.clip": 1.0,
    "training.schedule.name": "constant",
    "training.schedule.warmup": 0,
    "training.schedule.final": 0.0,
}
CASES: dict[str, dict[str, Any]] = {
    "published": PUBLISHED,
    "cosine": PUBLISHED
    | {
        "objective.path": "cosine",
        "objective.time": "lognormal",
        "objective.time_mean": 0.3,
        "objective.time_std": 0.7,
        "alignment.weight": 1.3,
        "model.label_dropout": 0.4,
        "model.qk_norm": True,
        "training.optimizer.betas": [0.9, 0.95],
        "training.optimizer.weight_decay": 0.1,
        "training.clip": 0.3,
        "training.schedule.name": "cosine",
        "training.schedule.warmup": 3,
        "training.schedule.final": 0.1,
    },
    "data": PUBLISHED
    | {
        "objective.prediction": "data",
        "objective.time": "lognormal",
        "objective.time_mean": -1.5,  # every ninth time is below 0.05
        "objective.time_std": 1.2,
        "model.label_dropout": 0.5,
        "training.clip": 0.0,
        "training.schedule.warmup": 2,
    },
}
FEATURES: dict[str, list[int]] = {"published": [112, 120], "cosine": [112], "data": []}
"""The width of each encoder's tokens."""


# What a run starts from, and what it reads -------------------------------------------------------


def initial(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight by its name: float32, of such a size that nothing vanishes in the tiny model."""
    draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    size = 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
    centre = 1.0 if name.endswith("_norm.weight") else 0.0
    return torch.from_numpy(centre + size * draws).float()


def shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Every trained tensor of the model by its published name."""
    d, out = WIDTH, dict[str, tuple[int, ...]]()

    def linear(name: str, rows: int, columns: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns), (rows,)

    out["x_embedder.proj.weight"] = (d, CHANNELS, PATCH, PATCH)
    out["x_embedder.proj.bias"] = (d,)
    linear("t_embedder.mlp.0", d, 256)
    linear("t_embedder.mlp.2", d, d)
    out["y_embedder.embedding_table.weight"] = (CLASSES + 1, d)
    for i in range(DEPTH):
        linear(f"blocks.{i}.attn.qkv", 3 * d, d)
        linear(f"blocks.{i}.attn.proj", d, d)
        if CASES[case]["model.qk_norm"]:
            for part in ("q_norm", "k_norm"):
                out[f"blocks.{i}.attn.{part}.weight"] = (d // HEADS,)
                out[f"blocks.{i}.attn.{part}.bias"] = (d // HEADS,)
        linear(f"blocks.{i}.mlp.fc1", 4 * d, d)
        linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
        linear(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    for k, width in enumerate(FEATURES[case]):
        linear(f"projectors.{k}.0", PROJECTOR, d)
        linear(f"projectors.{k}.2", PROJECTOR, PROJECTOR)
        linear(f"projectors.{k}.4", width, PROJECTOR)
    linear("final_layer.linear", PATCH * PATCH * CHANNELS, d)
    linear("final_layer.adaLN_modulation.1", 2 * d, d)
    return out


def sample(case: str, step: int, number: int) -> dict[str, Any]:
    """Return what is stored of a sample: moments [2C,S,S] float32, its label, and of each encoder a
    scale [T] fp16 and tokens [T,Z] int8.
    """
    draws = np.random.RandomState(1000 * step + number)
    mean, std = draws.standard_normal((2, CHANNELS, SIDE, SIDE)) * 4
    stored = {
        "moments": np.concatenate([mean, np.abs(std) / 4]).astype(np.float32),
        "label": int(draws.randint(CLASSES)),
        "features": [],
    }
    for width in FEATURES[case]:
        scale = draws.uniform(0.01, 0.1, TOKENS).astype(np.float16)
        common = np.random.RandomState(width).randint(-80, 81, (TOKENS, width))  # can be learnt
        tokens = (common + draws.randint(-47, 48, (TOKENS, width))).astype(np.int8)
        stored["features"].append((scale, tokens))
    return stored


# One step ----------------------------------------------------------------------------------------


def words(stream: int, step: int, number: int, block: int = 0) -> tuple[int, ...]:
    return scalar_philox((block, number, step, stream << 24), (SEED, 0))


def uniform(stream: int, step: int, number: int) -> float:
    return ((words(stream, step, number)[0] >> 9) + 0.5) * 2.0**-23


def normal(stream: int, step: int, number: int, count: int) -> list[float]:
    values: list[float] = []
    for block in range(-(-count // 4)):
        w = words(stream, step, number, block)
        values += [*scalar_box_muller(w[0], w[1]), *scalar_box_muller(w[2], w[3])]
    return [float(np.float32(value)) for value in values[:count]]


def time(recipe: dict[str, Any], step: int, number: int) -> float:
    if recipe["objective.time"] == "uniform":
        return uniform(TIME, step, number)
    n = normal(TIME, step, number, 1)[0]
    ratio = math.exp(recipe["objective.time_mean"] + recipe["objective.time_std"] * n)
    if recipe["objective.path"] == "linear":
        return ratio / (1 + ratio)
    return 2 / math.pi * math.atan(ratio)


def step_losses(
    case: str, weights: dict[str, Tensor], step: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (loss, velocity loss, alignment loss or None) of a step's samples."""
    recipe, latent = CASES[case], (CHANNELS, SIDE, SIDE)
    squares, hiddens, targets = [], [], []
    for number in range(BATCH):
        stored = sample(case, step, number)
        mean, std = torch.from_numpy(stored["moments"]).to(dtype).chunk(2)
        latent_noise, noise = (
            torch.tensor(normal(stream, step, number, math.prod(latent)), dtype=dtype).view(latent)
            for stream in (LATENT, NOISE)
        )
        z = (mean + std * latent_noise) * 0.18215
        t = time(recipe, step, number)
        x, wanted = oracle.interpolate(recipe["objective.path"], z, noise, t)
        dropped = uniform(LABEL_DROP, step, number) < recipe["model.label_dropout"]
        label = CLASSES if dropped else stored["label"]
        found, hidden = oracle.velocity_and_hidden(
            weights, x, torch.tensor(t, dtype=dtype), label, heads=HEADS, patch=PATCH, block=BLOCK
        )
        if recipe["objective.prediction"] == "data":  # on the linear path
            found, wanted = (x - found) / max(t, 0.05), (x - z) / max(t, 0.05)
        squares.append((found - wanted).square().mean())
        hiddens.append(hidden)
        targets.append(
            [
                torch.from_numpy(s).to(dtype)[:, None] * torch.from_numpy(q).to(dtype)
                for s, q in stored["features"]
            ]
        )
    velocity = torch.stack(squares).mean()
    if not FEATURES[case]:
        return velocity, velocity, None
    alignment = oracle.alignment(weights, hiddens, list(zip(*targets, strict=True)))
    return velocity + recipe["alignment.weight"] * alignment, velocity, alignment


def rate(recipe: dict[str, Any], step: int) -> float:
    lr, warmup = recipe["training.optimizer.lr"], recipe["training.schedule.warmup"]
    if step < warmup:
        return lr * (step + 1) / warmup
    if recipe["training.schedule.name"] == "constant":
        return lr
    final, phase = recipe["training.schedule.final"], (step - warmup) / (STEPS - warmup)
    return lr * (final + (1 - final) * (1 + math.cos(math.pi * phase)) / 2)


def losses(case: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Return loss, velocity_loss and, with encoders, alignment_loss of each of the ten steps."""
    recipe = CASES[case]
    fixed = {"pos_embed": oracle.position_embedding(WIDTH, SIDE // PATCH)[None].float().to(dtype)}
    trained = {
        name: initial(name, shape).to(dtype).requires_grad_()
        for name, shape in shapes(case).items()
    }
    first = {name: torch.zeros_like(w) for name, w in trained.items()}
    second = {name: torch.zeros_like(w) for name, w in trained.items()}
    beta1, beta2 = recipe["training.optimizer.betas"]
    found: dict[str, list[float]] = {"loss": [], "velocity_loss": [], "alignment_loss": []}
    for step in range(STEPS):
        values = step_losses(case, fixed | trained, step, dtype)
        for kept, value in zip(found.values(), values, strict=True):
            kept.extend([] if value is None else [value.item()])
        gradients = torch.autograd.grad(values[0], list(trained.values()), materialize_grads=True)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        clip = recipe["training.clip"]
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        lr, decay = rate(recipe, step), recipe["training.optimizer.weight_decay"]
        for (name, w), g in zip(trained.items(), gradients, strict=True):
            g = g * scale
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g**2
            m, v = first[name] / (1 - beta1 ** (step + 1)), second[name] / (1 - beta2 ** (step + 1))
            with torch.no_grad():
                w -= lr * decay * w
                w -= lr * m / (v.sqrt() + 1e-8)
    return {name: values for name, values in found.items() if values}


def main() -> None:
    numbers = {
        case: {
            str(d).removeprefix("torch."): losses(case, d) for d in (torch.float64, torch.float32)
        }
        for case in CASES
    }
    FIXTURE.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
