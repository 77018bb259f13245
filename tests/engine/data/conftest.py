"""A small image tree, and sets prepared from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastrepa.data.prepare import prepare
from fastrepa.data.shards import ShardSet
from tests.engine.data.trees import RESOLUTION, write_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree") / "source")


@pytest.fixture
def make_set(tree: Path, tmp_path: Path) -> Callable[..., ShardSet]:
    """Prepare the tree (34 images, shards of 8) and open it: make_set(image_format="jpeg", ...)."""

    def make(source: Path = tree, name: str = "set", **settings: object) -> ShardSet:
        options: dict = {"resolution": RESOLUTION, "shard_size": 8, "workers": 0, **settings}
        prepare(source, tmp_path / name, progress=False, **options)
        return ShardSet.open(tmp_path / name)

    return make
