"""plan: predictions against measured allocations, sent bytes and counted FLOPs; then its logic."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastrepa.config import config_from_dict, load_config
from fastrepa.errors import ConfigError
from fastrepa.insight.hardware import GPUS, Links
from fastrepa.insight.peak_memory import highest
from fastrepa.insight.plan import (
    Assumptions,
    make_plan,
    parse_gpus,
    plan_as_dict,
    sharding,
)
from fastrepa.model.sit import SiT, recomputed_blocks
from fastrepa.training.memory.activations import frozen_network, training_curve
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
from fastrepa.training.memory.workload import measure_workload
from tests.engine.training.memory.measured_steps import CHANNELS, SIDE, WIDTHS, config_of
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
CPU, WEIGHTS = {"offload": "cpu"}, {"offload_parameters": True}

ONE = [
    {"stage": 0, "micro": 16, "precision": "fp32", "kernels": "fused"},
    {"stage": 0, "micro": 8, "precision": "bf16", "kernels": "eager", "forwards": 2},
    {"stage": 1, "micro": 4, "precision": "bf16", "model": {"width": 384, "heads": 6, "depth": 4}},
    {"stage": 1, "micro": 24, "precision": "bf16", "recompute": 1,
     "ema": [0.9999, {"sigma_rel": 0.1}]},
    {"stage": 2, "micro": 16, "precision": "fp32", "kernels": "eager", "zero": {}},
    {"stage": 2, "micro": 16, "precision": "bf16", "settings": CPU, "recompute": 2},
    {"stage": 3, "micro": 24, "precision": "fp32", "settings": CPU | WEIGHTS, "recompute": 1},
    {"stage": 2, "micro": 32, "precision": "bf16", "model": {"width": 96, "patch": 1}},
    {"stage": 3, "micro": 16, "precision": "bf16", "kernels": "eager", "model": {"qk_norm": True}},
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
    """Every case's measurements: one launch of one process, one of two."""
    results = {}
    for world in (1, 2):
        cases = [c for c in CASES if c["world"] == world]
        python = [sys.executable, "-W", "ignore", "-m"]
        if world > 1:
            python += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        done = subprocess.run(
            [*python, "tests.engine.training.memory.measured_steps", *map(json.dumps, cases)],
            env=environment(), capture_output=True, text=True, timeout=900, cwd=ROOT,
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
    with torch.device("meta"):
        model = SiT.from_config(config, side=SIDE, channels=CHANNELS, encoder_widths=WIDTHS)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    p = Parameters(tuple(n for n, t in sizes if t), tuple(n for n, t in sizes if not t))
    s = sharding(config, case["world"], p)
    return replace(s, zero={**s.zero, **case["zero"]}), p


@cache
def _curve(model, precision, kernels, recompute):
    case = {
        "world": 1,
        "micro": 1,
        "model": dict(model),
        "precision": precision,
        "kernels": kernels,
        "recompute": recompute,
    }
    return training_curve(config_of(case), side=SIDE, channels=CHANNELS, encoder_widths=WIDTHS)


def curve_of(case):
    """Stage and batch size do not matter to it."""
    model = tuple(sorted(case.get("model", {}).items()))
    return _curve(
        model, case["precision"], case.get("kernels", "fused"), case.get("recompute", "none")
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


def test_a_frozen_networks_memory_and_flops():
    import timm

    def build():
        return timm.create_model("vit_tiny_patch16_224", img_size=64).eval()

    def run(network, batch, dtype):
        return network(torch.empty(batch, 3, 64, 64, dtype=dtype))

    frozen, real = frozen_network(build, run, torch.float32), build()
    assert frozen.weights == sum(4 * p.numel() for p in real.parameters())
    with torch.no_grad():
        peak = highest(lambda: run(real, 32, torch.float32), torch.device("cpu"))
    assert frozen.at(32) == pytest.approx(peak, rel=0.1)
    d, t, blocks = 192, 17, 12
    products = blocks * (12 * t * d * d + 2 * t * t * d) + 16 * 768 * d + d * 1000
    assert frozen.flops == pytest.approx(2 * products, rel=0.01)


def test_links():
    links = Links(per_node=8, nvlink=400e9, network=40e9, nvlink_latency=0, network_latency=0)
    inside = links.collective_seconds("all_reduce", 8e9, 1, 8)
    assert inside == pytest.approx(2 * 8e9 * 7 / 8 / 400e9)
    assert links.collective_seconds("all_gather_into_tensor", 8e9, 1, 8) == inside / 2
    # Eight adapters of 40 GB/s are less than NVLink.
    between = links.collective_seconds("all_reduce", 8e9, 1, 64)
    assert between == pytest.approx(2 * 8e9 * 63 / 64 / 320e9)
    late = replace(links, nvlink_latency=1e-6, network_latency=1e-3)
    # One pass: 3 hops inside a server of 8, 3 between 8 servers.
    assert late.latency(64) == pytest.approx(3 * 1e-6 + 3 * 1e-3)
    assert late.collective_seconds("all_reduce", 0, 5, 64) == pytest.approx(10 * late.latency(64))
    assert links.collective_seconds("all_reduce", 8e9, 1, 1) == 0


@cache
def planned(*overrides, gpus=(8, 64, 1024), gpu="h100", **assumptions):
    """SiT-B on paper, from stored latents and features."""
    recipe = ROOT / "configs/imagenet256_sit_b2_dinov2b.yaml"
    common = ("data.path=nowhere", "data.latents=cached", "vision.targets=cached",
              "training.global_batch=8192")  # fmt: skip
    config = load_config(recipe, (*common, *overrides))
    return make_plan(config, gpus=gpus, gpu=gpu, assumptions=Assumptions(**assumptions))


def test_a_plan_adds_up():
    plan = planned()
    out = plan_as_dict(plan)
    assert [p["gpus"] for p in out["plans"]] == [8, 64, 1024]
    for row, text in zip(plan.rows, out["plans"], strict=True):
        e = row.configured
        assert sum(text["configured"]["memory_bytes"].values()) == pytest.approx(e.total)
        assert sum(text["configured"]["step_seconds"].values()) == pytest.approx(e.seconds)
        assert e.images_per_second * e.seconds == pytest.approx(8192)
        assert e.days == pytest.approx(400_000 * e.seconds / 86_400)
        assert e.gpu_hours == pytest.approx(24 * e.days * e.sharding.world)
        rate = 8192 * plan.workload.training_flops / e.seconds / e.sharding.world
        assert e.mfu == pytest.approx(rate / GPUS["h100"].bf16)
        assert 0 < e.mfu < 0.4  # the assumed efficiency, less all that is not the generator
    states = [r.configured.memory["Adam moments"] for r in plan.rows]
    assert states == pytest.approx([8 * plan.workload.parameters.numel / n for n in (8, 64, 1024)])
    json.dumps(out)


def test_the_first_part_that_is_too_much_and_the_cheapest_way_that_fits():
    plan = planned("training.global_batch=16384", gpus=(8,))
    (row,) = plan.rows
    e = row.configured
    assert e.sharding.micro == 2048 and e.total > plan.gpu.memory
    assert e.first_too_much(plan.gpu.memory) == "activations"
    assert e.first_too_much(e.memory["weights"] / 2) == "weights"
    assert e.first_too_much(e.total) is None
    best = row.cheapest
    assert best.total <= plan.gpu.memory and best.sharding.micro < 2048
    # Recomputing every block would fit with larger batches, at a quarter more arithmetic.
    assert best.sharding.recompute == 0
    assert best.sharding.offload == "none"
    assert row.other.sharding.recompute == 1
    assert row.other.total < e.total / 2
    assert row.other.step["recomputation"] > 0 == e.step["recomputation"]


def test_nothing_fits():
    (row,) = planned("model={width: 32768, depth: 8, heads: 256, patch: 2}", gpus=(8,)).rows
    assert row.cheapest is None
    assert row.configured.first_too_much(80e9) == "weights"
    assert row.least.total > 80e9
    assert row.least.sharding.stage == 3
    assert row.least.sharding.offloads_parameters


def test_recompute_auto_is_the_fewest_blocks_that_fit():
    (row,) = planned("training.recompute=auto", "training.global_batch=10240", gpus=(8,)).rows
    chosen = row.configured
    assert chosen.sharding.recompute > 1
    assert chosen.total <= GPUS["h100"].memory
    # One block less does not fit. Of SiT-B's 12, n leave out the last.
    blocks = recomputed_blocks(12, chosen.sharding.recompute)
    fewer = next(n for n in range(1, 12) if recomputed_blocks(12, n) < blocks)
    (less,) = planned(
        f"training.recompute={fewer}", "training.global_batch=10240", gpus=(8,)
    ).rows  # fmt: skip
    assert less.configured.total > GPUS["h100"].memory
    (plenty,) = planned("training.recompute=auto", "training.micro_batch=8", gpus=(8,)).rows
    assert plenty.configured.sharding.recompute == 0
    (never,) = planned("training.recompute=auto", gpus=(1,), gpu="a100").rows
    assert never.configured.sharding.recompute == 1
    assert never.configured.total > GPUS["a100"].memory


def test_offload_moves_states_to_the_host():
    here = planned("zero.stage=2", gpus=(64,)).rows[0].configured
    there = planned("zero.stage=2", "zero.offload=cpu", gpus=(64,)).rows[0].configured
    n = planned(gpus=(64,)).workload.parameters.numel
    for part in ("master weights", "Adam moments", "EMA"):
        assert there.memory[part] == 0 < here.memory[part] == there.host[part]
    assert here.host["checkpoint writer"] == there.host["checkpoint writer"] == 16 * n / 64
    assert sum(here.host.values()) == 16 * n / 64
    assert there.step["offload"] > 0 == here.step["offload"]
    assert there.step["optimiser"] > here.step["optimiser"]
    settings = ("zero.stage=3", "zero.offload=nvme", "zero.nvme_path=/n")
    # Stage 3 sends all but its own slices.
    disk = planned(*settings, gpus=(64,)).rows[0].configured
    assert disk.nvme == 16 * n / 64
    assert disk.host["Adam moments"] == 0 < disk.host["NVMe buffers"]
    assert disk.step["offload"] > there.step["offload"]


def test_assumptions_matter_where_they_should():
    apart = "zero.overlap_comm=false"
    base = planned(apart, gpus=(64,)).rows[0].configured
    fast = planned(apart, gpus=(64,), efficiency=0.8).rows[0].configured
    assert fast.step["generator"] == pytest.approx(base.step["generator"] / 2)
    assert fast.step["communication"] == base.step["communication"]
    slow = planned(apart, gpus=(64,), network=5e9).rows[0].configured
    assert slow.step["communication"] > 5 * base.step["communication"]
    waiting = planned(apart, gpus=(64,), storage=1e6).rows[0].configured
    read = 128 * planned(apart, gpus=(64,)).workload.input_bytes / 1e6
    assert waiting.seconds == pytest.approx(read)  # the step is hidden behind the reading
    small = planned(apart, gpus=(64,), reserve=0.0).rows[0].configured
    assert base.total - small.total == 4e9
    # Stage 3 gathers under the arithmetic where DeepSpeed may.
    sharded = planned("zero.stage=3", gpus=(64,)).rows[0].configured
    assert sharded.hidden > 0 == base.hidden
    bound = planned("zero.stage=3", gpus=(64,), overlap=0.0).rows[0].configured
    assert bound.step["communication"] == pytest.approx(
        sharded.step["communication"] + sharded.hidden
    )


def test_frozen_networks_run_only_where_nothing_is_stored():
    recipe = ROOT / "configs/imagenet256_sit_b2_dinov2b.yaml"
    common = ["data.path=nowhere", "data.latents=online", "vision.targets=online"]
    work = measure_workload(load_config(recipe, common))
    # DINOv2-B at 224 px: 12 blocks of 257 tokens and the patch embedding.
    blocks = 12 * (12 * 257 * 768**2 + 2 * 257**2 * 768)
    assert work.encoders[0][1].flops == pytest.approx(2 * (blocks + 256 * 588 * 768), rel=0.01)
    # Stable Diffusion's encoder at 256 px: its first two convolutions alone are 39 GFLOP.
    assert work.codec_encoder.flops > 2 * 256**2 * 9 * 128 * (3 + 128)
    assert work.codec_weights == 2 * work_parameters()
    assert "image" in work.input_is and "moments" not in work.input_is
    stored = planned(gpus=(8,)).workload
    assert stored.encoders == () and stored.codec_encoder is None
    assert stored.codec_weights == work.codec_weights  # sampling decodes
    assert stored.input_bytes == 8 * 32 * 32 * 2 + 4 + 256 * (768 + 2) + 4


def work_parameters():
    from fastrepa.data.codec import random_sd_vae

    with torch.device("meta"):
        return sum(p.numel() for p in random_sd_vae().parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "0"], ["--gpus", "0", "between 1 and"]),
        (["--gpus", "8,many"], ["--gpus", "'many'", "8,64,512"]),
        (["--gpus", "8,-2"], ["--gpus", "-2"]),
        (["--gpus", "3"], ["--gpus", "3", "training.global_batch", "16", "=18"]),
        (["--gpus", "8", "training.micro_batch=4"], ["training.micro_batch", "4", "2 images"]),
        (["--gpu", "h300"], ["--gpu", "'h300'", "a100, h100, h200, b200", "did you mean"]),
        (["training.recompute=all"], ["training.recompute", "'all'", "none or auto or a number"]),
        (["--pcie-gbs", "0"], ["--pcie-gbs", "above 0"]),
        (["--efficiency", "1.4"], ["--efficiency", "1.4", "between 0 and 1"]),
        (["--overlap", "nan"], ["--overlap", "nan"]),
        (["--network-gbs", "0"], ["--network-gbs", "above 0"]),
        (["--reserve-gb", "-1"], ["--reserve-gb", "0 or more"]),
        (["--gpus-per-node", "0"], ["--gpus-per-node", "1 or more"]),
        (["--gpus", "2", "--png", "/proc/no/plan.png"], ["--png", "/proc/no/plan.png"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line(monkeypatch, capsys, options, words):
    if "--gpus" not in options:
        options = [*options, "--gpus", "2"]
    assert run_command(monkeypatch, *options) == 1
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("fastrepa: error: ") and out.err.count("\n") == 1
    for word in words:
        assert word in out.err


def test_on_the_screen_as_json_and_as_a_picture(monkeypatch, capsys, tmp_path):
    from PIL import Image

    picture = tmp_path / "plan.png"
    assert run_command(monkeypatch, "--gpus", "2,1", "--gpu", "A100", "--png", str(picture)) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("A100 SXM 80 GB", "Adam moments", "images/s", "MFU", "GPU-hours", "cheapest",
                 "datasheet", "--efficiency", "nothing here was measured"):  # fmt: skip
        assert word in text
    with Image.open(picture) as image:
        assert image.width > 1200
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert run_command(monkeypatch, "--gpus", "1", "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert out["plans"][0]["configured"]["fits"]
    assert out["gpu"]["name"] == "H100 SXM 80 GB"


def run_command(monkeypatch, *arguments):
    """The console script's exit code."""
    from fastrepa.cli import main

    monkeypatch.setattr(sys, "argv", ["fastrepa", "plan", str(QUICKSTART), *arguments])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def test_numbers_of_gpus():
    assert parse_gpus("64, 8,64") == [8, 64]
    with pytest.raises(ConfigError, match="--gpus: ''"):
        parse_gpus("8,")
