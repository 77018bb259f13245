"""Compile every kernel for every device generation, without a GPU, and check what came out.

`python -m fastrepa_kernels.aot` prints one line per case: registers, spilled bytes, shared memory,
16-byte (or wider) loads, wgmma, programs an SM holds, loads behind the first barrier of the loop;
and, of a case that says what it moves, KB of loads in flight per SM, issue cycles a row and, for
sm_90, the share of an H200's copy bandwidth that sass.py estimates. It exits with 1 when a case
breaks its budget. The cases are the `AOT_CASES` lists at the end of the kernel modules: every row
of the launch tables.

The compiler learns here what it learns at run time: pointers, widths and strides divisible by 16.
Without those hints it emits 2-byte loads, and nothing below would be about the real kernels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastrepa_kernels.aot import sass

MODULES = (
    "adaln_kernels",
    "activation",
    "attention.backends",
    "projector_alignment_kernels",
    "adamw_ema",
    "keyed_random",
)


@dataclass(frozen=True)
class AotCase:
    """A kernel at one launch row and one generation, and the budget that it must keep."""

    kernel: Callable
    label: str
    generation: int
    types: dict[str, str]  # pointers and floats; every other argument is an int32 size or stride
    constants: dict[str, Any]  # constexprs, and None for pointers that this variant does not take
    num_warps: int
    registers: int  # per thread, at most
    shared: int  # bytes, at most
    wide_loads: int  # loads of 16 bytes or more, at least
    long_offsets: tuple[str, ...] = ()  # pointers that must be indexed in 64 bits
    num_stages: int = 3
    wgmma: bool = False  # expected on generation 90
    traffic: sass.Traffic | None = None  # of one pass, at the width that the label names
    share: float = 0.0  # of an H200's copy bandwidth, estimated, at least
    fp_fusion: bool = True  # whether a*b+c may become one operation, which changes its last place

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__} {self.label} sm_{self.generation}"


@dataclass(frozen=True)
class CompiledCase:
    """The resources and the machine code's counts of a compiled case, and what is wrong with it."""

    name: str
    registers: int
    spills: int
    shared: int
    wide_loads: int
    wgmma: bool
    programs: int = 0  # that an SM holds at once
    late_loads: int = 0
    in_flight: float | None = None  # bytes
    issue: float | None = None  # cycles a row
    share: float | None = None
    fused: int = 0  # multiply-adds
    faults: list[str] = field(default_factory=list)


def compile_case(case: AotCase) -> CompiledCase:
    """Compile, assemble, read the resource report, and compare with the budget."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names  # type: ignore[attr-defined]
    signature = {n: "constexpr" if n in case.constants else case.types.get(n, "i32") for n in names}
    hint = [["tt.divisibility", 16]]
    hints = {
        (i,): hint
        for i, n in enumerate(names)
        if signature[n].startswith("*") or signature[n] == "i32"
    }
    constants = {(names.index(n),): v for n, v in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants, hints)
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.fp_fusion,
    }
    target = GPUTarget("cuda", case.generation, 32)
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    registers, spills = assemble(ptx, case.generation, fp_fusion=case.fp_fusion)
    shared = compiled.metadata.shared
    counted = sass.hot_pass(sass.disassemble(compiled.asm["cubin"]))
    programs = sass.programs(case.generation, registers, shared, case.num_warps)
    report = CompiledCase(
        name=case.name,
        registers=registers,
        spills=spills,
        shared=shared,
        wide_loads=wide_loads(ptx),
        wgmma="wgmma.mma_async" in ptx,
        programs=programs,
        late_loads=counted.late_loads,
        **_speed(case, counted, programs),
        fused=len(re.findall(r"\bfma\.", ptx)),
    )
    report.faults.extend(_faults(case, report, compiled.asm["ttir"]))
    return report


def _speed(case: AotCase, counted: sass.Pass, programs: int) -> dict[str, Any]:
    if case.traffic is None:
        return {}
    share = sass.copy_share(counted, case.traffic, programs, case.num_warps)
    return {
        "in_flight": sass.in_flight(counted, case.traffic, programs),
        "issue": sass.issue_cycles(counted, case.traffic, case.num_warps),
        "share": share if case.generation == 90 else None,
    }


def assemble(ptx: str, generation: int, *, fp_fusion: bool = True) -> tuple[int, int]:
    """Return (registers per thread, bytes spilled) as ptxas reports them."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    tool, arch = get_ptxas(generation).path, sm_arch_from_capability(generation)
    options = [] if fp_fusion else ["--fmad=false"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        done = subprocess.run(
            [tool, "-v", *options, f"--gpu-name={arch}", file, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
    used = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    if used is None or spilled is None:
        raise RuntimeError(f"ptxas printed no resource report:\n{done.stderr}")
    return int(used[1]), int(spilled[1]) + int(spilled[2])


def wide_loads(ptx: str) -> int:
    """Count global loads of at least 16 bytes: vector loads, and cp.async or bulk copies."""
    vectors = re.findall(r"ld\.global[.\w:]*\.v(\d)\.[bfu](\d+)", ptx)
    count = sum(int(lanes) * int(bits) >= 128 for lanes, bits in vectors)
    count += len(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10\b", ptx))
    return count + len(re.findall(r"cp\.async\.bulk\.tensor", ptx))


def offset_widths(ttir: str) -> dict[str, set[int]]:
    """Return for every pointer argument the widths in bits of the integers first added to it."""
    widths: dict[str, set[int]] = {}
    for pointer, bits in re.findall(r"tt\.addptr %(\w+), %\w+ : !tt\.ptr<\w+>, i(\d+)", ttir):
        widths.setdefault(pointer, set()).add(int(bits))
    splats = dict(re.findall(r"%(\w+) = tt\.splat %(\w+) : !tt\.ptr", ttir))
    tensors = re.findall(r"tt\.addptr %(\w+), %\w+ : tensor<[^>]*>+, tensor<[\dx]*xi(\d+)>", ttir)
    for value, bits in tensors:
        if value in splats:
            widths.setdefault(splats[value], set()).add(int(bits))
    return widths


def _faults(case: AotCase, report: CompiledCase, ttir: str) -> Iterable[str]:
    if report.spills:
        yield f"spills {report.spills} bytes"
    if report.registers > case.registers:
        yield f"{report.registers} registers, budget {case.registers}"
    if report.shared > case.shared:
        yield f"{report.shared} bytes of shared memory, budget {case.shared}"
    if report.wide_loads < case.wide_loads:
        yield f"{report.wide_loads} wide loads, expected at least {case.wide_loads}"
    if case.wgmma and case.generation == 90 and not report.wgmma:
        yield "no wgmma"
    if report.share is not None and report.share < case.share:
        yield f"estimated at {report.share:.0%} of copy bandwidth, budget {case.share:.0%}"
    if report.fused and not case.fp_fusion:
        yield f"{report.fused} fused multiply-adds"
    widths = offset_widths(ttir)
    for pointer in case.long_offsets:
        if widths.get(pointer) != {64}:
            yield f"{pointer} is indexed with {sorted(widths.get(pointer, set()))} bits, not 64"


def all_cases() -> list[AotCase]:
    """Return the cases of every kernel module."""
    cases: list[AotCase] = []
    for name in MODULES:
        cases += importlib.import_module(f"fastrepa_kernels.{name}").AOT_CASES
    return cases


def _line(report: CompiledCase) -> str:
    flight = "-" if report.in_flight is None else f"{report.in_flight / 1024:.1f}"
    issue = "-" if report.issue is None else f"{report.issue:.0f}"
    share = "-" if report.share is None else f"{report.share:.0%}"
    return (
        f"{report.name:64} {report.registers:5} {report.spills:5} {report.shared:7} "
        f"{report.wide_loads:5}  {'yes' if report.wgmma else '-':5} {report.programs:6} "
        f"{report.late_loads:4} {flight:>5} {issue:>5} {share:>5}  {'; '.join(report.faults)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print a line or a JSON object per case; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastrepa_kernels.aot", description=__doc__)
    parser.add_argument("--only", default="", help="compile cases whose name contains this text")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 turns the compiler off; unset it")
    if not options.json:
        print(
            f"{'kernel':64} {'regs':>5} {'spill':>5} {'shared':>7} {'wide':>5}  wgmma "
            f"{'per SM':>6} {'late':>4} {'KB':>5} {'issue':>5} share"
        )
    failed = 0
    for case in all_cases():
        if options.only not in case.name:
            continue
        report = compile_case(case)
        failed += bool(report.faults)
        if options.json:
            print(json.dumps(asdict(report)), flush=True)
            continue
        print(_line(report), flush=True)
    return 1 if failed else 0
