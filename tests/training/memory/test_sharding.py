"""Memory and messages by arithmetic against measured allocations and DeepSpeed's own log."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from fastrepa.model.sit import SiT, recomputed_blocks
from fastrepa.training.memory.activations import training_curve
from fastrepa.training.memory.decision import sharding
from fastrepa.training.memory.sharding import (
    ZERO_DEFAULTS,
    Parameters,
    backward_peak,
    host,
    host_sums,
    messages,
    resident,
    twice_let_go,
    update_peak,
)
from tests.programs.measured_steps import CHANNELS, SIDE, WIDTHS, config_of
from tests.runs import said_by

pytestmark = pytest.mark.ranks

# Buckets that are small beside these models, so that the rest shows.
SMALL = {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 500_000}
LET_GO = SMALL | {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 1000,
}
CPU, WEIGHTS = {"offload": "cpu"}, {"offload_parameters": True}

ONE = [
    {"stage": 0, "micro": 16, "precision": "fp32", "kernels": "fused"},
    {"stage": 0, "micro": 8, "precision": "bf16", "kernels": "eager", "forwards": 2},
    {"stage": 1, "micro": 4, "precision": "bf16", "model": {"width": 384, "heads": 6, "depth": 4}},
    {"stage": 1, "micro": 24, "precision": "bf16", "recompute": 1,
     "ema": [0.9999, {"sigma_rel": 0.1}]},
    {"stage": 2, "micro": 16, "precision": "fp32", "kernels": "eager", "zero": {}},
    {"stage": 1, "micro": 16, "precision": "bf16", "keep": "h"},
    {"stage": 2, "micro": 16, "precision": "bf16", "settings": CPU, "recompute": 2, "keep": "h"},
    {"stage": 3, "micro": 24, "precision": "fp32", "settings": CPU | WEIGHTS, "recompute": 1},
    {"stage": 2, "micro": 32, "precision": "bf16", "model": {"width": 96, "patch": 1}},
    {"stage": 3, "micro": 16, "precision": "bf16", "kernels": "eager", "model": {"qk_norm": True}},
    {"stage": 0, "micro": 1, "precision": "bf16", "kernels": "eager"},
]  # fmt: skip
TWO = [
    {"stage": 0, "micro": 4, "precision": "fp32"},
    # So few images that the gradients are the peak.
    {"stage": 1, "micro": 1, "precision": "fp32", "zero": {"reduce_bucket_size": 500_000}},
    {"stage": 1, "micro": 8, "precision": "bf16", "forwards": 2},
    {"stage": 2, "micro": 4, "precision": "bf16", "forwards": 2},
    {"stage": 3, "micro": 8, "precision": "fp32"},
    {"stage": 3, "micro": 8, "precision": "bf16", "forwards": 2},
    {"stage": 3, "micro": 8, "precision": "bf16", "zero": LET_GO},
    {"stage": 3, "micro": 8, "precision": "bf16", "zero": LET_GO, "recompute": 2},
    {"stage": 1, "micro": 8, "precision": "fp32", "settings": CPU},
    {"stage": 2, "micro": 8, "precision": "bf16", "settings": CPU, "forwards": 2},
    {"stage": 3, "micro": 8, "precision": "bf16", "settings": CPU, "forwards": 2},
]
CASES = [
    {"zero": SMALL, "world": world} | case for world in (1, 2) for case in (ONE, TWO)[world - 1]
]


def name(case):
    flat = {**case, **case.get("model", {}), **case.get("settings", {})}
    return " ".join(f"{k}={v}" for k, v in flat.items() if k not in ("zero", "model", "settings"))


@pytest.fixture(scope="module")
def measured():
    """Every case's measurements: one launch of one process, one of two; 11 engines in each, of a
    step or two.
    """
    results = {}
    for world in (1, 2):
        cases = [c for c in CASES if c["world"] == world]
        said = said_by("tests.programs.measured_steps", *map(json.dumps, cases), ranks=world)
        lines = [line for line in said.splitlines() if line.startswith("MEASURED ")]
        assert len(lines) == len(cases)
        for case, line in zip(cases, lines, strict=True):
            results[name(case)] = json.loads(line.removeprefix("MEASURED "))
    return results


def predicted(case):
    """Return (sharding, parameters) of a case, by what `plan` would make of its configuration."""
    config = config_of(case)
    with torch.device("meta"):
        model = SiT.from_config(config, side=SIDE, channels=CHANNELS, encoder_widths=WIDTHS)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    p = Parameters(tuple(n for n, t in sizes if t), tuple(n for n, t in sizes if not t))
    s = sharding(config, case["world"], p)
    return replace(s, zero={**s.zero, **case["zero"]}), p


@cache
def _curve(model, precision, kernels, recompute, keep):
    case = {
        "world": 1,
        "micro": 1,
        "model": dict(model),
        "precision": precision,
        "kernels": kernels,
        "recompute": recompute,
        "keep": keep,
    }
    return training_curve(config_of(case), side=SIDE, channels=CHANNELS, encoder_widths=WIDTHS)


def curve_of(case):
    """Stage and batch size do not matter to it."""
    model = tuple(sorted(case.get("model", {}).items()))
    return _curve(
        model,
        case["precision"],
        case.get("kernels", "fused"),
        case.get("recompute", "none"),
        case.get("keep", "none"),
    )


@pytest.mark.parametrize("case", CASES, ids=name)
def test_memory_is_what_the_allocator_held(measured, case):
    s, p = predicted(case)
    curve = curve_of(case)
    # On a CPU what is offloaded is beside all else; nothing was saved.
    always = sum(resident(s, p).values()) + sum(host(s, p, saves=False).values())
    always -= host_sums(s, p)
    peak = (
        always
        + host_sums(s, p)
        + max(sum(backward_peak(s, p, curve).values()), sum(update_peak(s, p).values()))
    )
    real = measured[name(case)]
    # The worst of these is 9.5 % off, where the MLP is wide beside all else: what it makes again in
    # backward is inside a fused operation, and not seen.
    assert always == pytest.approx(real["resident"], rel=0.03)
    assert peak == pytest.approx(real["peak"], rel=0.1)
    assert peak > 1.1 * always  # or the activations would not have been tested
    if case["stage"] == 0 and case["micro"] == 1:  # gradients alone are the peak
        assert peak - always == pytest.approx(real["peak"] - real["resident"], rel=0.02)


@pytest.mark.parametrize("case", [c for c in CASES if c["world"] == 2], ids=name)
def test_sent_bytes_are_what_deepspeed_logs(measured, case):
    s, p = predicted(case)
    real = {op: size for op, size in measured[name(case)]["sent"].items() if size > 4096}
    model = config_of(case).model
    again = twice_let_go(model.width, recomputed_blocks(model.depth, s.recompute))
    ours = {m.op: m.logged for m in messages(s, p, again)}
    assert ours.keys() == real.keys()
    for op, size in real.items():
        assert ours[op] == pytest.approx(size, rel=0.05), op


def test_defaults_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig(stage=3).model_dump(by_alias=True)
    assert {key: theirs[key] for key in ZERO_DEFAULTS} == ZERO_DEFAULTS
    assert [DeepSpeedZeroConfig(stage=s).overlap_comm for s in range(4)] == [False] * 3 + [True]
