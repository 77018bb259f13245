"""What importing a part of the engine reads; `make lint` checks who may import whom."""

import subprocess
import sys

import pytest


def loaded(module: str) -> set[str]:
    """Every module that a fresh process has after `import module`."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_training_process_reads_the_core_alone():
    """70 files of the engine's, packages' own included: an evening's reading."""
    ours = {name for name in loaded("fastrepa.training.run") if name.startswith("fastrepa.")}
    assert not {name for name in ours if name.startswith(("fastrepa.commands", "fastrepa.cli"))}
    assert len(ours) <= 70


@pytest.mark.parametrize(
    "module",
    ["generation.generate", "commands.evaluate.evaluate", "commands.plan.plan",
     "training.memory.decision"],
)  # fmt: skip
def test_who_starts_no_engine_does_not_wait_for_deepspeed(module):
    assert "deepspeed" not in loaded(f"fastrepa.{module}")
