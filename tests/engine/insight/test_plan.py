"""plan: predictions against measured allocations, sent bytes and counted FLOPs; then its logic."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastrepa.config import config_from_dict, load_config
from fastrepa.errors import ConfigError
from fastrepa.insight.activations import frozen_network, training_curve
from fastrepa.insight.hardware import GPUS, Links
from fastrepa.insight.plan import (
    Assumptions,
    make_plan,
    parse_gpus,
    plan_as_dict,
    sharding,
)
from fastrepa.insight.sharding import (
    ZERO_DEFAULTS,
    Parameters,
    backward_peak,
    messages,
    resident,
    update_peak,
)
from fastrepa.insight.workload import measure_workload
from fastrepa.model.sit import SiT
from tests.engine.insight.measured_steps import CHANNELS, SIDE, WIDTHS, config_of, highest
from tests.engine.training.runs import environment

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "configs/quickstart.yaml"

# Buckets that are small beside these models, so that the rest shows.
SMALL = {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 500_000}
LET_GO = SMALL | {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 1000,
}

ONE = [
    {"stage": 0, "micro": 16, "precision": "fp32", "kernels": "fused"},
    {"stage": 0, "micro": 8, "precision": "bf16", "kernels": "eager", "forwards": 2},
    {"stage": 1, "micro": 4, "precision": "bf16", "model": {"width": 384, "heads": 6, "depth": 4}},
    {"stage": 1, "micro": 24, "precision": "bf16", "checkpointing": "blocks"},
    {"stage": 2, "micro": 16, "precision": "fp32", "kernels": "eager", "zero": {}},
    {"stage": 2, "micro": 32, "precision": "bf16", "model": {"width": 96, "patch": 1}},
    {"stage": 3, "micro": 16, "precision": "bf16", "kernels": "eager", "model": {"qk_norm": True}},
]
TWO = [
    {"stage": 0, "micro": 4, "precision": "fp32"},
    {"stage": 1, "micro": 16, "precision": "fp32", "kernels": "eager"},
    {"stage": 1, "micro": 8, "precision": "bf16", "forwards": 2},
    {"stage": 2, "micro": 4, "precision": "bf16", "forwards": 2},
    {"stage": 2, "micro": 8, "precision": "fp32", "checkpointing": "blocks"},
    {"stage": 3, "micro": 8, "precision": "fp32"},
    {"stage": 3, "micro": 8, "precision": "bf16", "forwards": 2},
    {"stage": 3, "micro": 8, "precision": "bf16", "zero": LET_GO},
]
CASES = [
    {"zero": SMALL, "world": world} | case for world in (1, 2) for case in (ONE, TWO)[world - 1]
]


def name(case):
    parts = (f"{k}={v}" for k, v in case.items() if k not in ("zero", "model"))
    return " ".join((*parts, *(f"{k}={v}" for k, v in case.get("model", {}).items())))


@pytest.fixture(scope="module")
def measured():
    """Every case's measurements: one launch of one process, one of two."""
    results = {}
    for world in (1, 2):
        cases = [c for c in CASES if c["world"] == world]
        python = [sys.executable, "-W", "ignore", "-m"]
        if world > 1:
            python += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        done = subprocess.run(
            [*python, "tests.engine.insight.measured_steps", *map(json.dumps, cases)],
            env=environment(), capture_output=True, text=True, timeout=300, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
        assert len(lines) == len(cases)
        for case, line in zip(cases, lines, strict=True):
            results[name(case)] = json.loads(line.removeprefix("MEASURED "))
    return results


def predicted(case):
    """(sharding, parameters) of a case, by what `plan` would make of its configuration."""
    config = config_of(case)
    s = sharding(config, case["world"], case.get("checkpointing", "none"))
    with torch.device("meta"):
        model = SiT.from_config(config, side=SIDE, channels=CHANNELS, encoder_widths=WIDTHS)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    p = Parameters(tuple(n for n, t in sizes if t), tuple(n for n, t in sizes if not t))
    return replace(s, zero={**s.zero, **case["zero"]}), p


@pytest.mark.parametrize("case", CASES, ids=name)
def test_memory_is_what_the_allocator_held(measured, case):
    s, p = predicted(case)
    curve = training_curve(
        config_of(case), side=SIDE, channels=CHANNELS, encoder_widths=WIDTHS,
        checkpointing=s.checkpointing,
    )  # fmt: skip
    always = sum(resident(s, p).values())
    peak = always + max(sum(backward_peak(s, p, curve).values()), sum(update_peak(s, p).values()))
    real = measured[name(case)]
    assert always == pytest.approx(real["resident"], rel=0.1)
    assert peak == pytest.approx(real["peak"], rel=0.1)
    assert peak > 1.1 * always  # or the activations would not have been tested


@pytest.mark.parametrize("case", [c for c in CASES if c["world"] == 2], ids=name)
def test_sent_bytes_are_what_deepspeed_logs(measured, case):
    s, p = predicted(case)
    real = {op: size for op, size in measured[name(case)]["sent"].items() if size > 4096}
    ours = {m.op: m.logged for m in messages(s, p)}
    assert ours.keys() == real.keys()
    for op, size in real.items():
        assert ours[op] == pytest.approx(size, rel=0.05), op


def test_defaults_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig(stage=3).model_dump(by_alias=True)
    assert {key: theirs[key] for key in ZERO_DEFAULTS} == ZERO_DEFAULTS
    assert [DeepSpeedZeroConfig(stage=s).overlap_comm for s in range(4)] == [False] * 3 + [True]


def small_config(**sections):
    tree = {
        "run": "run", "data": {"path": "nowhere", "latents": "cached"},
        "model": {"name": "SiT-B/2"}, "vision": {"targets": "cached", "encoders": []},
        "training": {"global_batch": 512},
    }  # fmt: skip
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return config_from_dict(tree)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_flops_against_torchs_counter(size):
    vision = {"targets": "cached", "encoders": [{"name": "vit_tiny_patch16_224", "input": 256}]}
    config = config_from_dict(
        {
            "run": "run",
            "data": {"path": "nowhere", "codec": {"name": "pixel", "side": 32}},
            "model": {"name": f"SiT-{size}/2"},
            "vision": vision,
            "kernels": "eager",
            "training": {"precision": "fp32"},
        }
    )
    work = measure_workload(config)
    with torch.device("meta"):
        model = SiT.from_config(config, side=32, channels=3, encoder_widths=[192])
        inputs = torch.empty(2, 3, 32, 32), torch.empty(2), torch.zeros(2, dtype=torch.int64)
        target, drop = torch.empty(2, 256, 192), torch.zeros(2, dtype=torch.bool)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
            velocity, alignment = model(*inputs, [target], drop)
        with FlopCounterMode(display=False) as backward:
            (velocity.sum() + alignment).backward()
    counted = forward.get_total_flops() / 2
    assert work.forward_flops == pytest.approx(counted, rel=0.01)
    assert work.training_flops == pytest.approx(counted + backward.get_total_flops() / 2, rel=0.01)
