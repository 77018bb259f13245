"""plan: its arithmetic, what it advises, and what it prints."""

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from fastrepa.commands.plan.plan import (
    Assumptions,
    make_plan,
    parse_gpus,
    plan_as_dict,
)
from fastrepa.commands.plan.speed import choose_gpu, generator_seconds, public_run
from fastrepa.config import load_config
from fastrepa.errors import ConfigError
from fastrepa.model.sit import recomputed_blocks
from fastrepa.runtime.hardware import GPUS, Links
from fastrepa.training.memory.workload import measure_workload
from fastrepa_kernels.adamw_ema import adamw_ema_cost

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "configs/quickstart.yaml"
RECORDS = ROOT / "benchmarks/records/gpu_suite_h200.jsonl"


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
        assert 0 < e.mfu < e.efficiency < 0.5  # the generator's, less all that is not it
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
    kept, again = row.others
    assert kept.sharding == replace(e.sharding, keep_h=True)  # which auto found too much
    # h of SiT-B's 12 blocks: 2,048 images of 256 tokens, 4 x 768 wide.
    assert kept.total - e.total == pytest.approx(12 * 2 * 2048 * 256 * 4 * 768, rel=0.001)
    assert again.sharding.recompute == 1 and not again.sharding.keep_h
    assert again.total < e.total / 2
    assert again.step["recomputation"] > 0 == e.step["recomputation"]


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


def test_the_generator_is_as_fast_as_it_was_measured_and_never_faster_than_its_launches():
    """Measured: a step of 256 images, targets stored, on one H200."""
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    measured = {r["contender"]: r["p50_ms"] for r in records if "p50_ms" in r and "contender" in r}
    recipe = ROOT / "configs/imagenet256_sit_xl2_dinov2b.yaml"
    config = load_config(recipe, ["data.path=nowhere", "data.latents=cached"])
    work = measure_workload(config)

    def milliseconds(micro, gpu="h200", **changed):
        w = replace(work, config=config.model_copy(update=changed))
        return 1e3 * generator_seconds(w, micro, GPUS[gpu], hbm_efficiency=0.8)

    n = work.parameters.numel
    update = adamw_ema_cost(n, grad_itemsize=4, low_itemsize=2).bytes / (0.8 * GPUS["h200"].hbm)
    for kernels, contender in (("fused", "ours"), ("eager", "eager")):
        step = milliseconds(256, kernels=kernels) + 1e3 * update
        assert step == pytest.approx(measured[contender], rel=0.01)
    each = [milliseconds(micro) / micro for micro in (256, 64, 32, 16)]
    assert each == sorted(each) and each[2] < 1.2 * each[0]
    assert milliseconds(32, "h100") > milliseconds(32)  # of the same peak
    floor = (28 * 56 + 220) * 8e-3
    assert milliseconds(4) == milliseconds(1) == pytest.approx(floor)
    graphs = config.training.model_copy(update={"compile": "graphs"})
    assert milliseconds(1, training=graphs) < floor / 2
    # LightningDiT-XL, 64 epochs on 8 H800 in 10 hours: the share of peak that is held beside it.
    reached = 64 * 1_281_167 / 36_000 / 8 * work.training_flops / GPUS["h100"].bf16
    assert public_run(GPUS["h100"]).share == pytest.approx(reached, rel=0.02)


def test_no_stage_3_where_there_is_room_and_it_gains_little():
    plans = [
        planned("training.global_batch=256", gpus=(8, 64, 256), gpu=gpu)
        for gpu in ("h100", choose_gpu("a100", memory=40))
    ]
    for row in (row for plan in plans for row in plan.rows):
        assert row.cheapest.sharding.stage <= 1 and row.cheapest.sharding.offload == "none"
        e = row.configured
        assert (e.training != e.memory) == (e.moment == "sampling")
        assert e.public_images_per_second <= e.images_per_second
    small = choose_gpu(None, tflops=165, memory=6.2, bandwidth=1008)
    (row,) = planned("training.global_batch=256", gpus=(64,), gpu=small).rows
    assert row.cheapest.sharding.stage == 3 and row.cheapest.total <= 6.2e9


def test_a_gpu_of_ones_own():
    ours = choose_gpu(None, tflops=362, memory=48, bandwidth=864)
    assert (ours.bf16, ours.memory, ours.hbm) == (362e12, 48e9, 864e9)
    assert ours.nvlink < GPUS["h100"].nvlink
    assert public_run(choose_gpu("a100", memory=40)) == public_run(GPUS["a100"])
    more = choose_gpu("H100", memory=94)
    assert more == replace(GPUS["h100"], memory=94e9, title=more.title, source=more.source)
    assert choose_gpu(None) == GPUS["h100"] and choose_gpu("b200") == GPUS["b200"]


def test_assumptions_matter_where_they_should():
    apart = "zero.overlap_comm=false"
    base = planned(apart, gpus=(64,), efficiency=0.4).rows[0].configured
    fast = planned(apart, gpus=(64,), efficiency=0.8).rows[0].configured
    assert fast.step["generator"] == pytest.approx(base.step["generator"] / 2)
    assert fast.step["communication"] == base.step["communication"]
    assert base.efficiency == pytest.approx(0.4)
    base = planned(apart, gpus=(64,)).rows[0].configured
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
        (["--gpu-tflops", "1e-300"], ["--gpu-tflops", "above 0 (0.001 to 1e9)", "1e-300"]),
        (["--gpu-memory", "48"], ["--gpu-tflops", "without a name", "--gpu NAME"]),
        (["--gpu-bandwidth", "0"], ["--gpu-bandwidth", "above 0"]),
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
    for word in ("A100 SXM 80 GB", "Adam moments", "recompute none, keep h", "training.keep=h",
                 "images/s", "MFU", "GPU-hours", "advised", "datasheet", "--efficiency",
                 "our record", "as public runs", "drawing samples",
                 "nothing was measured"):  # fmt: skip
        assert word in text
    with Image.open(picture) as image:
        assert image.width > 1200
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert run_command(monkeypatch, "--gpus", "1", "--json") == 0
    out = json.loads(capsys.readouterr().out)
    (here,) = out["plans"]
    assert here["configured"]["fits"]
    ways = [(e["recompute"], e["keep"]) for e in (here["configured"], *here["others"])]
    assert ways == [("none", "h"), ("none", "none"), (1, "none")]
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
