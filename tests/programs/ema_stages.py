"""Run as a program under torchrun: the averages of one training run that moves from stage to stage.

Every leg continues the checkpoint of the one before under another ZeRO stage with other averages.
After each step the averages are compared with those computed in float64 from the whole weights.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from fastrepa.checkpoint.averages import ema_model, recorded
from fastrepa.checkpoint.format import (
    RunState,
    checkpoint_path,
    load_engine_state,
    load_model_weights,
    read_state,
)
from fastrepa.checkpoint.writer import CheckpointWriter
from fastrepa.config import TrainingConfig, load_config
from fastrepa.model.sit import SiT
from fastrepa.runtime.world import destroy_world, init_world
from fastrepa.training.optimizer import power_gamma
from fastrepa.training.zero import engine as zero
from tests.runs import ROOT, SMALL

SIDE, CHANNELS = 32, 3
STEPS = ("good", "bad", "good")
LEGS = (  # stage, precision, kernels, training.ema, what is said when it starts
    (0, "fp32", "fused", "[0.9, {sigma_rel: 0.1}]", []),
    (2, "fp32", "eager", "[0.9, {sigma_rel: 0.1}, 0.5]", ["EMA 0.5 is new"]),
    (3, "bf16", "fused", "[{sigma_rel: 0.1}, 0.9]", ["EMA 0.5 is kept no longer"]),
    (1, "bf16", "fused", "[{sigma_rel: 0.1}, 0.9]", []),
    (0, "bf16", "eager", "[0.8, 0.9]", ["EMA 0.8 is new", "EMA sigma_rel=0.1 is kept no longer"]),
    (0, "fp32", "fused", "[0.7]", ["EMA 0.7 goes on from the average of 0.8",
                                   "EMA 0.9 is kept no longer"]),
)  # fmt: skip


def decay(ema, t):
    return ema.decay if ema.sigma_rel is None else (1 - 1 / t) ** (power_gamma(ema.sigma_rel) + 1)


def near(ours, expected, what):
    error = (ours.double() - expected).abs().max()
    allowed = 8 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert error <= allowed, (what, float(error), float(allowed))


def main(run):
    world = init_world()
    group = dist.new_group(backend="gloo")
    previous, expected = None, {}  # str(average) -> name -> float64
    for number, (stage, precision, kernels, emas, said) in enumerate(LEGS):
        config = load_config(ROOT / "configs/quickstart.yaml", [
            "run=unused", *SMALL, f"zero.stage={stage}", f"training.precision={precision}",
            f"training.ema={emas}", f"kernels={kernels}", "training.optimizer.lr=0.05",
        ])  # fmt: skip
        torch.manual_seed(number)
        model = SiT.from_config(config, side=SIDE, channels=CHANNELS, encoder_widths=[])
        if previous:
            load_model_weights(previous, model)
        fixed = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        engine, optimizer = zero.start_engine(model, config, world)
        whole = zero.WholeTensors(engine, optimizer)
        notes = load_engine_state(previous, whole, read_state(previous), world) if previous else []
        assert len(notes) == len(said), notes
        for note, words in zip(notes, said, strict=True):
            assert note.startswith(words), (note, words)
        chosen = dict(zip(optimizer.ema_keys, config.training.ema, strict=True))
        weights = {n: whole.get(n, "weight").double() for n in whole.params}
        changed = any("goes on from" in note for note in notes)
        for key, ema in chosen.items():
            start = expected["0.8"] if changed else expected.get(str(ema), weights)
            expected[str(ema)] = {n: v.clone() for n, v in start.items()}
            for n in whole.params:
                near(whole.get(n, key), start[n], (number, "resumed", key, n))
        train(engine, optimizer, whole, world, config, chosen, expected, number)
        gathered(config, whole, fixed, world)
        step = (number + 1) * len(STEPS)
        state = RunState(
            step=step, optimizer_step=whole.optimizer_step, samples_seen=0, side=SIDE,
            channels=CHANNELS, encoder_widths=[], classes=[], world_size=world.size,
            emas=recorded(config.training.ema),
        )  # fmt: skip
        policy = TrainingConfig(keep_checkpoints=0)
        writer = CheckpointWriter(Path(run), whole, fixed, world, group, policy)
        writer.save(state)
        writer.wait(required=True)
        previous = checkpoint_path(Path(run), step)
        dist.barrier(group=group)
    destroy_world()


def train(engine, optimizer, whole, world, config, chosen, expected, number):
    """Three steps, the middle one bad, with random data that differs from rank to rank."""
    optimizer.set_rate(config.training.optimizer.lr)
    torch.manual_seed(100 * number + world.rank)
    batch = config.training.global_batch // world.size
    for kind in STEPS:
        x, labels = torch.randn(batch, CHANNELS, SIDE, SIDE), torch.zeros(batch, dtype=torch.int64)
        loss = (engine(x, torch.rand(batch), labels) - x).square().mean()
        engine.backward(loss)
        optimizer.bad_loss = torch.tensor(kind == "bad")
        before = whole.optimizer_step
        engine.step()
        assert whole.optimizer_step == before + (kind == "good"), (number, kind)
        for key, ema in chosen.items():
            moved = False
            for n in whole.params:
                kept = expected[str(ema)][n]
                if kind == "good":
                    d = decay(ema, whole.optimizer_step)
                    weight = whole.get(n, "weight").double()
                    moved |= not torch.equal(kept, weight)
                    kept = expected[str(ema)][n] = d * kept + (1 - d) * weight
                near(whole.get(n, key), kept, (number, kind, key, n))
            first = number == 0 and whole.optimizer_step == 1  # a power function takes it whole
            assert moved or kind == "bad" or first, (number, key)


def gathered(config, whole, fixed, world):
    """The first average as a model, on rank 0 only, and gone afterwards."""
    codec = SimpleNamespace(side=SIDE, channels=CHANNELS)
    with ema_model(config, whole, fixed, codec, world, needed=world.is_rank_0) as model:
        own = {n: whole.get(n, "ema") for n in whole.params}
        if not world.is_rank_0:
            assert model is None
            return
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        for n, p in model.named_parameters():
            assert torch.equal(p, own[n].to(dtype) if n in own else fixed[n]), n
        with torch.no_grad():
            x = torch.randn(2, CHANNELS, SIDE, SIDE)
            assert model(x, torch.rand(2), torch.zeros(2, dtype=torch.int64)).isfinite().all()
    assert all(p.is_meta for p in model.parameters())


if __name__ == "__main__":
    main(sys.argv[1])
    print("EVERY LEG AGREES", flush=True)
