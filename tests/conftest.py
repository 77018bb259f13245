"""Triton decides when it is first imported whether kernels are interpreted: so this comes first.

Fixtures import the engine when they are asked for: the tests of the kernels do without it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A shell that starts the tests in the background has SIGINT ignored, and so would what they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that at the end no process is left with a long file."""
    first = ("ranks", "slow")
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in first])


def pytest_sessionfinish() -> None:
    warm.stop()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same draws in every run, in any order: a failure seen once can be seen again."""
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the tests out over `make test`'s processes by file: those of several ranks run one
    after another in one of them, or two such would wait for each other's cores.
    (pytest-xdist 3.8's own groups have no effect under pytest 9.2.)
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def scope(file: str) -> str:
        """This process collects no tests, so the marker is read from the text."""
        return "ranks" if "pytest.mark.ranks" in (config.rootpath / file).read_text() else file

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # by number of tests
    return ByFile(config, log)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The suite's two processes then do not fight over two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def world() -> Any:
    """This process alone. Its group stays to the end, and so does the environment it was made
    with: DeepSpeed holds on to both, and cannot meet again in the same process.
    """
    from fastrepa.runtime.world import init_world

    return init_world()


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image tree."""
    from tests.sets.trees import write_tree

    return write_tree(tmp_path_factory.mktemp("tree") / "source")


@pytest.fixture
def make_set(tree: Path, tmp_path: Path) -> Callable[..., Any]:
    """Prepare the tree (34 images, shards of 8) and open it: make_set(image_format="jpeg", ...)."""
    from fastrepa.commands.prepare.prepare import prepare
    from fastrepa.data.format.shards import ShardSet
    from tests.sets.trees import RESOLUTION

    def make(source: Path = tree, name: str = "set", **settings: object) -> ShardSet:
        options: dict = {"resolution": RESOLUTION, "shard_size": 8, "workers": 0, **settings}
        prepare(source, tmp_path / name, progress=False, **options)
        return ShardSet.open(tmp_path / name)

    return make
