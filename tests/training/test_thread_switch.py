"""A run on a CPU whose threads are tried in its first steps, recorded, and kept by the next."""

import pytest
import torch

from fastrepa.checkpoint.format import checkpoint_path, read_state
from fastrepa.runtime import threads
from tests import command_line
from tests.runs import ROOT, SMALL, metrics


@pytest.fixture
def busy(monkeypatch):
    """Two cores that others want too, where one thread is always the better choice."""
    monkeypatch.delenv(threads.COUNT, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "others", lambda: 0.9)
    monkeypatch.setattr(threads, "BETTER", 1e9)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def train(run, *overrides):
    small = [*SMALL, "vision.encoders=[]", "training.checkpoint_every=0", "model.depth=2"]
    return command_line.run(
        "train", ROOT / "configs/quickstart.yaml", f"run={run}", *small, *overrides
    )


def test_a_switch_is_said_logged_recorded_and_kept(tmp_path, busy, world):
    run = tmp_path / "run"
    said = train(run, "training.steps=14")
    assert "device cpu (threads 2 of 2" in said
    assert "others take 90%, the first steps try 2 and 1) x 1" in said
    assert "warning: step 11: threads: 1 from here on, 2 before (a step with 2: " in said
    assert {line["step"]: line["threads"] for line in metrics(run) if "threads" in line} == {11: 1}
    assert read_state(checkpoint_path(run, 14)).threads == torch.get_num_threads() == 1
    torch.set_num_threads(2)
    said = train(run, "training.steps=16")
    assert "device cpu (threads 1 of 2" in said
    assert ": as before) x 1" in said
    assert "threads: " not in said
    torch.set_num_threads(2)
    said = train(run, "training.steps=17", "training.threads=2")
    assert "training.threads, 1 before: it rounds otherwise) x 1" in said
    assert read_state(checkpoint_path(run, 17)).threads == 2


def test_a_deterministic_run_never_tries(tmp_path, busy, world, monkeypatch):
    # Torch's own switches stay as they are for the tests that come later.
    monkeypatch.setattr("fastrepa.training.run.make_deterministic", lambda wanted: None)
    monkeypatch.setattr("fastrepa.training.trainer.make_deterministic", lambda wanted: None)
    monkeypatch.setattr("fastrepa.runtime.determinism.make_deterministic", lambda wanted: None)
    said = train(tmp_path / "run", "training.steps=12", "deterministic=true")
    assert "deterministic) x 1" in said
    assert "threads: " not in said
    assert read_state(checkpoint_path(tmp_path / "run", 12)).threads == 2
