"""The Makefile's own words and exit codes, with stand-ins for pip and the command line."""

import os
import signal
import subprocess
import time

import pytest

from tests.runs import ROOT

PIP = """#!/bin/sh
echo 'Collecting torch>=2.11'
echo '  Downloading torch-2.15.0-cp311.whl.metadata (29 kB)'
echo '  Downloading torch-2.15.0-cp311.whl (853.1 MB)'
echo '  Downloading rich-15.0.0-py3-none-any.whl (0.2 MB)'
echo '  Using cached nvidia_cudnn-9.26-py3.whl (1.1 GB)'
echo 'Installing collected packages: rich, torch'
exit $PIP_ENDS
"""
# As a run does: Ctrl-C ends it in its own time, and with 130.
FASTREPA = """#!/bin/sh
trap 'sleep 0.3; echo saved; exit 130' INT
echo started
[ -z "$FAILS" ] || exit $FAILS
while :; do sleep 0.05; done
"""


@pytest.fixture
def make(tmp_path):
    """Start make with stand-ins in place of .venv."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in (("python", PIP), ("fastrepa", FASTREPA)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)

    def start(target, **variables):
        (tmp_path / ".ready").unlink(missing_ok=True)
        words = ["make", "--no-print-directory", f"VENV={tmp_path}", target]
        if target == "quickstart":
            words += ["-o", str(tmp_path / ".ready")]
        return subprocess.Popen(
            words, cwd=ROOT, env={**os.environ, **variables}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


@pytest.mark.parametrize("code", [0, 3])
def test_set_up_tells_what_it_fetches_and_fails_where_pip_does(make, tmp_path, code):
    ready = str(tmp_path / ".ready")
    done = make(ready, PIP_ENDS=str(code))
    said, _ = done.communicate()
    lines = said.splitlines()
    assert lines[1:4] == [
        "  Downloading torch-2.15.0-cp311.whl (853.1 MB)",
        "  Using cached nvidia_cudnn-9.26-py3.whl (1.1 GB)",
        "  Unpacking, a minute or two",
    ]
    assert (done.returncode, os.path.exists(ready)) == ((2, False) if code else (0, True))


def test_ctrl_c_waits_for_the_run_and_is_no_error(make):
    run = make("quickstart")
    assert run.stdout.readline() == "started\n"
    time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said, _ = run.communicate(timeout=10)
    assert said == "saved\n"
    assert run.returncode == -signal.SIGINT


def test_a_run_that_fails_is_an_error(make):
    run = make("quickstart", FAILS="1")
    said, _ = run.communicate()
    assert run.returncode == 2
    assert "Error 1" in said
