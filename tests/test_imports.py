"""Importing a part of the engine reads what it needs; `make lint` checks who may import whom."""

import subprocess
import sys
from pathlib import Path


def loaded(module: str) -> dict[str, str]:
    """Every module that a fresh process has after `import module`, and its file."""
    code = (
        f"import sys, {module}\n"
        "for name, m in list(sys.modules.items()):\n"
        "    print(name, getattr(m, '__file__', None) or '-')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_a_training_process_reads_the_core_alone():
    """It reads at most 70 files of the engine's, beside those that only say what a folder is."""
    modules = loaded("fastrepa.training.run").items()
    found = {name: Path(file) for name, file in modules if name.startswith("fastrepa.")}
    assert not {k for k in found if k.startswith(("fastrepa.commands", "fastrepa.cli"))}
    read = [file for file in found.values() if len(file.read_text().splitlines()) > 1]
    assert 40 < len(read) <= 70


def test_who_starts_no_engine_does_not_wait_for_deepspeed():
    modules = [
        "fastrepa.generation.generate", "fastrepa.commands.evaluate.evaluate",
        "fastrepa.commands.plan.plan", "fastrepa.training.memory.decision",
    ]  # fmt: skip
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'deepspeed' not in sys.modules, name"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_process_alone_knows_its_world_without_torch():
    assert "torch" not in loaded("fastrepa.runtime.world")
