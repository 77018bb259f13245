"""The benchmarks themselves: a wrong rival is not timed, memory is counted, records come back."""

import dataclasses
import json

import pytest
import torch

from benchmarks import cases, report, run, tune
from fastrepa_kernels import launch
from fastrepa_kernels.cost import Ceilings, Cost

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SHAPE = cases.Shape("SiT-S/2", 2, 4)


def tiny(providers, backward=True):
    """y = 2x on four rows, with whatever providers are given."""

    def build(shape, dtype, device):
        x = torch.randn(shape.rows, 8, device=device).to(dtype)
        return cases.OperationInputs([x], [], [torch.ones_like(x)] if backward else [])

    costs = {"forward": Cost(64, 512), "backward": Cost(64, 512)}
    return cases.OperationCase("tiny", build, providers, lambda shape, size: costs, backward)


def double(leaves, fixed):
    return (leaves[0] * 2,)


def wrong_gradient(leaves, fixed):
    return (leaves[0].detach() * 3 - leaves[0],)


def test_a_wrong_provider_is_reported_and_not_timed(capsys):
    case = tiny({"ours": wrong_gradient, "eager": double})
    records = run.measure(case, SHAPE, "fp32", CPU, Ceilings(1e9, 1e9), ["ours", "eager"], 2)
    assert {r["provider"] for r in records} == {"eager"}
    assert "ours is WRONG" in capsys.readouterr().out


def test_records_hold_times_floors_and_errors():
    case = tiny({"ours": double, "eager": double})
    records = run.measure(case, SHAPE, "fp32", CPU, Ceilings(1e9, 1e9), ["ours", "eager"], 3)
    assert [(r["provider"], r["direction"]) for r in records] == [
        (p, d) for p in ("ours", "eager") for d in ("forward", "backward", "both")
    ]
    for r in records:
        assert r["n"] == 3
        assert 0 < r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"]
        assert r["floor_ms"] == pytest.approx(1000 * r["least_bytes"] / 1e9)
        assert r["error"] < 1e-6


def test_only_row_kernels_are_replayed():
    replayed = {name for name, case in cases.CASES.items() if case.row_kernels}
    assert replayed == {
        "layernorm_modulate", "gated_residual_layernorm_modulate", "gated_residual", "adamw_ema",
    }  # fmt: skip
    calls = []
    works = [lambda: calls.append("a"), lambda: calls.append("b")]
    assert run.replayed(works, CPU) == works  # a CPU has no graphs
    assert len(run.milliseconds(works[0], CPU, 3)) == calls.count("a") == 3


@pytest.mark.gpu
def test_a_replay_does_the_work_again():
    device = torch.device("cuda")
    x, y, z = (torch.ones(1 << 20, device=device) for _ in range(3))
    first, second = run.replayed([lambda: y.copy_(2 * x), lambda: z.copy_(y + 1)], device)
    x.fill_(3)
    first()
    second()
    assert y.eq(6).all() and z.eq(7).all()
    case = cases.CASES["layernorm_modulate"]
    shape = cases.Shape("SiT-S/2", 2, 256)
    found = run.measure(case, shape, "bf16", device, Ceilings(1e12, 1e14), ["ours", "eager"], 3)
    assert {r["launched"] for r in found} == {"by a graph"}
    assert all(r["p50_ms"] > 0 for r in found) and len(found) == 6


def test_memory_is_counted_exactly_on_the_cpu():
    def two_at_a_time(leaves, fixed):
        a = leaves[0].exp()
        b = a.sin()
        del a
        return (b.neg(),)

    x = torch.randn(256, 1024)
    assert run.peak_bytes(two_at_a_time, cases.OperationInputs([x], [], []), CPU) == 2 * x.nbytes
    x.requires_grad_()
    # exp saves its result, sin its input: the same tensor, counted once.
    assert run.saved_bytes(two_at_a_time, cases.OperationInputs([x], [], [])) == x.nbytes


@pytest.mark.parametrize("name", sorted(cases.CASES))
def test_every_case_passes_its_gate_on_the_cpu(name, monkeypatch):
    monkeypatch.setattr(cases, "PROJECTOR", 64)
    case = cases.CASES[name]
    eager_only = {k: v for k, v in case.providers.items() if k != "compile"}
    shape = cases.Shape("SiT-S/2", 2, 16)
    case = dataclasses.replace(cases.CASES[name], providers=eager_only)
    errors, wrong = run.gate(case, shape, torch.float32, CPU)
    assert not wrong
    here = {p for p in eager_only if not case.refusal(p, shape, torch.float32, CPU)}
    assert set(errors) == here >= {"ours", "eager"}
    costs = case.cost(SHAPE, 2)
    assert all(c.flops > 0 and c.bytes > 0 for c in costs.values())


def test_records_make_a_report(tmp_path):
    case = tiny({"ours": double, "eager": double})
    context = run.environment(CPU) | {"device": "a device"}
    ceilings = Ceilings(1e9, 1e9)
    for _ in range(2):  # the later record replaces the earlier in the report
        records = run.measure(case, SHAPE, "fp32", CPU, ceilings, ["ours", "eager"], 2)
        run.append(tmp_path / "tiny_cpu.jsonl", records, context)
    lines = (tmp_path / "tiny_cpu.jsonl").read_text().splitlines()
    assert len(lines) == 12
    needed = {"git", "dirty", "utc", "device", "driver", "cuda", "torch", "triton", "p50_ms"}
    assert needed <= set(json.loads(lines[0]))
    with (tmp_path / "suite.jsonl").open("w") as file:
        file.write('{"stage": "ceilings", "item": "device"}\n')
    loaded = report.load(tmp_path)
    assert len(loaded) == 6
    text = report.markdown(loaded)
    assert text.count("| ours |") == text.count("| eager |") == 3
    assert "1.00x" in text
    assert run.table(records).count("tiny") == 6


def test_contenders_of_the_kit_share_a_table(tmp_path):
    """Whatever their first lines say; a failure is forgotten once the contender has run."""
    of = {
        "case": "training_step", "device": "a device", "precision": "bf16", "ranks": 1,
        "sampler": "", "torch": "2", "git": "abc", "name": "SiT", "stage": "rivals",
    }  # fmt: skip
    time = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), 500.0) | {"batch": 256}
    lines = [
        of | {"contender": "ours", "run": "", "problem": "fell", "batch": 192, "utc": "1"},
        of | time | {"contender": "ours", "run": "kernels fused", "utc": "2"},
        of | time | {"contender": "eager", "run": "kernels eager", "utc": "2"},
        of | {"contender": "reference", "run": "", "problem": "fell", "batch": 256, "utc": "1"},
    ]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    table = report.training_steps(report.load(tmp_path))
    assert table.count("### training step, bf16, batch of 256") == table.count("###") == 1
    assert "| ours | 500 | 500 .. 500 | 512 |" in table
    assert "| eager | 500 | 500 .. 500 | 512 | 1.00x |" in table
    assert table.count("fell") == 1
    assert "| reference | fell |" in table


def test_a_gpu_has_a_line_for_each_operation_and_a_table_of_its_step():
    """Only where ours, torch.compile and eager are all there, both directions in one."""
    context = {"driver": "1", "device": "a device", "shape": "s", "dtype": "bf16"}
    of = {"ours": 2.0, "compile": 3.0, "eager": 5.0}
    records = [
        context
        | {"case": "norm", "provider": p, "direction": d, "p50_ms": ms / (1 + (d != "both"))}
        for p, ms in of.items()
        for d in ("forward", "both")
    ] + [context | {"case": "alone", "provider": "ours", "direction": "both", "p50_ms": 1.0}]
    records[1] |= {"share_of_floor": 0.5}
    assert "| `norm` | 2.00 | 3.00 | 5.00 | 1.50x | 50% |" in report.operations(records)
    assert "alone" not in report.operations(records)
    assert report.operations([r | {"driver": None} for r in records]) == ""
    names = [{"name": "nvjet_x", "us": 6000.0}, {"name": "_norm_fwd_kernel", "us": 3000.0}]
    traced = {"name": "a", "batch": 4, "names": names, "busy_seconds": 0.01, "seconds": 0.012}
    table = report.profile(traced)
    assert "| products (cuBLAS) | 6.0 | 60.0% |" in table
    assert "| everything else | 1.0 | 10.0% |" in table
    assert "| nothing runs | 2.0 | |" in table


def test_without_a_gpu_a_sweep_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("family", sorted(launch.ROWS))
def test_a_sweep_tries_what_the_tables_hold(family):
    for width, row in launch.ROWS[family][90].items():
        candidates = tune.row_candidates(family, width)
        assert dataclasses.replace(row, resident=0) in candidates
        assert all(c.width >= width for c in candidates)
        assert len(set(candidates)) == len(candidates) <= 24
    two = {(c.block_d, c.tail) for c in tune.row_candidates("norm_backward", 1152)}
    assert two == {(2048, 0), (1024, 128)}
    assert {c.tail for c in tune.row_candidates("norm_forward", 1024)} == {0}


def test_a_sweep_runs_an_operation_with_each_candidate():
    size = tune.SweepSize("cpu", 1, 3, 64, torch.float16)  # what the interpreter knows
    families = ("norm_forward 384", "norm_backward 384", "columns residual", "columns sums")
    seen = []
    with launch.backend("triton"):
        for sweep in tune.sweeps(90, families, size):
            seen.append(sweep.label)
            before = sweep.table[sweep.key]
            for candidate in (sweep.candidates[0], sweep.candidates[-1]):
                with tune.using(sweep.table, sweep.key, candidate):
                    assert sweep.table[sweep.key] is candidate
                    sweep.work()
            assert sweep.table[sweep.key] is before
    assert tuple(seen) == families


def test_attention_is_measured_on_what_runs_and_says_what_does_not(capsys):
    case, names = cases.CASES["attention"], ["ours", "eager", "sdpa-flash", "flash-attn-4"]
    records = run.measure(case, SHAPE, "fp32", CPU, Ceilings(1e9, 1e9), names, 2)
    assert {r["provider"] for r in records} == {"ours", "eager", "sdpa-flash"}
    assert "flash-attn-4 left out: needs a GPU, not cpu" in capsys.readouterr().out
    assert all(r["floor_ms"] > 0 for r in records)
    large = cases.Shape("SiT-XL/2", 256, 4096)
    assert "GiB" in case.refusal("math", large, torch.bfloat16, CPU)
    assert case.refusal("ours", large, torch.bfloat16, CPU) == ""
