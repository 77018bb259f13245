"""The trainer's losses are the published recipe's, by numbers that it had no part in.

`recipe_losses.json` was made once by `recipe_oracle.py`, in float64 and, for the rule of accuracy,
in float32.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastrepa.config import load_config
from fastrepa.data.pipeline import Batch, StoredFeatures
from fastrepa.model.sit import SiT
from fastrepa.training.trainer import Trainer
from tests.kernels.accuracy import assert_as_good_as_eager
from tests.runs import ROOT
from tests.training import recipe_oracle as recipe

ENCODERS = {112: "tf_efficientnet_lite0", 120: "tf_efficientnet_lite2"}  # by width
FORWARDS = 2  # of a step
FROZEN = json.loads(recipe.FIXTURE.read_text())


def batches(case):
    """Every micro-batch of the ten steps."""
    size = recipe.BATCH // FORWARDS
    for step in range(recipe.STEPS):
        for start in range(0, recipe.BATCH, size):
            stored = [recipe.sample(case, step, n) for n in range(start, start + size)]
            features = [
                StoredFeatures(*(torch.from_numpy(np.stack(p)) for p in zip(*of_one, strict=True)))
                for of_one in zip(*(s["features"] for s in stored), strict=True)
            ]
            yield Batch(
                image_u8=None,
                moments=torch.from_numpy(np.stack([s["moments"] for s in stored])),
                label=torch.tensor([s["label"] for s in stored]),
                features=tuple(features),
            )


def trainer_of(case, world, monkeypatch, kernels):
    def initial(model):
        with torch.no_grad():
            found = {n: p for n, p in model.named_parameters() if p.requires_grad}
            assert {n: tuple(p.shape) for n, p in found.items()} == recipe.shapes(case)
            for name, p in found.items():
                p.copy_(recipe.initial(name, tuple(p.shape)))

    monkeypatch.setattr(SiT, "reset_parameters", initial)
    encoders = ", ".join(
        f"{{name: {ENCODERS[width]}, input: 32}}" for width in recipe.FEATURES[case]
    )
    config = load_config(
        ROOT / "configs/quickstart.yaml",
        [
            "run=nowhere", f"seed={recipe.SEED}", "data.resolution=32",
            "data.codec={name: sd-vae}", "data.latents=cached",
            f"model={{width: {recipe.WIDTH}, depth: {recipe.DEPTH}, heads: {recipe.HEADS}, "
            f"patch: {recipe.PATCH}, num_classes: {recipe.CLASSES}}}",
            f"alignment={{block: {recipe.BLOCK}, projector_width: {recipe.PROJECTOR}}}",
            "vision.targets=cached", f"vision.encoders=[{encoders}]",
            f"training.steps={recipe.STEPS}", f"training.global_batch={recipe.BATCH}",
            f"training.micro_batch={recipe.BATCH // FORWARDS}", "training.precision=fp32",
            f"kernels={kernels}", "zero.stage=0",
            *(f"{key}={json.dumps(value)}" for key, value in recipe.CASES[case].items()),
        ],
    )  # fmt: skip
    return Trainer(config, world)


@pytest.mark.parametrize("kernels", ["fused", "eager"])
@pytest.mark.parametrize("case", recipe.CASES)
def test_ten_losses_are_the_published_recipes(world, monkeypatch, case, kernels):
    trainer = trainer_of(case, world, monkeypatch, kernels)
    stream, found = batches(case), []
    for _ in range(recipe.STEPS):
        metrics = trainer.train_step(stream)
        assert not metrics.pop("skipped")
        found.append(metrics)
    exact, eager = FROZEN[case]["float64"], FROZEN[case]["float32"]
    assert found[0].keys() == exact.keys()
    for name in exact:
        assert_as_good_as_eager(
            name,
            torch.stack([metrics[name] for metrics in found]),
            torch.tensor(eager[name]),
            torch.tensor(exact[name], dtype=torch.float64),
        )


@pytest.mark.parametrize("case", recipe.CASES)
def test_the_frozen_numbers_are_the_oracles(case):
    for name, values in recipe.losses(case, torch.float64).items():
        assert values == pytest.approx(FROZEN[case]["float64"][name], rel=1e-9)
