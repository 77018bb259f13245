"""A killed run, started again, ends bit for bit where an undisturbed one ends."""

import random
import signal
import subprocess
import time

import pytest
import torch

from tests.engine.training.runs import environment, metrics, tensors, train, train_command

STEPS = 8


def killed_run(run, *overrides, ranks, after):
    """Start the run and SIGKILL all of it once step `after` is in its metrics."""
    process = subprocess.Popen(
        train_command(run, *overrides, ranks=ranks), env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    path = run / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= after:
            break
        time.sleep(0.01)
    import os

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert path.exists(), process.stderr.read().decode()


@pytest.mark.parametrize(
    ("ranks", "stage", "precision"), [(1, 1, "bf16"), (2, 2, "fp32"), (2, 3, "bf16")]
)
def test_killed_and_continued_equals_undisturbed(tmp_path, ranks, stage, precision):
    settings = (
        f"training.steps={STEPS}", f"zero.stage={stage}", f"training.precision={precision}",
        "training.ema=[0.99, {sigma_rel: 0.1}]",
    )  # fmt: skip
    train(tmp_path / "whole", *settings, ranks=ranks)
    after = random.Random(f"{ranks}{stage}{time.time_ns()}").randint(2, STEPS - 2)
    killed_run(tmp_path / "killed", *settings, ranks=ranks, after=after)
    train(tmp_path / "killed", *settings, ranks=ranks)
    whole, killed = (tensors(tmp_path / n, STEPS) for n in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    different = [n for n in whole if not torch.equal(whole[n], killed[n])]
    assert not different, f"killed after step {after}: {different}"
    a, b = (metrics(tmp_path / n) for n in ("whole", "killed"))
    assert [m["step"] for m in b] == [m["step"] for m in a] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in b] == [m["loss"] for m in a]
    first, last = tensors(tmp_path / "whole", 2), whole
    for average in ("ema", "ema_sigma_rel_0.1"):
        name = f"{average}/blocks.0.mlp.fc1.weight"
        assert not torch.equal(first[name], last[name])


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_finishes_the_step_saves_and_the_same_command_continues(tmp_path, number, ranks):
    run, settings = tmp_path / "run", ("training.steps=60", "training.checkpoint_every=0")
    process = subprocess.Popen(
        train_command(run, *settings, ranks=ranks), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "saved; the same command continues" in out, out + err
    if ranks == 1:
        assert process.returncode == 128 + number
        assert "Traceback" not in err
    stopped = metrics(run)[-1]["step"]
    assert 0 < stopped < 60
    assert (run / "checkpoints" / f"step_{stopped:07d}" / "manifest.json").is_file()
    more = train(run, f"training.steps={stopped + 1}", "training.checkpoint_every=0", ranks=ranks)
    assert f"from step {stopped}" in more.stdout.replace("\n", " ")
    assert metrics(run)[-1]["step"] == stopped + 1


def test_other_ranks_and_other_stages_continue_the_same_curve(tmp_path):
    common = ("training.schedule.name=constant", "training.checkpoint_every=0")
    train(tmp_path / "whole", *common, "training.steps=6", ranks=1)
    legs = ((2, 2, 2), (4, 1, 3), (6, 4, 1))  # up to which step, on how many ranks, ZeRO stage
    for steps, ranks, stage in legs:
        settings = (*common, f"training.steps={steps}", f"zero.stage={stage}")
        train(tmp_path / "moved", *settings, ranks=ranks)
    whole, moved = (metrics(tmp_path / n) for n in ("whole", "moved"))
    assert [m["step"] for m in moved] == [m["step"] for m in whole] == [1, 2, 3, 4, 5, 6]
    for line, expected in zip(moved, whole, strict=True):
        for key in ("loss", "velocity_loss", "alignment_loss", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), (line["step"], key)
    assert whole[0]["loss"] != whole[-1]["loss"]
    a, b = (tensors(tmp_path / n, 6) for n in ("whole", "moved"))
    states = ("weights/", "ema/", "exp_avg/", "exp_avg_sq/")
    assert {n for n in a if n.startswith(states)} == {n for n in b if n.startswith(states)}
    for name in a:
        if name.startswith("ema/"):
            torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-6)
    parts = [p.name for p in (tmp_path / "moved/checkpoints/step_0000006").glob("ema*")]
    assert sorted(parts) == [f"ema-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
