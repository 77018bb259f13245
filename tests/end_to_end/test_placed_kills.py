"""Killed at any of its writes and started again, a run ends with the bits of an undisturbed one."""

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
    assert done["by"] == placed.LIBRARY
    assert done["count"] == len(done["calls"]) >= 7 and done["places"] > 60, done["calls"]


def test_three_ranks_die_of_a_write_of_one(tmp_path):
    done = placed.placed(tmp_path / "placed", ranks=3, most=2, together=1.0, seed=time.time_ns())
    came_through(done)
    assert [life["rank"] for life in done["lives"]] == [0, 2]
    assert done["count"] == 2 and done["places"] > 100


def test_without_a_compiler_pythons_own_events_are_the_places(tmp_path):
    done = placed.placed(tmp_path / "placed", most=1, hooks=True, seed=time.time_ns())
    came_through(done)
    assert done["by"] == placed.HOOKS
    assert {"open", "mkdir", "rename", "unlink"} <= done["calls"].keys()
