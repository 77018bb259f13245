"""The world is what the launcher says; ranks share what rank 0 finds and miss one that leaves."""

import os
import socket
import subprocess
import sys

import pytest

from fastrepa.errors import ConfigError, DataError
from fastrepa.runtime.world import (
    LAUNCHER_VARIABLES,
    World,
    launched_world,
    of_rank_0,
    outside_the_world,
    patient_world,
)

RANK = """
import os, time
from fastrepa.errors import DataError
from fastrepa.runtime.world import of_rank_0, patient_world

def refuse():
    raise DataError(f"refused by rank {world.rank}")

with patient_world() as world:
    print(of_rank_0(world, lambda: ["found by rank", world.rank]))
    try:
        of_rank_0(world, refuse)
    except DataError as e:
        print(e)
    if not world.is_rank_0:
        time.sleep(1)  # in which the first waits
    ticks = []
    world.wait(lambda: ticks.append(1))
    print(f"rank {world.rank}", "waited" if len(ticks) > 1 else "came last", flush=True)
    if not world.is_rank_0:
        os._exit(3)
    try:
        world.wait()
    except DataError as e:
        print(e)
"""
SHARED = "['found by rank', 0]\nrefused by rank 0\n"


@pytest.fixture
def alone(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_ranks_share_what_the_first_finds_and_miss_one_that_leaves():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    meet = outside_the_world() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env=meet | {"RANK": str(rank), "WORLD_SIZE": "2"},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    (first, said), (other, _) = (process.communicate(timeout=120) for process in ranks)
    assert [process.returncode for process in ranks] == [0, 3], said
    left = "another rank stopped; its own message says why\n"
    assert first == f"{SHARED}rank 0 waited\n{left}"
    assert other == f"{SHARED}rank 1 came last\n"


def test_the_launcher_says_who_and_how_many(alone, monkeypatch):
    assert launched_world() == World() == World(0, 1, local_rank=0, local_size=1)
    said = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    world = launched_world()
    assert world == World(5, 8, local_rank=1, local_size=4) and not world.is_rank_0
    assert not outside_the_world().keys() & said.keys()
    assert os.environ.items() >= outside_the_world().items()


def test_a_process_alone_waits_for_nobody(alone, monkeypatch):
    def refuse():
        raise DataError("refused")

    with patient_world() as world:
        world.wait(refuse)
        assert of_rank_0(world, lambda: world) is world
        with pytest.raises(DataError, match="refused"):
            of_rank_0(world, refuse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but RANK is not set"), patient_world():
        pass


def test_what_is_empty_is_not_set_and_what_is_no_number_is_named(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "")
    assert launched_world() == World()
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(ConfigError, match="LOCAL_RANK: 'first' in the environment is no number"):
        launched_world()
