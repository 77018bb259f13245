"""T2: every kernel compiles for sm_80, sm_90 and sm_100 at every row of its launch table, within
its budget of registers and shared memory, without spills, with 16-byte loads and 64-bit offsets.

Compiled in a process of its own: with TRITON_INTERPRET set, this one has no compiler.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastrepa_kernels import aot, launch

KERNELS = Path(aot.__file__).parents[1]


@pytest.fixture(scope="module")
def reports():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(KERNELS), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "fastrepa_kernels.aot", "--json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_case_keeps_its_budget(reports):
    assert {r["name"]: r["faults"] for r in reports if r["faults"]} == {}


def test_every_row_of_every_table_is_compiled(reports):
    names = {r["name"] for r in reports}
    assert len(names) == len(reports) == len(aot.all_cases())
    for generation in launch.GENERATIONS:
        for width in launch.ROWS["norm_forward"][generation]:
            assert f"_norm_fwd_kernel gated width {width} sm_{generation}" in names
        for width in launch.ROWS["norm_backward"][generation]:
            assert f"_norm_bwd_kernel gated width {width} sm_{generation}" in names
        for width in launch.ROWS["cosine"][generation]:
            assert f"_cosine_kernel bf16 target width {width} sm_{generation}" in names


def test_gemm_kernels_use_wgmma_on_hopper(reports):
    gemms = [r for r in reports if "gemm" in r["name"] and r["name"].endswith("sm_90")]
    assert len(gemms) >= 2
    assert all(r["wgmma"] for r in gemms)


def test_the_checks_can_fail():
    case = replace(
        aot.all_cases()[0], registers=64, shared=100, wide_loads=2, wgmma=True, generation=90,
        long_offsets=("x_ptr",),
    )  # fmt: skip
    good = aot.Report("name", registers=64, spills=0, shared=100, wide_loads=2, wgmma=True)
    ttir = "%1 = tt.addptr %x_ptr, %0 : !tt.ptr<f32>, i64"
    assert list(aot._faults(case, good, ttir)) == []
    for bad in (
        replace(good, registers=65), replace(good, spills=4), replace(good, shared=101),
        replace(good, wide_loads=1), replace(good, wgmma=False),
    ):  # fmt: skip
        assert len(list(aot._faults(case, bad, ttir))) == 1
    fused, exact = replace(good, fused=1), replace(case, fp_fusion=False)
    assert list(aot._faults(case, fused, ttir)) == list(aot._faults(exact, good, ttir)) == []
    assert len(list(aot._faults(exact, fused, ttir))) == 1
    assert list(aot._faults(case, good, ttir.replace("i64", "i32")))
    assert list(aot._faults(case, good, ""))


def test_reading_of_ptx_and_ttir():
    assert aot.wide_loads("ld.global.v4.b32 {a};\nld.global.L1::evict_last.v2.b32 {b};") == 1
    assert aot.wide_loads("ld.global.v2.b64 {a};\nld.global.v8.b32 {b};\nld.global.b16 x;") == 2
    assert aot.wide_loads("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;") == 1
    assert aot.wide_loads("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r2;") == 0
    ttir = """
      %s = tt.splat %y_ptr : !tt.ptr<bf16> -> tensor<4x8x!tt.ptr<bf16>>
      %p = tt.addptr %s, %o : tensor<4x8x!tt.ptr<bf16>>, tensor<4x8xi32>
      %q = tt.addptr %x_ptr, %r : !tt.ptr<f32>, i64
    """
    assert aot.offset_widths(ttir) == {"y_ptr": {32}, "x_ptr": {64}}


def test_the_interpreter_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "fastrepa_kernels.aot"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(KERNELS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unset it" in done.stderr
