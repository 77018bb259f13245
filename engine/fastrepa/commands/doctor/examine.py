"""An examination of this machine: versions, devices, fast paths, and what would enable the others.

Every fast path is really tried, on a few hundred numbers. A probe runs in a process of its own,
because what is broken may not raise but abort, hang, or need a variable set before it is imported;
whatever happens there is a finding here. Over the network goes one question, whether the hub of
weights is there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.machinery import PathFinder

from rich.console import Console

from fastrepa.commands.doctor.findings import (
    SECTIONS,
    Finding,
    Probe,
    fast_path,
    one_line,
    print_section,
)
from fastrepa.commands.doctor.machine import hub, system, versions
from fastrepa.commands.doctor.probes import PROBES
from fastrepa.commands.doctor.recipes import extras, what_runs
from fastrepa.config.recipes import recipe_names
from fastrepa.errors import DataError
from fastrepa.reading.text import parse_json
from fastrepa.runtime.hardware import usable_cores
from fastrepa.runtime.terminal import Terminal, as_json, say
from fastrepa.runtime.world import outside_the_world

TIMEOUT = 120.0
"""Seconds that a probe may take: some import a great deal from a cold disk."""


def doctor(*, probes: Iterable[str] | None = None, timeout: float = TIMEOUT) -> list[Finding]:
    """All findings, in the order of the report; takes some seconds, and never raises.

    `probes` chooses among PROBES by name (all by default).
    """
    chosen = [p for key, p in PROBES.items() if probes is None or key in set(probes)]
    workers = max(1, min(4, usable_cores(), len(chosen)))
    with ThreadPoolExecutor(workers + 1) as pool:
        answer = pool.submit(hub)
        results = list(pool.map(lambda probe: _try(probe, timeout), chosen))
    found = [*versions(), *(finding for result in results for finding in result), *system()]
    found += [answer.result(), *what_runs(), extras()]
    return sorted(found, key=lambda finding: SECTIONS.index(finding.section))


def print_doctor(as_json: bool = False, console: Console | None = None) -> None:
    """Run the doctor and print a table for people, or JSON for programs."""
    console = console or Terminal()
    if as_json:
        # Not through the console, which would fold long lines.
        say(*to_json(doctor()).split("\n"), file=console.file)
        return
    with console.status("trying the fast paths ..."):
        findings = doctor()
    print_findings(findings, console)


def to_json(findings: list[Finding]) -> str:
    """Return {"findings": [{section, name, status, detail, remedy}, ...]}"""
    return as_json({"findings": [asdict(f) for f in findings]}, indent=2)


def print_findings(findings: list[Finding], console: Console) -> None:
    """One table per section, and a last line that sums up."""
    for section in SECTIONS:
        print_section([f for f in findings if f.section == section], console)
    paths = [f for f in findings if f.section == "fast paths"]
    works = sum(f.status in ("ok", "note") for f in paths)
    broken = [f.name for f in findings if f.status == "broken"]
    summary = f"{works} of {len(paths)} fast paths work here"
    summary += f"; broken: {', '.join(broken)}" if broken else "; nothing is broken"
    runs = [f.name for f in findings if f.section == "runs now" and f.status == "ok"]
    runs = [name for name in runs if name in recipe_names()]
    console.print(summary + (f"; fastrepa train {' | '.join(runs)} runs now" if runs else ""))


# Probes: each in a process of its own ------------------------------------------------------------

# Modules of this process are found there too; -P keeps files of the working folder out of the way.
_CHILD = "import sys; from fastrepa.commands.doctor.examine import _answer; _answer(sys.argv[1])"


def _try(probe: Probe, timeout: float) -> list[Finding]:
    """A probe's findings, or the finding that it could not answer."""
    if not _installed(probe.module):
        return [Finding("fast paths", probe.name, "off", "not installed", probe.remedy)]
    key = next(k for k, p in PROBES.items() if p is probe)
    environment = outside_the_world() | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= probe.environment or {}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, key],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return [_broken(probe, f"gave no answer within {timeout:g} s")]
    except OSError as e:
        return [_broken(probe, f"could not be started: {one_line(e)}")]
    try:
        return [Finding(**finding) for finding in parse_json(done.stdout, key)]
    except (DataError, TypeError):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return [_broken(probe, f"{_ending(done.returncode)}: {one_line(last[0])}")]


def _answer(key: str) -> None:
    """Print the findings as JSON, and leave at once: in the probe's process."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes elsewhere
    probe = PROBES[key]
    try:
        findings = probe.run()
    except ModuleNotFoundError as e:
        remedy = f"pip install {probe.package}, with its dependencies ({e.name} is missing)"
        findings = [fast_path(probe.name, "broken", one_line(e), remedy)]
    except Exception as e:
        findings = [_broken(probe, one_line(e))]
    os.write(out, json.dumps([asdict(f) for f in findings]).encode())
    os._exit(0)  # a library that fails while it is taken down has worked all the same


def _broken(probe: Probe, detail: str) -> Finding:
    remedy = f"pip install --force-reinstall --no-deps {probe.package}"
    return Finding("fast paths", probe.name, "broken", detail, remedy)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _installed(module: str) -> bool:
    """Tell whether the module's file is there. Its parents are not imported: they may be broken."""
    path: Sequence[str] | None = None
    parts = module.split(".")
    for i in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: i + 1]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True
