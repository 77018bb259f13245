"""The measurement of CPU threads: a run's rate, the machines, the table."""

from types import SimpleNamespace

import pytest

from benchmarks import cpu_threads, report
from fastrepa.errors import FastrepaError
from tests import warm
from tests.runs import SMALL, metrics


def test_a_rate_is_of_steps_after_the_first_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_threads, "PYTHON", warm.python())
    small = (*SMALL, "vision.encoders=[]", "training.global_batch=16", "training.steps=100000")
    monkeypatch.setattr(cpu_threads, "SETTING", small)
    found = cpu_threads.rate(tmp_path / "run", {"OMP_NUM_THREADS": "1"}, 0.5, None)
    assert found["said"].startswith("threads 1 of ")
    assert found["said"].endswith(": OMP_NUM_THREADS")
    assert found["switches"] == []
    assert found["from_step"] > 1
    lines = metrics(tmp_path / "run")[found["from_step"] - 1 :]
    took = lines[found["steps"]]["seconds"] - lines[0]["seconds"]
    assert took >= 0.5
    assert found["images_per_s"] == pytest.approx(16 * found["steps"] / took)
    monkeypatch.setattr(cpu_threads, "SETTING", ("training.step=1",))
    with pytest.raises(FastrepaError, match=r"by itself: .*training\.step: unknown key"):
        cpu_threads.rate(tmp_path / "other_run", {}, 0.5, None)


def test_machines_and_their_table(tmp_path, monkeypatch, capsys):
    asked = []

    def rate(run, setting, seconds, group):
        asked.append((run.name, setting.get("OMP_NUM_THREADS"), group))
        return {"images_per_s": 10.0 * len(asked), "steps": 3, "said": "", "switches": []}

    monkeypatch.setattr(cpu_threads, "rate", rate)
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(cpu_threads, "others", lambda: 0.0)
    group = tmp_path / "group"
    group.mkdir()
    monkeypatch.setattr(cpu_threads, "_group", lambda top, limit: group)
    record = tmp_path / "records" / "threads.jsonl"
    assert cpu_threads.main(["--busy", "1", "--record", str(record)]) == 0
    said = capsys.readouterr().out
    assert [(machine, threads) for machine, threads, _ in asked[:5]] == [
        ("idle_spinning", "2"), ("idle_one", "1"), ("idle_passive", "2"), ("idle_chosen", None),
        ("busy_spinning", "2"),
    ]  # fmt: skip
    assert [group for *_, group in asked] == [None] * 8 + [group] * 4
    assert not group.exists()
    assert "| threads | idle | beside 1 busy processes | quota of 1 |" in said
    assert "| chosen by the run | 40 | 80 | 120 |" in said
    records = report.load(record.parent)
    assert len(records) == 12
    assert report.threads(records) in said + "\n"
    monkeypatch.setattr(cpu_threads, "_group", lambda top, limit: None)
    options = SimpleNamespace(busy=0, quota=1.0, seconds=1.0)
    assert len(list(cpu_threads.measure(options, tmp_path))) == 8
    assert "quota: left out" in capsys.readouterr().out
