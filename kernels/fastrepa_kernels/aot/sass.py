"""Estimate a kernel's speed from its machine code, without a GPU: an ESTIMATE, never a record.

A pass is one turn of the loop that loads, or the whole program where there is none; it reads and
writes the bytes its case declares, at the real width. Of the machine code are counted, in program
order: instructions a warp, MUFU (exp, reciprocal: 8 cycles each instead of 1), and trips: groups of
loads, a new one wherever a barrier or a store stands between (pointers may alias, so nothing moves
a load over them). Loads by cp.async for a later turn cost no trip.

    issue  = max(instructions, 8 MUFU) x warps / 4      cycles a pass takes of an SM's schedulers
    turn   = trips x 750 ns + max(instructions, 8 MUFU) x max(1, warps / 4) / 1.755 GHz
    flight = programs on an SM x (reads + writes) / turn       bytes/ns, by Little's law
    share  = (0.96^-p + (flight / 32.6)^-p + (issue limit / 32.6)^-p)^(-1/p),   p = 2.5

for an H200: 132 SMs, copies at 4.3 TB/s (32.6 bytes/ns and SM), 1.755 GHz under load, 750 ns from a
load to its value. No kernel passes 0.96 of a copy; limits that lie near each other add up, which p
says. p was chosen so that kernels judged by hand, before this was written, get what they got then.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

COPY = 4300 / 132  # bytes/ns and SM
CLOCK = 1.755  # cycles/ns
LATENCY = 750  # ns
BEST = 0.96
SHARPNESS = 2.5
MUFU_CYCLES = 8
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes an SM


@dataclass(frozen=True)
class Traffic:
    """Bytes that one pass reads and writes, and the rows that it handles."""

    reads: int
    writes: int
    rows: int = 1


@dataclass(frozen=True)
class Pass:
    """The counts of one pass, for one warp."""

    instructions: int
    mufu: int
    trips: int
    late_loads: int  # after the first barrier

    @property
    def cycles(self) -> int:
        """The cycles that issuing the pass takes of one scheduler."""
        return max(self.instructions, MUFU_CYCLES * self.mufu)


def disassemble(cubin: bytes) -> str:
    """Return the machine code as text, by the cuobjdump that comes with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-sass", file],
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout


def hot_pass(sass: str) -> Pass:
    """Count the longest loop that loads, or the whole program."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*?)\s*;", sass)
    if not code:
        raise ValueError("sass: no instructions in what cuobjdump printed")
    addresses = [int(address, 16) for address, _ in code]
    names = [text for _, text in code]
    last = max((i for i, name in enumerate(names) if name.startswith("EXIT")), default=len(names))
    hot = names[: last + 1]
    loops = []
    for end, name in enumerate(names):
        target = re.match(r"BRA\b.*?(0x[0-9a-f]+)", name)
        if target and int(target[1], 16) < addresses[end]:
            loop = names[addresses.index(int(target[1], 16)) : end + 1]
            if any(name.startswith("LDG") for name in loop):
                loops.append(loop)
    return _counted(max(loops, key=len, default=hot))


def _counted(code: list[str]) -> Pass:
    # One letter for each: L load, A load by cp.async, S store, B barrier.
    kinds = {"LDGSTS": "A", "LDG": "L", "STG": "S", "BAR": "B"}
    order = "".join(kinds.get(name.split(".")[0].split(" ")[0], "") for name in code)
    groups = re.split("[SB]+", order)
    return Pass(
        instructions=len(code),
        mufu=sum(name.startswith("MUFU") for name in code),
        trips=sum("L" in group and "A" not in group for group in groups),
        late_loads=order.partition("B")[2].count("L"),
    )


def programs(generation: int, registers: int, shared: int, warps: int) -> int:
    """Count the programs that an SM holds at once: by registers, shared memory, warps, number."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, SHARED[generation] // (shared + 1024), 64 // warps, 32)


def in_flight(counted: Pass, traffic: Traffic, resident: int) -> float:
    """Return the bytes of loads on their way to an SM: a pass's reads come in `trips` portions."""
    return resident * traffic.reads / max(1, counted.trips)


def issue_cycles(counted: Pass, traffic: Traffic, warps: int) -> float:
    """Return the cycles a row takes of an SM's schedulers."""
    return counted.cycles * warps / 4 / traffic.rows


def copy_share(counted: Pass, traffic: Traffic, resident: int, warps: int) -> float:
    """Estimate the share of an H200's copy bandwidth, by the arithmetic above."""
    moved = traffic.reads + traffic.writes
    turn = counted.trips * LATENCY + counted.cycles * max(1, warps / 4) / CLOCK
    flight = resident * moved / turn
    issue = moved / (counted.cycles * warps / 4) * CLOCK
    limits = (BEST, flight / COPY, issue / COPY)
    return sum(limit**-SHARPNESS for limit in limits) ** (-1 / SHARPNESS)
