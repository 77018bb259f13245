"""Killed at any of its writes and started again, a run ends with the bits of an undisturbed one."""

import os
import signal
import time

import pytest

from benchmarks.faults import lives, placed

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def came_through(done):
    assert done["reached"] == done["right"] == done["count"], done["lives"]
    assert done["tensors"] > 100 and done["steps_lost_most"] <= lives.LAST - lives.FIRST


def test_one_rank_killed_at_each_kind_of_call(tmp_path):
    # `python -m benchmarks.faults writes1 writes3` does them all.
    done = placed.placed(tmp_path / "placed", each_call_once=True, seed=time.time_ns())
    came_through(done)
    if done["by"] == placed.LIBRARY:  # Python alone tells of no write
        assert {"write", "fsync"} <= done["calls"].keys() and done["places"] > 60, done["calls"]
    assert {"open", "mkdir", "rename", "unlink", "rmdir"} <= done["calls"].keys()
    assert done["count"] == len(done["calls"])


def test_three_ranks_die_of_a_write_of_one(tmp_path):
    done = placed.placed(tmp_path / "placed", ranks=3, most=2, together=1.0, seed=time.time_ns())
    came_through(done)
    assert [life["rank"] for life in done["lives"]] == [0, 2]
    assert done["count"] == 2


def test_without_a_compiler_pythons_own_events_are_counted(tmp_path, monkeypatch):
    run, log, ended = tmp_path / "run", tmp_path / "log.txt", []
    monkeypatch.setattr(placed.shutil, "which", lambda name: None)
    assert placed.compiled(tmp_path) == ""
    hook = lives.counting(str(run), 3, log)
    monkeypatch.setattr(lives.os, "kill", lambda pid, number: ended.append((pid, number)))
    for event, *details in (
        ("os.mkdir", str(run / "checkpoints"), 0o777, -1),
        ("open", str(run / "config.yaml"), "r", os.O_RDONLY),
        ("open", str(tmp_path / "elsewhere"), "w", os.O_WRONLY | os.O_CREAT),
        ("open", str(run / "config.yaml"), "w", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ("open", 7, "w", os.O_WRONLY | os.O_CREAT),
        ("os.rename", str(run / ".a.tmp"), os.fsencode(run / "a"), -1, -1),
        ("os.remove", str(run / "a"), -1),
    ):
        hook(event, tuple(details))
        assert len(ended) == (event in ("os.rename", "os.remove"))
    lines = ["mkdir /checkpoints", "open /config.yaml", "rename /a", "unlink /a"]
    assert log.read_text().splitlines() == lines
    assert ended == [(os.getpid(), signal.SIGKILL)]
