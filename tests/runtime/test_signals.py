"""Signals that ask a run to stop, those that end it at once, and a launcher's repeats."""

import os
import signal

import pytest

from fastrepa.runtime import signals as module
from fastrepa.runtime.exit_codes import REQUEUE
from fastrepa.runtime.signals import Stopped, StopSignals
from fastrepa.runtime.world import LAUNCHER_VARIABLES

MINE = os.getpid()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*LAUNCHER_VARIABLES, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def saving():
    signals = StopSignals()
    signals.saves = True
    return signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_machine_may_repeat_its_signal(number):
    with saving() as signals:
        for _ in range(5):
            os.kill(MINE, number)
        os.kill(MINE, signal.SIGINT)
    assert signals.asked == number


def test_only_the_second_interrupt_ends_a_process_at_once(monkeypatch):
    with saving() as signals:
        os.kill(MINE, signal.SIGINT)
        assert signals.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(MINE, signal.SIGINT)
    monkeypatch.setenv("RANK", "0")  # torchrun hands on what the terminal has sent already
    monkeypatch.setenv("WORLD_SIZE", "1")
    now = 7.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with saving() as signals:
        os.kill(MINE, signal.SIGINT)
        os.kill(MINE, signal.SIGINT)
        assert signals.asked == signal.SIGINT
        now += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(MINE, signal.SIGINT)


def test_before_there_is_anything_to_save_a_signal_ends_it_in_a_line(capsys):
    with pytest.raises(Stopped) as caught, StopSignals():
        os.kill(MINE, signal.SIGTERM)
    assert caught.value.code == REQUEUE
    said = "told to stop by SIGTERM before there was anything to save; the same command starts"
    assert capsys.readouterr().out == f"{said} again\n"
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(MINE, signal.SIGINT)


def test_what_nohup_ignores_stays_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with saving() as signals:
            os.kill(MINE, signal.SIGHUP)
        assert signals.asked == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
