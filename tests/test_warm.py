"""A warm start is a process as a cold one is, and the same to who starts it."""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.runs import ROOT, environment, program

PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def start(folder, *words, cold=False):
    return subprocess.Popen(
        program("tests.programs.said_back", *words, cold=cold), **PIPES, text=True, cwd=folder,
        env=environment() | {"WORD": "some word", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (("read", "a b", ""), 0, "some input\n", ""),
        (("exit", "76"), 76, "and its thread\n", ""),
        (("raise",), 1, "", "ValueError: planted"),
        (("kill",), -signal.SIGKILL, "", ""),
    ],
)
def test_what_it_is_given_and_how_it_ends(tmp_path, words, code, out, err, cold):
    process = start(tmp_path, *words, cold=cold)
    said, errors = process.communicate("some input\n", timeout=60)
    line, _, rest = said.partition("\n")
    given = json.loads(line)
    assert given["argv"] == list(words)
    assert given["folder"] == given["path"] == str(tmp_path)
    assert given["word"] == "some word"
    assert given["modules"] == ([] if cold else ["deepspeed", "torch"])
    assert (process.returncode, rest) == (code, out), errors
    assert err in errors.splitlines()[-1] if err else not errors


def test_forks_draw_apart(tmp_path):
    """Two that drew alike would hide a draw that nobody seeded."""
    said = [start(tmp_path, "draw").communicate(timeout=60)[0].splitlines()[1] for _ in range(2)]
    assert all(a != b for a, b in zip(*map(json.loads, said), strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_handed_on(tmp_path, number):
    process = start(tmp_path, "wait")
    process.stdout.readline()
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    interrupted = number == signal.SIGINT
    assert (process.returncode, out) == ((130, "interrupted\n") if interrupted else (-number, ""))


def test_a_killed_one_leaves_nothing(tmp_path):
    process = start(tmp_path, "wait")
    pid = json.loads(process.stdout.readline())["pid"]
    assert pid != process.pid
    process.kill()
    process.communicate(timeout=60)  # the other end of the pipes is closed
    ends = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < ends:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")
