"""profile: what is planted in a step is named; steps add up; a trace of a GPU is read right."""

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastrepa.commands.profile.profile import (
    Profile,
    ProfileReport,
    by_operation,
    by_part,
    findings,
    profile_run,
)
from fastrepa.config import load_config
from fastrepa.model.flops import model_flops
from fastrepa.model.operations import FUSED, OPERATIONS
from fastrepa.profiling.operation_costs import OURS, PARTS, Counted, operation_cost
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.profiling.trace import PART, REGION, STEP, read_trace
from fastrepa.runtime.regions import NAMES
from fastrepa.training.memory.workload import measure_workload
from fastrepa.vision.codec import PixelCodec
from fastrepa_kernels.adamw_ema import adamw_ema_cost
from fastrepa_kernels.cost import Ceilings, Cost, matmul_cost
from tests.profiling.trace_events import Events
from tests.runs import ROOT

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("one_thread")]

QUICKSTART = ROOT / "configs/quickstart.yaml"
SMALL = ("run=nowhere/run", "training.global_batch=4", "training.precision=fp32", "model.depth=3")


@torch.library.custom_op("planted::slow", mutates_args=())
def slow(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.05)
    return x.clone()


@slow.register_fake
def _(x):
    return torch.empty_like(x)


slow.register_autograd(lambda _, gradient: gradient)


def test_a_stall_a_sync_and_a_slow_kernel_are_each_named(monkeypatch, tmp_path, world):
    batch, latents = RandomBatches.__next__, PixelCodec.latents

    def stalled(batches):
        time.sleep(0.1)
        return batch(batches)

    def planted(codec, *args):
        z = latents(codec, *args)
        z.sum().item()
        return z

    def adaln_mlp(*args, **options):
        x, out = FUSED.adaln_mlp(*args, **options)
        return x, slow(out)

    monkeypatch.setattr(RandomBatches, "__next__", stalled)
    monkeypatch.setattr(PixelCodec, "latents", planted)
    monkeypatch.setitem(OPERATIONS, "fused", replace(FUSED, adaln_mlp=adaln_mlp))
    config = load_config(QUICKSTART, [*SMALL, "data.path=nowhere", "vision.encoders=[]"])
    report = profile_run(config, world, steps=2, warmup=1, out=tmp_path / "out")
    (profile,) = report.profiles
    said = findings(report)

    stall = next(s for s in said if s.startswith("data wait: "))
    assert 100 <= float(stall.split()[2]) < 200
    (sync,) = [s for s in said if s.startswith("host sync: ") and "deepspeed" not in s]
    assert sync.startswith("host sync: item at ")
    assert "test_profile.py:" in sync and "(planted), in codec" in sync
    kernel = next(s for s in said if s.startswith("above its floor: planted::slow, "))
    assert float(kernel.split()[4]) >= 150  # three blocks
    assert by_operation(profile)[0].name == "planted::slow"
    gap = next(g for g in profile.trace.gaps if g.region == "data_wait")
    assert 0.09 < gap.seconds < 0.2 and gap.count == pytest.approx(1, abs=0.4)
    assert "noise instead of nowhere" in " ".join(report.said)
    assert not Path("nowhere").exists()


def test_nothing_within_its_spread_is_slower_nor_on_a_machine_that_changed(tmp_path):
    def side(kernels, readings=10, width=0.1, **regions):
        seconds = dict.fromkeys(NAMES, 0.05) | regions
        spread = {n: (s * (1 - width), s * (1 + width)) for n, s in seconds.items()}
        return Profile(
            kernels, {"step_seconds": 1.0}, 0.9, 1.1, seconds, spread, readings,
            SimpleNamespace(seconds=1.0, operations=[], gaps=[]), [], tmp_path,
        )  # fmt: skip

    def said(*profiles):
        report = ProfileReport(None, "cpu", "", 10, [], Ceilings(1e9, 1e9), [*profiles], tmp_path)
        return [line for line in findings(report) if not line.startswith("data wait")]

    eager = side("eager", backward=0.40)
    assert said(side("fused", backward=0.47), eager) == []  # 0.423 .. of .. 0.44
    assert said(side("fused", backward=0.50), eager) == [
        "slower than eager: backward, 500 ms against 400 ms"
    ]
    assert said(side("fused", backward=0.47, width=0.01), side("eager", backward=0.4, width=0.01))
    (moved,) = said(side("fused", encoder=0.624, backward=0.5), side("eager", encoder=0.462))
    assert moved == (
        "not compared with eager: the machine changed meanwhile; encoder, 624 ms against 462 ms, "
        "is the same code in both"
    )
    (few,) = said(side("fused", readings=3, backward=0.5), eager)
    assert few == "not compared with eager: 3 are too few steps for a spread"


def run_command(monkeypatch, world, *arguments):
    """The console script's exit code."""
    from fastrepa.cli import main

    monkeypatch.setattr(sys, "argv", ["fastrepa", "profile", str(QUICKSTART), *arguments])
    monkeypatch.setattr("fastrepa.runtime.world.init_world", lambda *_: world)
    monkeypatch.setattr("fastrepa.runtime.world.destroy_world", lambda: None)
    try:
        main()
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def test_the_quickstart_on_its_own_data_against_eager(monkeypatch, capsys, tmp_path, world):
    out = tmp_path / "out"
    monkeypatch.setenv("COLUMNS", "200")
    options = ("--steps", "2", "--warmup", "1", "--against", "eager", "--out", str(out))
    assert run_command(monkeypatch, world, *SMALL, *options) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("data: read from configs/quickstart/emoji/train", "its weights", "ceilings",
                 "data wait", "speed-up", "attention, backward", "fastrepa::", "roofline",
                 "images/s", "MFU", "peak memory", "idle gaps", "perfetto"):  # fmt: skip
        assert word in text, word
    assert sorted(p.name for p in out.iterdir()) == [
        "profile.json", "roofline.png", "step.png", "trace.json", "trace_eager.json",
    ]  # fmt: skip
    for name in ("step.png", "roofline.png"):
        with Image.open(out / name) as image:
            assert image.width > 1200 and len(image.convert("RGB").getcolors(1 << 24)) > 50
    names = Counter(
        e.get("name") for e in json.loads((out / "trace.json").read_text())["traceEvents"]
    )
    assert names[REGION + "forward"] >= 2 and names[PART + "attention"] >= 6

    tree = json.loads((out / "profile.json").read_text())
    work = measure_workload(load_config(QUICKSTART, SMALL))
    fused, eager = tree["profiles"]
    assert [p["kernels"] for p in tree["profiles"]] == ["fused", "eager"]
    for p in tree["profiles"]:
        assert sum(p["region_seconds"].values()) == pytest.approx(p["step_seconds"], rel=1e-3)
        assert p["fastest_seconds"] <= p["step_seconds"] <= p["slowest_seconds"]
        assert sum(o["seconds"] for o in p["operations"]) <= p["busy_seconds"] * 1.02
        assert sum(o["seconds"] for o in p["operations"]) > 0.8 * p["busy_seconds"]
        idle = sum(g["seconds"] for g in p["gaps"])
        assert idle < p["traced_step_seconds"] - p["busy_seconds"] + 1e-6
        parts = {part["name"] for part in p["parts"]}
        ways = {f"{part}, {way}" for part in PARTS for way in ("forward", "backward")}
        assert parts >= {way for way in ways if "alignment" not in way} | {"alignment, both ways"}
    declared = {o["name"] for o in fused["operations"] if o["name"].startswith("fastrepa::")}
    assert len(declared) >= 5 and declared <= {*OURS, "fastrepa::scaled"}
    assert not any(o["name"].startswith("fastrepa::") and "norm" in o["name"]
                   for o in eager["operations"])  # fmt: skip
    generator = {p["name"]: p["flops"] for p in eager["parts"]}
    projector = generator.pop("alignment, both ways")
    forward = sum(flops for name, flops in generator.items() if name.endswith("forward"))
    config = load_config(QUICKSTART, SMALL)
    counted = model_flops(
        config.model, config.alignment, side=32, channels=3, encoder_widths=work.encoder_widths
    )
    assert forward == pytest.approx(4 * counted.transformer, rel=0.01)
    assert projector == pytest.approx(12 * (counted.forward - counted.transformer), rel=0.01)
    assert fused["line"]["model_flops_per_s"] == pytest.approx(
        work.training_flops * fused["line"]["images_per_s"]
    )
    assert set(NAMES) == set(fused["region_seconds"])


def test_what_is_compiled_has_a_time_and_no_cost(tmp_path, world):
    settings = ("training.compile=blocks", "data.path=nowhere", "vision.encoders=[]")
    config = load_config(QUICKSTART, [*SMALL, *settings])
    report = profile_run(config, world, steps=2, warmup=2, out=tmp_path / "out")
    (profile,) = report.profiles
    compiled = [o for o in profile.trace.operations if o.part == "compiled"]
    assert {o.region for o in compiled} == {"forward", "backward"}
    names = {o.name for o in compiled}
    assert names >= {"passes, compiled", "aten::mm, compiled"}
    assert all(o.cost == Cost(0, 0) for o in compiled)
    # Nothing else is left in the generator's passes but the loss and the gradients' sums.
    parts = {row.name: row.seconds for row in by_part(profile)}
    for way in ("forward", "backward"):
        compiled_seconds = parts.pop(f"compiled, {way}")
        others = sum(seconds for name, seconds in parts.items() if name.endswith(way))
        assert compiled_seconds > 4 * others, parts
    assert not any("compiled" in said for said in findings(report))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], ["--steps", "0", "between 1 and"]),
        (["--warmup", "-1"], ["--warmup", "-1"]),
        (["--against", "compile"], ["--against", "'compile'", "eager"]),
        (["kernels=eager", "--against", "eager"], ["--against", "'eager' already"]),
        (["--out", str(ROOT / "configs")], ["--out", "no profile's"]),
        (["--out", "/proc/no"], ["--out", "/proc/no"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line(monkeypatch, capsys, world, options, words):
    assert run_command(monkeypatch, world, *SMALL, *options) == 1
    err = capsys.readouterr().err
    assert err.startswith("fastrepa: error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_costs_of_operations():
    a, b = torch.randn(6, 10), torch.randn(10, 4)
    mm = torch.ops.aten.mm.default
    assert operation_cost(mm, (a, b), {}, a @ b) == matmul_cost(6, 4, 10, 4)
    add = torch.ops.aten.add.Tensor
    # An expanded operand is as small as it is in memory.
    row = torch.randn(1, 10).expand(6, 10)
    assert operation_cost(add, (a, row), {}, a + row) == Cost(0, 4 * (60 + 10 + 60))
    copy = torch.ops.aten.copy_.default
    assert operation_cost(copy, (a, row), {}, a) == Cost(0, 4 * (10 + 60))
    lists = [[torch.randn(6), torch.randn(4)] for _ in range(4)]
    emas = [torch.randn(n) for n in (6, 4, 6, 4)]  # two averages of both
    update = torch.ops.fastrepa.adamw_ema_.default
    given = (*lists, emas, [], None, [1.0, 0.9, 0.1, 1.1, 0.1, 0.2], [0.9, 0.99], 1e-8)
    assert operation_cost(update, given, {}, None) == adamw_ema_cost(10, emas=2)


def test_a_trace_of_a_gpu():
    t = Events()
    step = t.add(STEP, 0, 1000)
    forward = t.add(REGION + "forward", 10, 100, step)
    attention = t.add(PART + "attention", 20, 60, forward)
    linear = t.add("aten::linear", 20, 50, attention, seq=7)
    t.add("aten::addmm", 25, 45, linear, kernels=[("gemm", 200), ("bias", 50)], seq=7)
    t.add(REGION + "backward", 110, 900, step)
    # Autograd's own thread; the host is in the region `backward` meanwhile.
    node = t.add("autograd::engine::evaluate_function: AddmmBackward0", 120, 160, seq=7, thread=1)
    t.add("aten::mm", 130, 150, node, kernels=[("gemm", 300)], thread=1)
    t.add("aten::mm", 1100, 1150, kernels=[("gemm", 9)])  # after the step
    t.add(REGION + "forward", 50, 300, on_gpu=True).is_user_annotation = False
    for name, start, end in (("gemm", 50, 250), ("bias", 250, 300), ("gemm", 600, 900)):
        t.add(name, start, end, on_gpu=True)
    counted = {
        ("aten::addmm", "forward", "attention"): Counted(1, Cost(1000, 10)),
        ("aten::mm", "backward", "attention"): Counted(1, Cost(2000, 20)),
    }
    trace = read_trace(t.all, counted, on_gpu=True)
    first, second = trace.operations
    assert (first.name, first.region, first.part) == ("aten::mm", "backward", "attention")
    assert (second.name, second.region, second.part) == ("aten::addmm", "forward", "attention")
    assert first.seconds == pytest.approx(300e-6) and first.cost.flops == 2000
    assert second.seconds == pytest.approx(250e-6) and second.kernels == pytest.approx(
        {"gemm": 200e-6, "bias": 50e-6}
    )
    assert trace.seconds == pytest.approx(1000e-6)
    assert trace.busy_seconds == pytest.approx(550e-6)
    longest = trace.gaps[0]
    assert (longest.region, longest.after, longest.before) == ("backward", "bias", "gemm")
    assert longest.seconds == pytest.approx(300e-6)
    assert np.isclose(sum(g.seconds for g in trace.gaps), 450e-6)


@pytest.mark.gpu
def test_a_profile_on_a_gpu(tmp_path, world):
    config = load_config(QUICKSTART, [*SMALL, "data.path=nowhere"])
    report = profile_run(config, world, steps=3, warmup=2, out=tmp_path / "out", against="eager")
    for profile in report.profiles:
        kernels = [k for o in profile.trace.operations for k in o.kernels]
        assert any("gemm" in k or "cutlass" in k or "xmma" in k for k in kernels)
        assert 0 < profile.trace.busy_seconds < profile.trace.seconds
        assert profile.regions["backward"] > 0
