"""Triton decides when it is first imported whether kernels are interpreted: so this comes first."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


ALONE = ("tests/end_to_end/", "tests/engine/training/", "tests/engine/insight/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `make test`, which shares the tests out over processes: what starts processes of its own
    runs one after another in one of them, or two such would wait for each other's cores; the rest
    stays together by file.
    """
    for item in items:
        file = item.nodeid.partition("::")[0]
        group = "processes" if file.startswith(ALONE) else file
        item.add_marker(pytest.mark.xdist_group(group))
