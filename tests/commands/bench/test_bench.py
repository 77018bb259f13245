"""fastrepa bench: what runs, who is refused, and that the rivals compute the same."""

import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastrepa.commands.bench import bench as bench_module
from fastrepa.commands.bench.bench import (
    DEFAULT_RIVALS,
    FILE,
    TURNS,
    BenchCase,
    Result,
    bench,
    gather,
    mark_wrong,
    plan_cases,
    record,
    run_turn,
)
from fastrepa.commands.bench.peak_memory import highest, storages
from fastrepa.commands.bench.plain_step import DeviceRandom, PlainLoop
from fastrepa.commands.bench.reference_step import use_reference
from fastrepa.commands.bench.report import print_bench
from fastrepa.commands.bench.turn import contender_config, problem_of
from fastrepa.config import load_config
from fastrepa.errors import ConfigError
from fastrepa.model.compilation import compile_generator
from fastrepa.profiling.activity import WAIT
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.runtime.regions import OTHER, REGIONS
from fastrepa.training import trainer as training
from fastrepa.training.messages import first_line
from fastrepa.training.trainer import Trainer

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
CPU = torch.device("cpu")
TINY = [
    "model.width=32", "model.depth=3", "model.heads=2", "alignment.projector_width=48",
    "vision.encoders.0.weights=random", "vision.encoders.0.input=32", "data.codec.side=8",
    "data.resolution=16", "training.global_batch=4", "training.schedule.warmup=5",
    "zero.stage=0",
]  # fmt: skip


def tiny(*more):
    return load_config(QUICKSTART, [*TINY, *more])


def published(*more):
    """A small model by a published recipe, on stored latents and targets."""
    small = [
        "data.latents=cached", "vision.targets=cached", "alignment.block=1",
        "alignment.projector_width=32", "training.precision=fp32", "training.optimizer.lr=1e-3",
        "model={width: 32, depth: 2, heads: 2, patch: 2, num_classes: 10}",
    ]  # fmt: skip
    return load_config(QUICKSTART.parent / "imagenet256_sit_b2_dinov2b.yaml", [*small, *more])


def test_what_runs():
    rivals = ["eager", "plain+compile", "reference"]
    named = plan_cases(rivals, ["fp32", "fp16"], [4, 8], [1, 2], True)
    assert BenchCase("reference", "fp16", 8) in named and BenchCase("ours", "fp16", 8) not in named
    assert (
        BenchCase("eager", "fp32", 4, 2) in named
        and BenchCase("reference", "fp32", 4, 2) not in named
    )
    assert {c.ranks for c in named if c.contender == "plain+compile"} == {1}
    assert [c for c in named if c.sampler] == [
        BenchCase(name, "fp32", 4, 1, sampler)
        for sampler in ("ode-50", "sde-250")
        for name in ("ours", "eager")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"against": ["eagre"]}, r"--against: 'eagre' is not one of .*did you mean 'eager'"),
        ({"precisions": ["fp8"]}, r"--precision: 'fp8' is not one of fp32, bf16, fp16"),
        ({"batches": [0]}, r"--batch: 0 is not 1 or more"),
        ({"ranks": [3]}, r"--batch: 4 is not divisible by 3 ranks"),
        ({"rounds": 0}, r"--rounds: 0 is not 1 or more"),
    ],
)
def test_wrong_options_are_named(change, message, tmp_path):
    given = {"against": ["eager"], "precisions": ["fp32"], "batches": [4], "out": tmp_path / "o"}
    with pytest.raises(ConfigError, match=message):
        bench(tiny(), **(given | change))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("contender", ["ours", *DEFAULT_RIVALS])
def test_rivals_are_plain_torch(contender):
    given = tiny("training.recompute=1", "training.compile=blocks")
    config = contender_config(given.model_dump(mode="json"), contender, "bf16")
    ours, plain = ("fused", "auto", 1, "blocks"), ("eager", "sdpa", "none", "none")
    assert (ours if contender == "ours" else plain) == (
        config.kernels, config.attention.backend, config.training.recompute, config.training.compile
    )  # fmt: skip


def stand_in(monkeypatch, tmp_path, body):
    """Turns run `body` instead of a trainer: in processes of their own, as theirs do."""
    (tmp_path / "stand_in.py").write_text(f"import json, os, subprocess, sys, time\n{body}\n")
    monkeypatch.setattr(bench_module, "PROGRAM", "stand_in")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


GOOD = """
task = json.loads(sys.argv[1])
assert task["config"]["training"]["global_batch"] == 4
if task["contender"] == "eager":
    sys.exit("first line\\nmodule: broken")
print("BENCH " + json.dumps({"seconds": [0.5], "timing": "once", "losses": [1.0], "line": "run"}))
"""


def test_a_contender_that_fails_costs_only_itself(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, GOOD)
    given = {"precisions": ["fp32"], "batches": [4], "rounds": 2, "out": tmp_path / "out"}
    ours, eager, last = bench(tiny(), against=["eager", "reference"], **given)
    assert (eager.problem, eager.stderr) == ("module: broken", "first line\nmodule: broken\n")
    assert eager.failed and len(ours.seconds) == len(last.seconds) == 2
    records = [json.loads(line) for line in (tmp_path / "out" / FILE).open()]
    assert [r.get("problem") for r in records] == [None, "module: broken", None]
    assert records[1]["stderr"] == eager.stderr and records[0]["timing"] == "once"
    turns = [json.loads(line) for line in (tmp_path / "out" / TURNS).open()]
    # One that failed takes no further turns.
    assert [t["contender"] for t in turns] == ["ours", "eager", "reference", "ours", "reference"]
    assert gather(turns) == [ours, eager, last]


def test_why_a_turn_failed_is_one_line(tmp_path, monkeypatch):
    """An exception's first line; what is killed says nothing; too little memory is no failure."""
    assert problem_of(ValueError("\n x: 3 is not 2\nmore")) == "ValueError: x: 3 is not 2"
    for words in ("CUDA out of memory. Tried", "CUBLAS_STATUS_ALLOC_FAILED when calling"):
        assert problem_of(RuntimeError(words)) == "does not fit"
        assert not Result(
            BenchCase("ours", "fp32", 4), problem=problem_of(RuntimeError(words))
        ).failed
    said = (
        'print("BENCH " + json.dumps({"problem": "ValueError: x"})); sys.exit("a library\'s word")'
    )
    kill = "print('so far', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    expected = [("ValueError: x", "a library's word\n"), ("killed by signal 9", "so far\n")]
    for body, (problem, stderr) in zip((said, kill), expected, strict=True):
        stand_in(monkeypatch, tmp_path, body)
        turn = run_turn(tiny(), BenchCase("ours", "fp32", 4), steps=1, warmup=1)
        assert turn == {"problem": problem, "stderr": stderr}


def test_what_fails_after_the_times_does_not_take_them(tmp_path, monkeypatch):
    """A profiler that fails, a library that aborts at the end, a kill while the last line goes."""
    timed = {"seconds": [0.5], "timing": "once", "losses": [1.0], "line": "run"}
    say = f"print('BENCH ' + json.dumps({timed}), flush=True)\n"
    fail = """print('BENCH {"problem": "ValueError: x"}'); sys.exit("a library's word")"""
    cut = "print('BENCH {\"sec', end='', flush=True); os.kill(os.getpid(), 6)"
    for body, why in ((fail, "ValueError: x"), (cut, "killed by signal 6")):
        stand_in(monkeypatch, tmp_path, say + body)
        turn = run_turn(tiny(), BenchCase("ours", "fp32", 4), steps=1, warmup=1)
        assert {k: turn[k] for k in timed} == timed and turn["unfinished"] == why
        (result,) = gather([vars(BenchCase("ours", "fp32", 4)) | turn])
        found = record(result)
        assert not result.problem and found["p50_ms"] == 500
        assert found["unfinished"] == why and found["stderr"] == turn["stderr"]


@pytest.mark.parametrize(
    ("broken", "code"), [(["eager"], 0), (["ours"], 1), (["ours", "eager"], 1)]
)
def test_the_command_fails_where_ours_does(broken, code, monkeypatch, tmp_path, capsys):
    from fastrepa.cli import main

    body = f"broken = {broken}\n" + GOOD.replace('== "eager"', "in broken")
    stand_in(monkeypatch, tmp_path, body)
    options = ["--against", "eager", "--batch", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["fastrepa", "bench", str(QUICKSTART), *TINY, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0) == code
    said = capsys.readouterr().out.splitlines()
    whys = [line for line in said if line.endswith("module: broken")]
    assert whys == [f"{name} fp32 b4: module: broken" for name in broken]
    assert (tmp_path / "out" / "bench.png").is_file()


@pytest.mark.parametrize(
    ("ours", "rival", "said"),
    [
        ([0.9, 1.0, 1.1], [1.8, 2.0, 2.2], "2.00x"),
        ([1.8, 2.0, 2.2], [0.9, 1.0, 1.1], "0.50x"),
        ([0.9, 1.0, 1.1], [1.0, 1.2, 1.4], "~1.20x"),
        ([1.0], [2.0], "~2.00x"),  # nobody knows their spread
    ],
)
def test_what_lies_within_the_spread_is_marked(ours, rival, said, tmp_path, capsys):
    results = [
        Result(BenchCase(name, "fp32", 4), seconds)
        for name, seconds in (("ours", ours), ("eager", rival))
    ]
    print_bench(results, tmp_path)
    assert f" {said} " in capsys.readouterr().out


def test_each_turn_is_on_the_disk_when_it_ends(monkeypatch, tmp_path):
    file = tmp_path / "out" / TURNS
    there = f"print(sum(1 for _ in open({str(file)!r})) if os.path.exists({str(file)!r}) else 0, "
    stand_in(monkeypatch, tmp_path, there + "file=sys.stderr); sys.exit(1)")
    results = bench(
        tiny(), against=["eager"], precisions=["fp32"], batches=[4], out=tmp_path / "out"
    )
    assert [r.problem for r in results] == ["0", "1"]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_late_turn_is_ended_with_all_it_started(monkeypatch, tmp_path):
    child = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    body = f"print(subprocess.Popen({child}).pid, file=sys.stderr, flush=True); time.sleep(60)"
    stand_in(monkeypatch, tmp_path, body)
    began = time.monotonic()
    turn = run_turn(tiny(), BenchCase("ours", "fp32", 4), steps=1, warmup=1, timeout=1.5)
    assert turn["problem"] == "ended after 1.5 s" and time.monotonic() - began < 10
    while alive(int(turn["stderr"])):  # killed, and on its way
        assert time.monotonic() - began < 20
        time.sleep(0.05)


def test_a_turn_ends_with_the_process_that_started_it():
    code = "import fastrepa.commands.bench.turn as t, threading, time\n"
    code += "threading.Thread(target=t._end_with_stdin, daemon=True).start(); time.sleep(60)"
    turn = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    turn.stdin.close()
    assert turn.wait(40) == 1


def test_a_wrong_contender_gets_no_time():
    def result(name, precision, loss):
        return Result(BenchCase(name, precision, 4), seconds=[0.1], losses=[1.0, loss])

    good, wrong, low = (
        result("ours", "fp32", 0.5), result("eager", "fp32", 0.5001), result("ours", "bf16", 0.505)
    )  # fmt: skip
    mark_wrong([low, good, wrong])
    assert not good.problem and not low.problem
    assert record(wrong)["problem"] == "wrong: its loss is 0.5001, not 0.5"
    assert "p50_ms" not in record(wrong) and record(good)["p50_ms"] == pytest.approx(100)
    bad = result("ours", "bf16", float("nan"))
    mark_wrong([good, bad])
    assert bad.problem


def test_the_first_losses_of_fast_and_published_steps_agree(world):
    """50 steps in float32: our kernels, optimiser and losses against the reference algorithm's."""
    curves = []
    for kernels, published in (("fused", False), ("eager", True)):
        config = tiny("training.precision=fp32", f"kernels={kernels}")
        trainer = Trainer(config, world)
        if published:
            use_reference(trainer, "fp32")
        batches = RandomBatches(trainer, world.device, 4)
        curves.append([trainer.train_step(batches)["loss"].item() for _ in range(50)])
    fast, plain = torch.tensor(curves, dtype=torch.float64)
    assert plain[-1] < 0.9 * plain[0]  # it learns
    # Rounding, which training amplifies from step to step.
    assert ((fast - plain).abs() / plain.abs()).max() < 2e-4
    assert ((fast - plain).abs() / plain.abs())[:10].max() < 1e-5


NAME = "blocks.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("given", "precision", "off"),
    [(tiny, "fp32", 1e-5), (tiny, "bf16", 2e-2), (published, "fp32", 1e-5)],
)
def test_the_plain_loop_takes_the_same_steps(given, precision, off, monkeypatch, world):
    """It does on our draws; under autocast as one graph, whatever Inductor would make of it."""
    compile_ = torch.compile if precision == "bf16" else lambda f, **_: f
    monkeypatch.setattr(torch, "compile", lambda f, **o: compile_(f, **o, backend="eager"))
    given = given(
        "training.ema=[0.9, {sigma_rel: 0.1}]", "training.global_batch=4", "training.clip=0.1",
        "zero.stage=0",
    )  # fmt: skip
    curves, averages = [], []
    for contender in ("ours", "plain+compile"):
        config = contender_config(given.model_dump(mode="json"), contender, precision)
        plain = contender == "plain+compile"
        trainer = PlainLoop(config, CPU) if plain else Trainer(config, world)
        batches = RandomBatches(trainer, CPU, 4)
        curves.append([trainer.train_step(batches)["loss"].item() for _ in range(6)])
        if plain:
            weight = trainer.model.get_parameter(NAME)
            index = next(i for i, p in enumerate(trainer.params) if p is weight)
            averages.append([average[index] for average in trainer.averages])
        else:
            averages.append([trainer.whole.get(NAME, key) for key in trainer.optimizer.ema_keys])
    ours, rival = curves
    assert rival == pytest.approx(ours, rel=off)
    assert {p.dtype for p in trainer.params} == {torch.float32}
    if precision == "fp32":
        for a, b in zip(*averages, strict=True):
            assert (a - b).abs().max() < 1e-5 < (b - weight).abs().max()


def test_the_plain_loop_draws_from_the_devices_generator(monkeypatch, world):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    given = tiny().model_dump(mode="json")
    loop = PlainLoop(contender_config(given, "plain+compile", "fp32"), CPU)
    batch = next(RandomBatches(loop, CPU, 4))
    keyed = [loop.example(batch) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*keyed, strict=True))
    loop.random = DeviceRandom()
    (x_t, t, target, drop), (again, *_) = loop.example(batch), loop.example(batch)
    assert (x_t - again).abs().min() > 0
    like = keyed[0]
    assert [a.shape for a in (x_t, t, target, drop)] == [a.shape for a in like]
    assert [a.dtype for a in (x_t, t, target, drop)] == [a.dtype for a in like]


ABSENT = ("nvidia", "diffusers", "torch_fidelity", "open_clip", "wandb", "clip")


def test_a_turn_on_stored_latents_needs_few_packages(monkeypatch, tmp_path):
    """The turn is of a published recipe, without the autoencoder's package and DALI."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config, case = published(), BenchCase("ours", "fp32", 2)
    turn = run_turn(config, case, steps=2, warmup=1, profile=True, timeout=300)
    assert "problem" not in turn, turn["stderr"]
    assert len(turn["losses"]) == 3 and turn["timing"] == "clock around each step"
    assert "codec sd-vae 4x32x32 (cached)" in turn["line"]
    profile = turn["profile"]
    assert {gap["region"] for gap in profile["gaps"]} <= {*REGIONS, OTHER, WAIT}
    assert any("mm" in n["name"] or "linear" in n["name"] for n in profile["names"])


@pytest.mark.parametrize("recompute", ["none", "1"])
@pytest.mark.parametrize(
    ("way", "device", "modules"),
    [("blocks", "cpu", 1), ("blocks", "cuda", 3), ("graphs", "cuda", 1)],
)
def test_compiled_generators_train_alike(way, device, modules, recompute, monkeypatch, world):
    """The compiled graph is run by torch's own kernels: what Inductor makes of it is its affair."""
    compiled, compile_ = [], torch.compile

    def by_torch(function, *, mode=None, backend=None, **options):
        compiled.append(mode)
        return compile_(function, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", by_torch)

    def as_on_the_device(model, chosen, _):
        compile_generator(model, chosen, torch.device(device))

    monkeypatch.setattr(training, "check_compile", lambda *_: None)  # no GPU, no CUDA graphs
    monkeypatch.setattr(training, "compile_generator", as_on_the_device)
    curves = []
    for way_ in ("none", way):
        config = tiny(
            "training.precision=fp32", f"training.compile={way_}", "training.micro_batch=2",
            f"training.recompute={recompute}",
        )  # fmt: skip
        trainer = Trainer(config, world)
        batches = RandomBatches(trainer, CPU, 2)
        curves.append([trainer.train_step(batches)["loss"].item() for _ in range(3)])
    assert compiled == modules * [{"blocks": None, "graphs": "reduce-overhead"}[way]]
    assert ", compiled" in first_line(trainer)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    with pytest.raises(ConfigError, match=rf"training.compile: '{way}' needs zero.stage 0, 1 or 2"):
        tiny(f"training.compile={way}", "zero.stage=3")


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_blocks_that_inductor_compiles_for_a_cpu_keep_less(world):
    losses, peaks = {}, {}
    for way, kernels in (("none", "eager"), ("none", "fused"), ("blocks", "fused")):
        config = tiny(
            "training.precision=fp32", f"training.compile={way}", f"kernels={kernels}",
            "model={width: 64, depth: 3, heads: 2, patch: 2, num_classes: 8}",
            "data.codec.side=16", "vision.encoders.0.input=128", "vision.targets=cached",
            "training.global_batch=16", "training.micro_batch=16",
        )  # fmt: skip
        trainer = Trainer(config, world)
        source = itertools.cycle([next(RandomBatches(trainer, CPU, 16))])
        key = f"{kernels} {way}"
        losses[key] = [trainer.train_step(source)["loss"].item() for _ in range(2)]
        peaks[key] = highest(lambda t=trainer, s=source: t.train_step(s), CPU)
    assert losses["fused blocks"] == pytest.approx(losses["fused none"], rel=1e-5)
    assert peaks["fused blocks"] < 0.9 * peaks["eager none"]


def test_highest_moment():
    x = torch.randn(1000)
    assert highest(lambda: (x * 2) + (x * 3), CPU) == 3 * x.nbytes
    with FakeTensorMode():  # as torch.compile leaves them
        fake = torch.empty(54321)
    held = storages(CPU)
    assert x.untyped_storage().data_ptr() in held
    assert fake.untyped_storage().nbytes() not in [s.nbytes() for s in held.values()]


def test_the_command(tmp_path, monkeypatch, capsys):
    from fastrepa.cli import main

    arguments = ["--against", "reference", "--rounds", "1", "--steps", "2", "--batch", "2"]
    out = ["--out", str(tmp_path / "out"), "--precision", "fp32"]
    monkeypatch.setattr(
        sys, "argv", ["fastrepa", "bench", str(QUICKSTART), *TINY, *arguments, *out]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    lines = [json.loads(line) for line in (tmp_path / "out" / "bench.jsonl").open()]
    assert [line["contender"] for line in lines] == ["ours", "reference"]
    ours, reference = lines
    assert ours["last_loss"] == pytest.approx(reference["last_loss"], rel=1e-4)
    assert ours["n"] == 2 and ours["images_per_s"] == pytest.approx(2000 / ours["p50_ms"])
    assert 0 < ours["peak_above_weights_bytes"] < reference["peak_above_weights_bytes"]
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "reference" in said and "images/s" in said and "kernels fused" in said
