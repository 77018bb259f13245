"""Run as a program under torchrun: plain DeepSpeed engines of a SiT with torch's AdamW load an
exported folder, take a step, and save as DeepSpeed does.

Arguments: the folder, a file of what is in it (kind/parameter), where to save, and the cases as
STAGE-PRECISION, with "-sums" where gradients add up in float32. Beside every saved folder is a
file of the whole tensors at that moment.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastrepa.config import load_config
from fastrepa.model.sit import SiT
from fastrepa.runtime.world import destroy_world, init_world
from fastrepa.training.zero.engine import (
    deepspeed,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
)
from tests.runs import ROOT, SMALL

MOMENTS = ("exp_avg", "exp_avg_sq")


def plain_engine(stage, precision, sums, universal):
    config = load_config(ROOT / "configs/quickstart.yaml", ["run=x", *SMALL])
    torch.manual_seed(11)  # other weights than the exported ones
    model = SiT.from_config(config, side=32, channels=3, encoder_widths=[112])
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2 if sums else 1,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": universal},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if sums else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw, dist_init_required=False, config=settings
    )
    return engine, adamw


def whole(engine):
    out = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            out[f"fp32/{name}"] = safe_get_full_fp32_param(p)
            for kind in MOMENTS:
                out[f"{kind}/{name}"] = safe_get_full_optimizer_state(p, kind)
    return {n: v.detach().clone() for n, v in out.items()}


def main(exported, contents, out, *cases):
    world = init_world()
    deepspeed.ops.__compatible_ops__ = {}  # or it compiles collectives of its own first
    expected = load_file(contents)
    for case in cases:
        stage, precision, *sums = case.split("-")
        engine, adamw = plain_engine(int(stage), precision, bool(sums), universal=True)
        path, client = engine.load_checkpoint(exported)
        assert path, case
        assert client["fastrepa"]["samples_seen"] == 56
        assert (engine.global_steps, engine.skipped_steps) == (7, 6)
        assert all(s["step"] == 1 for s in adamw.state.values()), case
        assert adamw.param_groups[0]["lr"] == 1e-3
        for name, value in whole(engine).items():
            assert torch.equal(value, expected[name]), (case, name)
        if int(stage) < 3:  # and the weights that the forward reads
            for name, p in engine.module.named_parameters():
                assert torch.equal(p.detach(), expected[f"fp32/{name}"].to(p.dtype)), (case, name)
        for _ in range(2 if sums else 1):
            dtype = next(engine.module.parameters()).dtype
            x = torch.randn(2, 3, 32, 32, dtype=dtype)
            labels = torch.zeros(2, dtype=torch.int64)
            targets = [torch.randn(2, 64, 112, dtype=dtype)]
            velocity, alignment = engine(x, torch.rand(2, dtype=dtype), labels, targets)
            engine.backward(velocity.square().mean() + alignment)
            engine.step()
        after = whole(engine)
        name = "fp32/blocks.0.mlp.fc1.weight"
        assert not torch.equal(after[name], expected[name])
        engine.save_checkpoint(f"{out}/{case}")
        if world.is_rank_0:
            save_file(after, f"{out}/{case}.safetensors")
    engine, _ = plain_engine(0, "fp32", False, universal=False)
    assert engine.load_checkpoint(exported, load_module_only=True)[0]
    for name, p in engine.module.named_parameters():
        assert torch.equal(p, expected[f"fp32/{name}"]), name
    destroy_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
    Path(sys.argv[3], "done").touch()
