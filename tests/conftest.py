"""Triton decides when it is first imported whether kernels are interpreted: so this comes first."""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


SEVERAL_RANKS = (
    "tests/engine/training/", "tests/end_to_end/test_resume.py", "tests/end_to_end/test_survival",
    "tests/end_to_end/test_cached.py",
    "tests/engine/insight/test_profile.py",  # it times, which four ranks beside it disturb
)  # fmt: skip
LONG = (
    "test_gpu_suite.py", "test_plan.py", "test_wrong_inputs.py", "test_commands.py",
    "test_documentation.py", "test_data_commands.py", "test_prepare_restart.py",
    "test_evaluate.py", "test_encode.py", "test_effect_benchmark.py", "test_quantise.py",
    "test_aot.py", "test_benchmarks.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that at the end no process is left with a long file."""

    def place(item: pytest.Item) -> int:
        if item.nodeid.startswith(SEVERAL_RANKS):
            return 0
        return 1 + LONG.index(item.path.name) if item.path.name in LONG else 1 + len(LONG)

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same draws in every run, in any order: a failure seen once can be seen again."""
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `make test`, which shares the tests out over processes by file: those of several ranks
    run one after another in one of them, or two such would wait for each other's cores.
    (pytest-xdist 3.8's own groups have no effect under pytest 9.2.)
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ranks" if nodeid.startswith(SEVERAL_RANKS) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # by number of tests
    return ByFile(config, log)
