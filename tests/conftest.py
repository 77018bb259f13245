"""Triton decides when it is first imported whether kernels are interpreted: so this comes first."""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


ALONE = ("tests/end_to_end/", "tests/engine/training/", "tests/engine/insight/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `make test`, which shares the tests out over processes: what starts processes of its own
    runs one after another in one of them, or two such would wait for each other's cores; the rest
    stays together by file. (pytest-xdist 3.8's own groups have no effect under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "processes" if file.startswith(ALONE) else file

    return ByFile(config, log)
