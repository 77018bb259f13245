"""Run as a program, in one process or under torchrun: runs of many settings, one after another.

    combinations.py FOLDER STEPS OVERRIDES [OVERRIDES ...]

Each OVERRIDES is one run's settings, separated by spaces: its trainer is built, takes STEPS steps
of the quickstart's data and is taken down. The first rank writes FOLDER/N.json per run: of each
step its losses and gradient norm, and of each of its samples a digest of all the model was given.
"""

import gc
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from fastrepa.config import load_config
from fastrepa.data.pipeline import DataPipeline
from fastrepa.runtime.determinism import make_deterministic
from fastrepa.runtime.world import destroy_world, init_world
from fastrepa.training.run import Run
from fastrepa.training.zero.engine import grad_norm
from tests.runs import ROOT, SMALL


class Witness:
    """Digests, by sample number, of image, label, noise, mixture, time and label dropout."""

    def __init__(self, trainer):
        self.seen, self.tensors = {}, []
        self.losses, self.objective = trainer.forward_losses, trainer.objective
        trainer.forward_losses = self.forward
        trainer.objective = SimpleNamespace(
            interpolate=self.mix, velocity_loss=self.objective.velocity_loss
        )
        trainer.engine.module.register_forward_pre_hook(self.given)

    def mix(self, z, noise, t):
        x_t, target = self.objective.interpolate(z, noise, t)
        self.tensors += [noise, x_t, t]
        return x_t, target

    def given(self, model, inputs):
        self.tensors.append(inputs[4])  # label_drop

    def forward(self, batch, samples, targets=None):
        self.tensors = [batch.image_u8, batch.label]
        out = self.losses(batch, samples, targets)
        for i, number in enumerate(samples.tolist()):
            parts = b"".join(t[i].contiguous().numpy().tobytes() for t in self.tensors)
            self.seen[number] = hashlib.sha256(parts).hexdigest()[:12]
        return out


def one_run(world, folder, steps, overrides):
    config = load_config(ROOT / "configs/quickstart.yaml", [f"run={folder}", *SMALL, *overrides])
    make_deterministic(config.deterministic)
    run = Run(config, world)
    trainer = run.trainer
    witness, lines = Witness(trainer), []
    pipeline = DataPipeline(
        run.data, config.data, global_batch=config.training.global_batch,
        micro_batch=trainer.micro, rank=world.rank, world=world.size, seed=config.seed,
        device=world.device,
    )  # fmt: skip
    with pipeline as batches:
        for _ in range(steps):
            witness.seen = {}
            mine = {k: float(v) for k, v in trainer.train_step(batches).items()}
            everyone = [None] * world.size
            dist.all_gather_object(everyone, (mine, witness.seen))
            losses = {
                k: sum(m[k] for m, _ in everyone) / world.size for k in mine if k.endswith("loss")
            }
            samples = {n: d for _, seen in everyone for n, d in seen.items()}
            lines.append({**losses, "grad_norm": float(grad_norm(trainer.engine)),
                          "samples": [samples[n] for n in range(len(samples))]})  # fmt: skip
    trainer.engine.destroy()
    return lines


def main():
    folder, steps, *settings = sys.argv[1:]
    world = init_world()
    for number, overrides in enumerate(settings):
        lines = one_run(world, folder, int(steps), overrides.split())
        gc.collect()
        if world.is_rank_0:
            (Path(folder) / f"{number}.json").write_text(json.dumps(lines))
    destroy_world()


if __name__ == "__main__":
    main()
