"""The world is what the launcher says; ranks share what rank 0 finds and miss one that leaves."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastrepa.errors import ConfigError, DataError
from fastrepa.runtime import world as world_module
from fastrepa.runtime.world import (
    LAUNCHER_VARIABLES,
    World,
    init_world,
    launched_world,
    of_rank_0,
    outside_the_world,
    patient_world,
)
from tests.runs import environment, train_command

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


MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"WORLD_SIZE": "8", "RANK": "0"}, "WORLD_SIZE is 8, but MASTER_ADDR is not set"),
        (MEET | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set"),
        (MEET | {"WORLD_SIZE": "8", "RANK": ""}, "WORLD_SIZE is 8, but RANK is not set"),
        (MEET | {"WORLD_SIZE": "8", "RANK": "0", "MASTER_PORT": ""}, "but MASTER_PORT is not set"),
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE is not set"),
        (MEET | {"RANK": "8", "WORLD_SIZE": "8"}, "RANK: 8 is none of the 8 ranks of WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "RANK: 0 is none of the 0 ranks"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' in the environment is no number"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE: '²' in the environment is no number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: '-1' in the environment is no number"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: '999"),
        (MEET | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "http"}, "MASTER_PORT: 'http'"),
        (MEET | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "65536"}, "MASTER_PORT: '65536'"),
        (MEET | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "0"}, "MASTER_PORT: '0'"),
    ],
)
def test_ranks_that_could_never_meet_are_refused_at_once(alone, monkeypatch, said, words):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        init_world()
    assert words in str(caught.value) and len(str(caught.value)) < 200
    with pytest.raises(ConfigError), patient_world():
        pass


@pytest.mark.parametrize("said", [{"WORLD_SIZE": "8", "RANK": "0"}, {"RANK": "3"}])
def test_the_command_ends_where_ranks_could_never_meet(tmp_path, said):
    done = subprocess.run(
        train_command(tmp_path / "run", "training.steps=2"),
        env=environment() | said, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout
    assert (
        "fastrepa: error" in done.stderr and f"is {next(iter(said.values()))}, but" in done.stderr
    )


@pytest.fixture
def meeting(alone, monkeypatch):
    """A function that lets a rank meet others at a free port, or at a port of one's own."""
    monkeypatch.setattr(world_module, "_QUIET", 0.2)
    monkeypatch.setattr(world_module, "_NAMELESS", 0.0)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("", 0)) as s:
        port = s.getsockname()[1]

    def meet(rank, size=2, host="127.0.0.1", port=port, seconds=1.0):
        monkeypatch.setenv("MASTER_ADDR", host)
        monkeypatch.setenv("MASTER_PORT", str(port))
        return world_module._meeting(World(rank, size), seconds)

    return meet


def test_ranks_that_wait_in_vain_say_for_whom(meeting, capfd):
    with pytest.raises(ConfigError, match=r"1 of 2 ranks did not come in 1 s, .*rank 1$"):
        meeting(0)
    with pytest.raises(ConfigError, match=r":\d+: rank 0 did not come in 1 s \(Connection refused"):
        meeting(1)
    waiting = [f"rank {rank} waits for the others of 2 at 127.0.0.1:" for rank in (0, 1)]
    said = capfd.readouterr().err.splitlines()
    assert [line.rpartition(":")[0] + ":" for line in said] == [f"warning: {w}" for w in waiting]


def test_ranks_that_cannot_meet_are_refused_in_a_line(meeting, capfd):
    with pytest.raises(ConfigError, match=r"MASTER_ADDR: 'no\.such\.invalid' has no address \("):
        meeting(1, host="no.such.invalid")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"MASTER_PORT: {port} is taken on this host"):
            meeting(0, port=port)
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(meeting, rank, size=3, seconds=3.0) for rank in (0, 1)]
        time.sleep(0.5)
        with pytest.raises(ConfigError, match="is rank 1 too"):
            meeting(1, size=3)
        for other in others:
            assert "rank 2" in str(other.exception())


def test_a_rank_without_a_gpu_of_its_own_is_refused(alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK: 2, but this host shows 2 GPUs"):
        init_world()
