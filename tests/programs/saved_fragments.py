"""Checks, on any number of ranks and in every stage, that what is saved is held, and comes back.

python -m torch.distributed.run --nproc-per-node 3 -m tests.programs.saved_fragments RUN
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastrepa.checkpoint.averages import recorded
from fastrepa.checkpoint.format import (
    RunState,
    StoredTensors,
    checkpoint_path,
    load_engine_state,
)
from fastrepa.checkpoint.writer import CheckpointWriter
from fastrepa.config import TrainingConfig, load_config
from fastrepa.model.sit import SiT
from fastrepa.runtime.world import init_world
from fastrepa.training.zero.engine import WholeTensors, start_engine
from tests.runs import ROOT, SMALL


def engine_of(stage, precision, world):
    config = load_config(
        ROOT / "configs/quickstart.yaml",
        ["run=unused", *SMALL, "model.width=40", "model.heads=2", f"zero.stage={stage}",
         f"training.precision={precision}", "training.global_batch=6",
         "training.ema=[0.99, {sigma_rel: 0.1}]"],
    )  # fmt: skip
    torch.manual_seed(stage)
    model = SiT.from_config(config, side=32, channels=3, encoder_widths=[])
    fixed = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    engine, optimizer = start_engine(model, config, world)
    return engine, WholeTensors(engine, optimizer), fixed


def step(engine, dtype):
    torch.manual_seed(7)
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    out, _ = engine(x, torch.rand(2), torch.tensor([0, 1]), None, torch.zeros(2, dtype=torch.bool))
    engine.backward((out.float() - 1).square().mean())
    engine.step()


def main(run):
    world = init_world()
    group = dist.new_group(backend="gloo")
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32")):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        engine, whole, fixed = engine_of(stage, precision, world)
        for kind in whole.kinds:
            for name in whole.params:
                # Every rank's own part of it, and no more: all kinds and places differ.
                torch.manual_seed(stage if stage == 0 else world.rank)
                values = whole.local(name, kind)[1]
                values.copy_(torch.randn(values.shape) + whole.kinds.index(kind))
        state = RunState(
            step=stage, optimizer_step=1, samples_seen=6, side=32, channels=3, encoder_widths=[],
            classes=["a", "b"], world_size=world.size, emas=recorded(whole.optimizer.emas),
        )  # fmt: skip
        writer = CheckpointWriter(run, whole, fixed, world, group, TrainingConfig())
        held = {(k, n): whole.get(n, k).clone() for k in whole.kinds for n in whole.params}
        writer.save(state)
        step(engine, dtype)  # training goes on
        writer.wait(required=True)
        path = checkpoint_path(run, stage)
        for kind in whole.kinds:
            stored = StoredTensors(path, kind)
            for name in whole.params:
                assert torch.equal(stored[name], held[kind, name]), (stage, kind, name)
        files = sorted(p.name for p in path.glob("weights-*"))
        assert len(files) == world.size, files
        _, other, _ = engine_of(stage, precision, world)
        load_engine_state(path, other, state, world)
        for (kind, name), value in held.items():
            assert torch.equal(other.get(name, kind), value), (stage, kind, name, "loaded")
        if world.is_rank_0:
            print(f"stage {stage}: {len(held)} tensors", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
