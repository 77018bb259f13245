"""A killed run, started again, ends bit for bit where an undisturbed one ends."""

import os
import shutil
import signal
import subprocess
import time

import pytest
import torch

from benchmarks.faults.kills import kills
from tests.runs import (
    ROOT,
    SMALL,
    environment,
    metrics,
    tensors,
    train,
    train_command,
)

pytestmark = pytest.mark.ranks

# A model whose checkpoint takes long enough to write that a kill lands in it.
LARGER = ("model.width=192", "model.depth=4", "model.heads=6", "training.keep_checkpoints=2")


def test_killed_and_continued_equals_undisturbed(tmp_path):
    # `python -m benchmarks.faults kills2 kills3` does 12 of them, in two stages;
    # test_placed_kills.py kills at single writes.
    arguments = [str(ROOT / "configs/quickstart.yaml"), *SMALL, *LARGER]
    arguments += ["zero.stage=3", "training.precision=bf16", "deterministic=true"]
    arguments += ["training.ema=[0.99, {sigma_rel: 0.1}]"]
    done = kills(tmp_path, arguments, count=2, steps=10, seed=time.time_ns())
    assert done["count"] == 2
    assert done["different"] == [], done["lives"]
    assert done["same_losses"] and done["tensors"] > 100
    assert done["during_save"] >= 1, done["lives"]  # the first of them waits for a save
    # A rank that was left ended by itself, and said why.
    assert set(done["survivor_codes"]) <= {"76"}, done["lives"]
    # A save that was under way counts for nothing, the one before it does.
    assert done["steps_lost_most"] <= 2 * 2, done["lives"]
    first, last = (tensors(tmp_path / "killed/run", step) for step in (8, 10))
    for average in ("ema", "ema_sigma_rel_0.1"):
        name = f"{average}/blocks.0.mlp.fc1.weight"
        assert not torch.equal(first[name], last[name])


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_finishes_the_step_saves_and_the_same_command_continues(tmp_path, number, ranks):
    run, settings = tmp_path / "run", ("training.steps=60", "training.checkpoint_every=0")
    process = subprocess.Popen(
        train_command(run, *settings, ranks=ranks, cold=True), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.02)
    if ranks == 1:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        # torchrun alone has it, its ranks lead sessions of their own: systemd repeats it, and then
        # it dies before it has told them.
        for repeated in (number, number, number, signal.SIGKILL):
            os.killpg(process.pid, repeated)
            time.sleep(0.005)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "saved; the same command continues" in out, out + err
    if ranks == 1:
        assert process.returncode == 128 + number
        assert "Traceback" not in err
    stopped = metrics(run)[-1]["step"]
    assert 0 < stopped < 60
    assert (run / "checkpoints" / f"step_{stopped:07d}" / "manifest.json").is_file()
    # Cold: ranks that end in good order, each with draws and a hash seed of its own.
    settings = (f"training.steps={stopped + 1}", "training.checkpoint_every=0")
    more = train(run, *settings, ranks=ranks, cold=True)
    assert f"from step {stopped}" in more.stdout.replace("\n", " ")
    assert metrics(run)[-1]["step"] == stopped + 1


def test_continued_with_h_kept_ends_with_the_same_bits(tmp_path):
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    common = ("training.steps=4", "training.precision=bf16")
    train(plain, *common, "training.keep=none")
    shutil.copytree(plain, kept)
    shutil.rmtree(kept / "checkpoints/step_0000004")
    done = train(kept, *common, "training.keep=h")
    assert "from step 2" in done.stdout.replace("\n", " ")
    assert "keep h" in done.stdout.replace("\n", " ") and "curve changes" not in done.stdout
    assert [line["loss"] for line in metrics(kept)] == [line["loss"] for line in metrics(plain)]
    a, b = tensors(plain, 4), tensors(kept, 4)
    assert a.keys() == b.keys() and len(a) > 100
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert any(not torch.equal(a[n], v) for n, v in tensors(plain, 2).items() if n[:3] == "ema")


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
