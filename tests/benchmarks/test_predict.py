"""The prediction of a step: its lines are the operations' own costs, its launches the code's."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import predict
from fastrepa.model.sit import SiT
from fastrepa_kernels import aot, launch
from fastrepa_kernels.activation import activation_cost
from fastrepa_kernels.adaln_linear import adaln_linear_cost, adaln_mlp_cost
from fastrepa_kernels.attention import attention_cost
from fastrepa_kernels.cost import Cost, diffusion_transformer_flops
from tests.launches import counted

MACHINE = predict.Machine()
STEP = predict.Step()
SHARES = dict.fromkeys(predict.case_names(STEP), 0.9)


def lines_of(step=STEP):
    return {line.name: line for line in predict.our_lines(step, MACHINE, SHARES)}


def test_a_line_is_the_slowest_of_three_and_its_gaps():
    line = predict.Line("x", 3, Cost(670 * 10**9, 43 * 10**9), 0.5, 670e12)
    machine = replace(MACHINE, copy=4.3e12)
    assert line.milliseconds(machine) == pytest.approx(43 / (0.5 * 4.3) + 3 * 1.3e-3)
    assert replace(line, share=50.0).milliseconds(machine) == pytest.approx(1 + 3 * 1.3e-3)
    tiny = predict.Line("x", 1000, Cost(1, 1))
    assert tiny.milliseconds(machine) == pytest.approx(1000 * (2e-3 + 1.3e-3))


def test_sums_add_up():
    lines = predict.our_lines(STEP, MACHINE, SHARES)
    total = sum(line.milliseconds(MACHINE) for line in lines)
    assert predict.milliseconds(lines, MACHINE) == total
    text = predict.markdown("ours", STEP, lines, MACHINE)
    assert f"{total:.1f} ms a step, {1000 * 256 / total:.0f} images/s (estimate)" in text
    assert all(f"| {line.name} |" in text for line in lines)
    assert f"| **sum** | {sum(line.launches for line in lines):,} |" in text
    assert len({line.name for line in lines}) == len(lines)
    table = predict.side_by_side(STEP, {"a": lines, "b": lines[:1]}, MACHINE).splitlines()
    columns = [[float(cell) for cell in row.split("|")[2:4]] for row in table[2:]]
    step, speed = columns[-2:]
    for i in (0, 1):
        assert sum(row[i] for row in columns[:-2]) == pytest.approx(step[i], abs=0.4)
    assert step[0] == pytest.approx(total, abs=0.06)
    assert speed[0] == pytest.approx(1000 * 256 / total, abs=0.5)


@pytest.mark.parametrize("keep_h", [True, False])
def test_the_parts_are_the_operations(keep_h):
    """A block's lines together move what adaln_linear, adaln_mlp and attention say they move."""
    step, d, depth = replace(STEP, keep_h=keep_h), 1152, 28
    lines = lines_of(step)
    moved = sum(
        lines[name].cost.bytes
        for name in (
            "norms", "norms, backward, and y", "GELU", "GELU', and h unless kept",
            *(f"product {p}{b}" for p in ("qkv", "fc1", "fc2") for b in ("", ", backward")),
        )
    )  # fmt: skip
    shape, sizes = (256, 256, d), (4, 2)
    stated = Cost(0, 0)
    for backward in (False, True):
        given = {"residual": True, "backward": backward}
        stated += adaln_linear_cost(*shape, 3 * d, *sizes, **given)
        stated += adaln_mlp_cost(*shape, 4 * d, *sizes, **given, keep_h=keep_h)
    # linear_gelu's forward counts a's one write, where the product writes it and GELU reads it.
    assert moved == pytest.approx(depth * (stated.bytes + 2 * 4 * step.elements), rel=1e-3)
    assert lines["GELU"].cost == activation_cost(step.rows, 4 * d, 2) * depth
    assert lines["attention"].cost == attention_cost(256, 256, 16, 72, 2) * depth


def test_its_products_are_the_models():
    lines = lines_of()
    products = sum(line.cost.flops for name, line in lines.items() if name.startswith("product "))
    attention = lines["attention"].cost.flops
    model = diffusion_transformer_flops(256, 256, 1152, 28)
    assert products == pytest.approx(3 * (model - attention), rel=0.01)  # the ends are under 1%


def test_launches_of_a_block_are_the_codes():
    def launches(depth):
        torch.manual_seed(0)
        model = SiT(side=4, channels=4, width=16, depth=depth, heads=2, patch=2, num_classes=3,
                    attention="sdpa-flash")  # fmt: skip
        label, drop = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
        with launch.backend("triton"), counted() as names:
            model(torch.randn(2, 4, 4, 4), torch.rand(2), label, label_drop=drop).sum().backward()
        # Poisoned buffers apart; a CPU copies the log-sums and takes SiLU' apart into seven.
        names = Counter(name for name in names if name != "aten.fill_.Scalar")
        assert names["aten.sigmoid.default"] == depth + 2  # SiLU': blocks, final layer, time
        return names.total() - depth - 5 * depth

    of_all = (
        "product", "norms", "GELU", "attention", "dq, dk, dv", "bias of", "adaLN modulation",
    )  # fmt: skip
    one, two = (
        sum(
            line.launches
            for line in predict.our_lines(replace(STEP, model=name), MACHINE, SHARES)
            if line.name.startswith(of_all)
        )
        for name in ("SiT-B/2", "SiT-L/2")
    )
    a_block = (two - one) // 12 - 2  # on a GPU attention's backward is three kernels
    assert launches(3) - launches(2) == a_block


def test_ours_is_fast_enough_and_both_sides_are_printed():
    """It is, by aot.py's estimates of what was compiled, in a process that has the compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.predict", "--json"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert set(found["shares"]) == set(SHARES)
    assert all(0.5 < share < 1 for share in found["shares"].values())
    assert 1000 * 256 / found["ms"]["ours"] >= 640
    assert found["ms"]["plain+compile"] > 300
    names = {case.name for case in aot.all_cases()}
    for model in predict.PARAMETERS:
        for kept in (True, False):
            for name in predict.case_names(predict.Step(model, keep_h=kept)).values():
                assert f"{name} sm_90" in names
