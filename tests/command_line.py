"""Commands run in this process: a process of their own costs seconds of imports each.

The group of processes that a command would leave is kept: DeepSpeed cannot meet again in the same
process (see the `world` fixture).
"""

from contextlib import contextmanager
from unittest import mock

from typer.testing import CliRunner

from fastrepa.cli import app


@contextmanager
def kept_world():
    with mock.patch("fastrepa.runtime.world.destroy_world", return_value=None):
        yield


def invoke(*words):
    """The result of `fastrepa WORDS`; what it raised, FastrepaErrors too, is in `exception`."""
    with kept_world():
        return CliRunner().invoke(app, [str(word) for word in words])


def run(*words):
    """Return what a command printed; it must succeed."""
    done = invoke(*words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output
