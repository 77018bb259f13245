"""A run folder in real runs: two owners, copies and moves, a disk that is full at any time."""

import json
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fastrepa.config import load_run_config
from tests.runs import command, environment, metrics, tensors, train, train_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 2 steps that is called runs/a from its folder's folder."""
    run = tmp_path_factory.mktemp("run") / "runs/a"
    train(run, "training.steps=2", "model.num_classes=auto")
    saved = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(saved.replace(f"run: {run}", "run: runs/a"))
    return run


def whole(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def saved(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").iterdir())


def until(process, true):
    ends = time.monotonic() + 90
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.01)


def logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def start(run: Path, *overrides: str):
    return subprocess.Popen(
        train_command(run, "training.steps=100000", *overrides), env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def process_of(run: Path) -> int:
    """The process that has last said so in the run's log."""
    return int(re.findall(r"joined, .* process (\d+)", (run / "rank_0.log").read_text())[-1])


def no_room(run: Path, size: int = 0) -> None:
    """A disk that is full from now on, whatever user runs the test."""
    resource.prlimit(process_of(run), resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def one_line(said: str) -> str:
    errors = [line for line in said.splitlines() if line.startswith("fastrepa: error")]
    assert len(errors) == 1 and "Traceback" not in said and "Logging error" not in said, said
    return errors[0]


def test_a_run_has_the_number_of_classes_that_auto_stood_for(trained):
    assert load_run_config(trained).model.num_classes == 8
    stored = tensors(trained, 2).items()
    rows = {len(value) for name, value in stored if name.endswith("embedding_table.weight")}
    assert rows == {9}  # one more for the null class


def test_a_copied_and_moved_run_goes_on_where_it_lies(trained, tmp_path):
    before = whole(trained)
    shutil.copytree(trained, tmp_path / "other/b")
    with (tmp_path / "other/b/metrics.jsonl").open("ab") as f:
        f.write(b'[1, 2]\nnull\n{"step": "x"}\n{"step": 2, "lo')
    done = subprocess.run(
        command("train", "b/config.yaml", "training.steps=4"), cwd=tmp_path / "other",
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == ["b"]
    assert saved(tmp_path / "other/b") == [2, 4]
    assert [line["step"] for line in metrics(tmp_path / "other/b")] == [1, 2, 3, 4]
    assert whole(trained) == before
    assert "this is the run in b, where config.yaml lies, which says run: runs/a" in done.stdout
    assert "b/metrics.jsonl: 4 lines that no run wrote" in done.stdout
    assert "continuing b from step 2" in done.stdout
    words = done.stdout.rpartition("images/s")[2]
    for path in re.findall(r"\bb/[\w./]*", words):
        assert (tmp_path / "other" / path).exists(), path


def test_the_second_of_two_trains_is_refused(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    with start(run, "training.checkpoint_every=0") as first:
        until(first, lambda: logged(run) > 3)
        second = train(run, "training.steps=100000", check=False)
        at = logged(run)
        until(first, lambda: logged(run) > at)
        pid = process_of(run)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75
    assert second.returncode == 1
    words = rf"{run}: in use by fastrepa train on \S+, process {pid}, since \S+"
    assert re.search(words, one_line(second.stderr))
    assert (run / "rank_0.log").read_text().count("joined") == 2
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, len(steps) + 1)) and saved(run) == [2, steps[-1]]
    assert not list(run.glob(".*"))


def test_a_disk_that_is_full_when_a_run_goes_on(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    before = whole(run)
    size = (run / "rank_0.log").stat().st_size
    with start(run) as process:
        until(process, lambda: (run / "rank_0.log").stat().st_size > size)
        no_room(run)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert str(run) in one_line(said) and "File too large" in said
    after = whole(run)
    assert {name for name in before if after.get(name) != before[name]} == {"rank_0.log"}
    assert set(after) == set(before)


def test_a_disk_that_fills_up_in_the_middle_and_has_room_again(trained, tmp_path):
    """All that a step writes has no room: metrics, log, TensorBoard, samples, checkpoints."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    more = ("training.tensorboard=true", "training.sample_every=3", "training.checkpoint_every=3")
    with start(run, *more) as process:
        until(process, lambda: logged(run) > 7)
        no_room(run)
        time.sleep(2)
        no_room(run, resource.RLIM_INFINITY)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=60)
    assert process.returncode == 75, out + said
    assert "Traceback" not in out + said and "Logging error" not in out + said
    assert out.count("metrics.jsonl: cannot be written") == 1
    assert (out + said).count("rank_0.log: cannot be written") == 1
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, len(steps) + 1)) and max(saved(run)) == steps[-1]
    assert json.loads((run / "environment.json").read_text())
