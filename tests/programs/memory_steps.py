"""Run under torchrun: engines that recompute, keep h or offload beside engines that do not.

The first rank prints one JSON object per comparison.
"""

import json

import torch

from fastrepa.checkpoint.kinds import KINDS
from fastrepa.config import config_from_dict
from fastrepa.model.sit import SiT
from fastrepa.runtime.world import destroy_world, init_world
from fastrepa.training.zero import engine as zero

SIDE, WIDTHS, MICRO = 16, [40], 4


def config_of(stage, precision, forwards, world, *, training=None, **settings):
    return config_from_dict(
        {
            "run": "run",
            "data": {"path": "data", "resolution": SIDE, "codec": {"name": "pixel"}},
            "model": {"width": 64, "depth": 4, "heads": 2, "patch": 2, "num_classes": 10},
            "alignment": {"projector_width": 48, "block": 2},
            "training": {
                "global_batch": world * MICRO * forwards, "micro_batch": MICRO,
                "precision": precision,
            } | (training or {}),
            # So small that stage 3 gathers its weights, and lets them go after forward.
            "zero": {"stage": stage, "param_persistence_threshold": 100,
                     "prefetch_bucket_size": 20_000, "reduce_bucket_size": 30_000} | settings,
        }
    )  # fmt: skip


class Engine:
    """An engine of a configuration, its whole tensors, and steps on seeded noise."""

    def __init__(self, config, world):
        self.config, self.world, self.dtype = config, world, torch.float32
        if config.training.precision == "bf16":
            self.dtype = torch.bfloat16
        torch.manual_seed(0)
        model = SiT.from_config(config, side=SIDE, channels=3, encoder_widths=WIDTHS)
        with torch.no_grad():
            for p in model.parameters():  # adaLN-Zero would hide the blocks from the loss
                p.add_(torch.randn_like(p), alpha=0.02)
        self.engine, self.optimizer = zero.start_engine(model, config, world)
        self.engine.train()
        self.whole = zero.WholeTensors(self.engine, self.optimizer)

    def steps(self, count, seed=1):
        losses = []
        torch.manual_seed(10 * seed + self.world.rank)
        for _ in range(count):
            self.optimizer.set_rate(1e-3)
            t = self.config.training
            for _ in range(t.global_batch // t.micro_batch // self.world.size):
                x, times = torch.randn(MICRO, 3, SIDE, SIDE), torch.rand(MICRO)
                targets = [torch.randn(MICRO, (SIDE // 2) ** 2, z).to(self.dtype) for z in WIDTHS]
                # No label_drop: it comes from torch's generator.
                velocity, alignment = self.engine(x, times, torch.arange(MICRO), targets)
                loss = (velocity - x).square().mean() + 0.5 * alignment
                self.engine.backward(loss)
                self.engine.step()
                losses.append(loss.item())
        return [*losses, float(zero.grad_norm(self.engine))]

    def state(self):
        out = {(k, n): self.whole.get(n, k).clone() for k in KINDS for n in self.whole.params}
        self.whole.release()
        return out

    def load(self, state):
        for (kind, name), value in state.items():
            self.whole.set(name, kind, value)
        self.whole.release()


def difference(a, b):
    """The largest, relative to the largest value of the tensor."""
    return max(float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-30)) for k in a)


def weights(state):
    return {key: value for key, value in state.items() if key[0] == "weight"}


def compare_bits(world, stage, precision, forwards, training):
    """Losses, norms, and what two updates made of every weight and moment."""
    plain, other = (
        Engine(config_of(stage, precision, forwards, world.size, training=settings), world)
        for settings in ({"keep": "none"}, training)
    )
    losses = plain.steps(2), other.steps(2)
    state = plain.state()
    equal = [k for k, v in other.state().items() if torch.equal(v, state[k])]
    model = other.engine.module
    return {
        "losses": losses, "different": len(state) - len(equal), "tensors": len(state),
        "recomputed": sum(model.is_recomputed(i) for i in range(4)),
        "kept": sum(block.mlp.keep_h for block in model.blocks),
    }  # fmt: skip


def compare_offload(world, stage, precision, forwards, settings):
    """Two steps offloaded and not; then its state into an engine of another stage, and on."""
    config = config_of(stage, precision, forwards, world.size)
    plain = Engine(config, world)
    there = Engine(config_of(stage, precision, forwards, world.size, **settings), world)
    losses = plain.steps(2), there.steps(2)
    state = there.state()
    out = {
        "losses": losses,
        "difference": {k: difference(*({i: s[i] for i in s if i[0] == k} for s in
                       (plain.state(), state))) for k in KINDS},
        "moved": difference(weights(Engine(config, world).state()), weights(state)),
        "device": str(there.engine.zero_offload_optimizer().device),
    }  # fmt: skip
    # A checkpoint's way: from the offloaded engine into a plain one of stage 1 and back.
    other = Engine(config_of(1, precision, forwards, world.size), world)
    other.load(state)
    out["there"] = max(float((v - state[k]).abs().max()) for k, v in other.state().items())
    there.load(other.state())
    out["back"] = max(float((v - state[k]).abs().max()) for k, v in there.state().items())
    out["goes_on"] = there.steps(1, seed=2), plain.steps(1, seed=2)
    return out


def main():
    world = init_world()
    cpu = {"offload": "cpu"}
    jobs = [
        ("recompute", compare_bits, (stage, *rest, {"recompute": 2 if stage == 2 else 1}))
        for stage, *rest in (
            (0, "bf16", 2), (1, "bf16", 2), (2, "fp32", 1), (3, "fp32", 1), (3, "bf16", 2),
        )
    ] + [
        ("keep", compare_bits, (stage, *rest, {"keep": "h"}))
        for stage, *rest in ((1, "fp32", 1), (3, "bf16", 2))
    ] + [
        ("offload", compare_offload, (stage, *rest))
        for stage, *rest in (
            (1, "bf16", 2, cpu), (2, "fp32", 1, cpu), (3, "bf16", 1, cpu),
            (3, "fp32", 2, cpu | {"offload_parameters": True}),
        )
    ]  # fmt: skip
    for kind, function, arguments in jobs:
        result = function(world, *arguments)
        if world.is_rank_0:
            case = {"kind": kind, "stage": arguments[0], "precision": arguments[1]}
            print("COMPARED " + json.dumps({**case, **result}), flush=True)
    destroy_world()


if __name__ == "__main__":
    main()
