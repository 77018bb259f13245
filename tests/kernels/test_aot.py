"""T2: every kernel compiles for sm_80, sm_90 and sm_100 at every row of its launch table, within
its budget of registers and shared memory, without spills, with 16-byte loads and 64-bit offsets.

Compiled in a process of its own: with TRITON_INTERPRET set, this one has no compiler.
"""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from triton.backends.nvidia.compiler import CUDAOptions

from fastrepa_kernels import aot, launch
from fastrepa_kernels.aot import sass
from tests.launches import run_compiling

pytestmark = pytest.mark.slow

KERNELS = Path(aot.__file__).parents[2]


@pytest.fixture(scope="module")
def reports():
    """One process for every case, which compiles them and asks ptxas of each."""
    done = run_compiling("-m", "fastrepa_kernels.aot", "--json")
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
            assert f"_norm_bwd_kernel gated y again width {width} sm_{generation}" in names
        for width in launch.ROWS["cosine"][generation]:
            assert f"_cosine_kernel bf16 target width {width} sm_{generation}" in names


def test_programs_that_waves_are_counted_by(reports):
    """As many are resident, as launch.py says, as the registers of the widest variant allow."""
    programs = {r["name"]: r["programs"] for r in reports}
    rows = launch.ROWS["norm_backward"][90]
    counted = {width: row.resident for width, row in rows.items() if row.resident}
    assert counted
    for width, resident in counted.items():
        assert programs[f"_norm_bwd_kernel gated y again width {width} sm_90"] == resident


def test_gemm_kernels_use_wgmma_on_hopper(reports):
    gemms = [r for r in reports if "gemm" in r["name"] and r["name"].endswith("sm_90")]
    assert gemms
    assert all(r["wgmma"] for r in gemms)


def test_the_checks_can_fail():
    case = replace(
        aot.all_cases()[0], registers=64, shared=100, wide_loads=2, wgmma=True, generation=90,
        long_offsets=("x_ptr",), share=0.8,
    )  # fmt: skip
    good = aot.CompiledCase(
        "name", registers=64, spills=0, shared=100, wide_loads=2, wgmma=True, share=0.8
    )
    ttir = "%1 = tt.addptr %x_ptr, %0 : !tt.ptr<f32>, i64"
    assert list(aot._faults(case, good, ttir)) == []
    for bad in (
        replace(good, registers=65), replace(good, spills=4), replace(good, shared=101),
        replace(good, wide_loads=1), replace(good, wgmma=False), replace(good, share=0.79),
    ):  # fmt: skip
        assert len(list(aot._faults(case, bad, ttir))) == 1
    fused, exact = replace(good, fused=1), replace(case, fp_fusion=False)
    assert list(aot._faults(case, fused, ttir)) == list(aot._faults(exact, good, ttir)) == []
    assert len(list(aot._faults(exact, fused, ttir))) == 1
    assert list(aot._faults(case, good, ttir.replace("i64", "i32")))
    assert list(aot._faults(case, good, ""))


def test_every_kernel_launches_as_far_as_the_device():
    """They do by Triton's own launcher, which takes other keywords than the interpreter's."""
    done = run_compiling("-m", "tests.programs.bound_launches")
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(json.loads(done.stdout)) == {case.kernel.__name__ for case in aot.all_cases()}


def test_no_parameter_has_the_name_of_an_option():
    """Triton would take its value as the option's, where it does not refuse it."""
    options = {field.name for field in fields(CUDAOptions)}
    own = {"grid", "warmup", "stream", "device", "device_type"}
    for case in aot.all_cases():
        names = inspect.signature(case.kernel.fn).parameters.keys()
        assert not names & (options | own), case.name


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


def test_no_row_kernel_of_a_real_width_is_estimated_slow(reports):
    """The share of an H200's copy bandwidth at SiT-XL's width: forward 80%, backward 75%."""
    for kernel, least, kinds in (
        ("_norm_fwd_kernel", 0.80, ("", "gated ")),
        ("_norm_bwd_kernel", 0.75, ("", "gated ", "y again ", "gated y again ")),
    ):
        for kind in kinds:
            report = next(r for r in reports if r["name"] == f"{kernel} {kind}width 1152 sm_90")
            assert report["share"] >= least
            assert report["late_loads"] == 0  # the gate's and the residual's among them


# By hand, before sass.py: (registers, warps, programs, instructions, trips, reads, writes, share).
JUDGED = {
    "norm forward gated": (61, 4, 8, 528, 1, 6912, 6912, (0.83, 0.90)),
    "norm forward": (53, 4, 9, 368, 1, 4608, 2304, (0.65, 0.75)),
    "norm backward gated, three trips": (122, 8, 2, 253, 3, 13824, 6912, (0.45, 0.60)),
    "norm backward gated, width 1024": (96, 4, 5, 250, 3, 12288, 6144, (0.75, 0.85)),
}


@pytest.mark.parametrize("name", JUDGED)
def test_the_estimate_judges_as_was_judged_by_hand(name):
    registers, warps, resident, instructions, trips, reads, writes, (least, most) = JUDGED[name]
    assert sass.programs(90, registers, 4096, warps) == resident
    counted = sass.Pass(instructions, 1, trips, 0)
    share = sass.copy_share(counted, sass.Traffic(reads, writes), resident, warps)
    assert least <= round(share, 2) <= most


def test_the_estimate_falls_with_what_costs():
    traffic, counted = sass.Traffic(6912, 6912), sass.Pass(400, 1, 1, 0)

    def share(counted=counted, resident=8, warps=4):
        return sass.copy_share(counted, traffic, resident, warps)

    assert share() < sass.BEST
    assert share(replace(counted, trips=2)) < share()
    assert share(replace(counted, instructions=800)) < share()
    assert share(replace(counted, mufu=100)) == share(replace(counted, instructions=800))
    assert share(resident=2) < share()
    assert share(warps=8) < share()


def test_reading_of_machine_code():
    lines = [
        "LDC R1, c[0x0][0x28]", "LDG.E.128 R4, desc[UR4][R2.64]",
        "@!P0 LDG.E R4, desc[UR4][R2.64]", "MUFU.RSQ R5, R5", "SHFL.BFLY PT, R6, R5, 0x1, 0x1f",
        "BAR.SYNC.DEFER_BLOCKING 0x0", "LDG.E R7, desc[UR4][R2.64]",
        "@P1 STG.E.128 desc[UR4][R2.64], R4", "LDG.E R8, desc[UR4][R2.64]", "@P2 BRA 0x20",
        "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]", "EXIT", "BRA 0xc0", "NOP",
    ]  # fmt: skip
    text = "\n".join(f"  /*{16 * i:04x}*/   {line} ;  /* 0x0 */" for i, line in enumerate(lines))
    assert sass.hot_pass(text) == sass.Pass(instructions=8, mufu=1, trips=3, late_loads=2)
    straight = text.replace("BRA 0x20", "BRA 0xb0")  # onwards: no loop; cp.async is no trip
    assert sass.hot_pass(straight) == sass.Pass(instructions=12, mufu=1, trips=2, late_loads=2)
    with pytest.raises(ValueError, match="no instructions"):
        sass.hot_pass("nothing")


def test_programs_an_sm_holds():
    assert sass.programs(90, 30, 0, 4) == 16  # 64 warps
    assert sass.programs(90, 32, 0, 1) == 32
    assert sass.programs(90, 255, 0, 8) == 1
    assert sass.programs(80, 32, 50000, 4) == 3  # shared memory


def test_the_interpreter_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "fastrepa_kernels.aot"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(KERNELS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unset it" in done.stderr
