"""CPU threads: the cores that are there, what OpenMP is told, and the choice of a count."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fastrepa.runtime import hardware, threads
from fastrepa.runtime.threads import (
    COUNT,
    NONE,
    POLICY,
    SHORT,
    SPIN,
    WARM,
    WINDOW,
    Threads,
    before_torch,
    choose_threads,
)
from fastrepa.runtime.world import World

V1 = "31 24 0:29 {top} /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct"
V2 = "32 24 0:30 {top} /cg rw,nosuid shared:4 - cgroup2 cgroup2 rw"


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", errors="surrogateescape")
    return root


# Cases: the mount's own top, this process's groups, quotas by file, and the cores they leave of 8.
@pytest.mark.parametrize(
    ("mount", "groups", "quotas", "cores"),
    [
        (V2.format(top="/"), "0::/a/b", {"cg/a/b/cpu.max": "max 100000"}, 8),
        (V2.format(top="/"), "0::/a/b", {"cg/a/b/cpu.max": "350000 100000"}, 3),
        (V2.format(top="/"), "0::/a/b",
         {"cg/a/b/cpu.max": "600000 100000", "cg/a/cpu.max": "200000 100000"}, 2),
        (V2.format(top="/"), "0::/a/b", {"cg/a/b/cpu.max": "50000 100000"}, 1),
        (V2.format(top="/"), "0::/a/b", {"cg/other/cpu.max": "100000 100000"}, 8),
        (V2.format(top="/pod/x"), "0::/pod/x/y", {"cg/cpu.max": "400000 100000"}, 4),
        (V2.format(top="/pod/x"), "0::/elsewhere", {"cg/cpu.max": "400000 100000"}, 4),
        (V2.format(top="/"), "0::/../..", {"cg/cpu.max": "400000 100000"}, 4),
        (V1.format(top="/"), "4:cpu,cpuacct:/a\n0::/",
         {"cg/cpu/a/cpu.cfs_quota_us": "250000", "cg/cpu/a/cpu.cfs_period_us": "100000",
          "cg/cpu/cpu.cfs_quota_us": "-1", "cg/cpu/cpu.cfs_period_us": "100000"}, 2),
        # A quota that is none, and lines that are not the kernel's.
        (V2.format(top="/"), "0::/a", {"cg/a/cpu.max": "100000 0"}, 8),
        (f"31 24\n30 24 0:28 / /caf\udce9 rw - ext4 d rw\n{V2.format(top='/')}", "junk\n0::/a",
         {"cg/a/cpu.max": "400000 100000"}, 4),
        ("33 24 0:31 / /cg/memory rw - cgroup cgroup rw,memory", "5:memory:/a", {}, 8),
    ],
)  # fmt: skip
def test_cores_are_those_that_every_quota_leaves(
    tmp_path, monkeypatch, mount, groups, quotas, cores
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    about = {"proc/self/cgroup": groups, "proc/self/mountinfo": mount}
    assert hardware.usable_cores(written(tmp_path, about | quotas)) == cores


def test_a_quota_of_this_kernel_is_counted():
    """Where this process may make a group; with the core that it leaves torch starts one thread."""
    group = Path("/sys/fs/cgroup/cpu/fastrepa-test")
    with suppress(OSError):
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("150000")
    code = (
        "import os; open('/sys/fs/cgroup/cpu/fastrepa-test/tasks', 'w').write(str(os.getpid()))\n"
        "from fastrepa.runtime.hardware import usable_cores\nprint(usable_cores())"
    )
    try:
        if not (group / "tasks").exists():
            assert hardware.usable_cores() <= len(os.sched_getaffinity(0))
            return
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "1\n", done.stderr
    finally:
        with suppress(OSError):
            group.rmdir()


# What OpenMP is told ------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not loaded torch, on eight free cores, with nothing set."""
    for name in (COUNT, SPIN, POLICY, "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "_ours", {})
    monkeypatch.setattr(threads, "_too_late", lambda: False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return monkeypatch


@pytest.mark.parametrize(("load", "spin"), [(None, SHORT), (0.1, SHORT), (0.9, NONE)])
def test_how_threads_wait_goes_by_the_load(fresh, load, spin):
    before_torch()
    assert os.environ[SPIN] == SHORT
    before_torch(lambda: load)
    assert os.environ[SPIN] == spin
    assert COUNT not in os.environ


@pytest.mark.parametrize(("name", "value"), [(POLICY, "ACTIVE"), (SPIN, "7"), (COUNT, "3")])
def test_what_the_user_has_set_stays(fresh, name, value):
    fresh.setenv(name, value)
    fresh.setattr(threads, "usable_cores", lambda: 2)
    before_torch(lambda: 0.9)
    assert os.environ[name] == value
    assert (SPIN in os.environ) == (name != POLICY)


def test_a_quota_is_told_to_openmp_and_is_no_users_setting(fresh):
    fresh.setattr(threads, "usable_cores", lambda: 2)
    before_torch()
    before_torch()
    assert os.environ[COUNT] == "2"
    assert not threads._of_the_user(COUNT)


@pytest.mark.parametrize(("theirs", "count"), [(b"", "4"), (b"OMP_NUM_THREADS=1\0", "1")])
def test_torchruns_one_thread_is_told_from_a_users(fresh, theirs, count):
    """torchrun sets it in its own process, whose first environment /proc keeps."""
    fresh.setenv(COUNT, "1")
    fresh.setenv("TORCHELASTIC_RUN_ID", "x")
    fresh.setenv("WORLD_SIZE", "2")
    fresh.setenv("LOCAL_WORLD_SIZE", "2")
    shell = [b"TORCHELASTIC_RUN_ID=x\0OMP_NUM_THREADS=1\0"]  # between torchrun and this process
    fresh.setattr(threads, "_environment", lambda pid: shell.pop() if shell else b"A=1\0" + theirs)
    before_torch()
    assert os.environ[COUNT] == count


def test_nothing_is_told_too_late(fresh):
    fresh.undo()  # torch is loaded here
    fresh.delenv(SPIN, raising=False)
    before_torch(lambda: 0.9)
    assert SPIN not in os.environ


@pytest.mark.parametrize(("idle", "share"), [(20, 0.0), (5, 0.75), (0, 1.0)])
def test_the_load_is_the_least_of_the_windows(monkeypatch, idle, share):
    readings = iter([(100, 50), (120, 50), (120, 50), (140, 50 + idle)])
    monkeypatch.setattr(threads, "_ticks", lambda: next(readings))
    assert threads.others(windows=2, seconds=0) == share
    monkeypatch.setattr(threads, "_ticks", lambda: (0, 0))
    assert threads.others(seconds=0) is None


# The choice ---------------------------------------------------------------------------------------


class Machine:
    """Steps of so many seconds by threads, on a machine that may change."""

    def __init__(self, monkeypatch, seconds, **how):
        self.seconds, self.counts, self.news = seconds, [], []
        monkeypatch.setattr(torch, "set_num_threads", self.counts.append)
        self.threads = Threads(max(seconds), max(seconds), "", free=True, **how)

    def steps(self, number):
        """As the training loop: the first rank's wish reaches all while the next step runs."""
        for _ in range(number):
            wanted = self.threads.wanted
            self.threads.took(self.seconds[self.threads.count])
            self.news += filter(None, [self.threads.take_news()])
            self.threads.follow(wanted)
        return self.threads.count


def test_a_trial_takes_the_fastest_and_says_so_once(monkeypatch):
    machine = Machine(monkeypatch, {8: 0.5, 2: 0.2, 1: 0.3}, trial=True)
    assert machine.steps(40) == 2
    assert machine.counts == [2, 1, 2]
    assert len(machine.news) == 1
    assert "2 from here on, 8 before (a step with 8: 500 ms, 2: 200 ms, 1: 300 ms)" in str(
        machine.news
    )


def test_more_threads_win_a_near_tie(monkeypatch):
    machine = Machine(monkeypatch, {2: 0.21, 1: 0.2}, trial=True)
    assert machine.steps(40) == 2
    assert not machine.news


def test_without_a_trial_nothing_changes_until_the_rate_halves(monkeypatch):
    machine = Machine(monkeypatch, {2: 0.1, 1: 0.15})
    machine.steps(WARM + 4 * WINDOW)
    machine.seconds = {2: 0.19, 1: 0.15}
    machine.steps(2 * WINDOW)
    assert not machine.counts
    machine.seconds = {2: 0.5, 1: 0.2}
    assert machine.steps(2 * WINDOW) == 1
    assert len(machine.news) == 1


def test_it_goes_back_when_others_have_gone(monkeypatch):
    machine = Machine(monkeypatch, {2: 0.8, 1: 0.3}, trial=True)
    assert machine.steps(3 * WINDOW) == 1
    machine.seconds = {2: 0.1, 1: 0.15}
    assert machine.steps(4 * WINDOW) == 2
    assert len(machine.news) == 2


def test_looks_that_change_nothing_become_rare(monkeypatch):
    machine = Machine(monkeypatch, {2: 0.1, 1: 0.15})
    for _ in range(200):  # a machine that is slow every other while
        machine.seconds = {2: 0.1, 1: 0.15}
        machine.steps(WINDOW)
        machine.seconds = {2: 0.3, 1: 0.45}
        machine.steps(WINDOW)
    assert machine.threads.count == 2
    assert 1 <= machine.counts.count(1) <= 10


def test_who_may_not_switch_never_does(monkeypatch):
    machine = Machine(monkeypatch, {2: 0.1, 1: 0.01})
    machine.threads.free = False
    machine.steps(3)
    machine.seconds[2] = 9.0
    machine.steps(10 * WINDOW)
    assert machine.counts == []


def test_the_other_ranks_follow_as_far_as_they_can(monkeypatch):
    other = Threads(2, 2, "")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for wanted, count in ((0, 2), (1, 1), (8, 2)):
        other.follow(wanted)
        assert other.count == count


@pytest.mark.parametrize(
    ("given", "load", "count", "said"),
    [
        ({}, 0.02, 4, "threads 4 of 4, spinning 10000: machine idle"),
        ({}, 0.96, 4, "threads 4 of 4, spinning 10000: others take 96%, the first steps try 4 and"),
        ({}, None, 4, "threads 4 of 4, spinning 10000: load unknown, the first steps try 4 and 1"),
        ({"recorded": 1}, 0.96, 1, "threads 1 of 4, spinning 10000: as before"),
        ({"recorded": 9}, 0.0, 4, "as before, 9 before: it rounds otherwise"),
        ({"deterministic": True}, 0.96, 4, "deterministic"),
        ({"configured": 3, "recorded": 2}, 0.9, 3, "training.threads, 2 before: it rounds other"),
    ],
)
def test_what_a_run_begins_with(fresh, given, load, count, said):
    fresh.setenv(SPIN, SHORT)
    fresh.setattr(threads, "others", lambda: load)
    fresh.setattr(torch, "get_num_threads", lambda: 4)
    fresh.setattr(torch, "set_num_threads", lambda count: None)
    world = World(local_size=2, chosen_device=torch.device("cpu"))
    how = {"configured": None, "recorded": 0, "deterministic": False} | given
    chosen = choose_threads(world, **how)
    assert chosen.count == count
    assert said in chosen.why
    assert chosen.free == ("configured" not in given and "deterministic" not in given)


def test_a_users_count_is_not_tried(fresh):
    fresh.setenv(COUNT, "1")
    fresh.setattr(torch, "get_num_threads", lambda: 1)
    chosen = choose_threads(World(chosen_device=torch.device("cpu")), None, 0, deterministic=False)
    assert (chosen.count, chosen.free) == (1, False)
    assert chosen.why == "threads 1 of 8: OMP_NUM_THREADS"
