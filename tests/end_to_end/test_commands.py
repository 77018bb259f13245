"""The commands of README, run as a stranger would on small settings, each once a cold start."""

import json
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrepa.runtime.regions import NAMES
from fastrepa_kernels import launch
from tests.runs import ROOT, command, environment, metrics, train

pytestmark = pytest.mark.slow


def run(*args, cold=False):
    done = subprocess.run(
        command(*args, cold=cold), env=environment(), capture_output=True, text=True, timeout=400,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short quickstart, and what it printed: one process, 4 steps."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    settings = (
        "training.steps=4", "training.sample_every=2", "training.tensorboard=true",
        "training.ema=[{sigma_rel: 0.1}, 0.9]",
    )  # fmt: skip
    return folder, train(folder, *settings, "training.micro_batch=4", cold=True).stdout


def test_train_says_what_runs_and_leaves_everything(trained):
    folder, out = trained
    first = out.splitlines()[0]
    for word in ("device cpu", "attention sdpa-flash", "kernels fused", "ZeRO 1",
                 "tf_efficientnet_lite0 8x8x112", "codec pixel 3x32x32",
                 "batch 8 = 1 x 2 x 4"):  # fmt: skip
        assert word in first
    assert f"sample {folder} --num 64" in out
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", "curves.png", "samples",
                     "checkpoints", "tensorboard", "rank_0.log"}  # fmt: skip
    assert [p.name for p in sorted((folder / "samples").iterdir())] == [
        "step_0000002.png", "step_0000004.png",
    ]  # fmt: skip
    assert np.asarray(Image.open(folder / "curves.png")).std() > 0
    environment_json = json.loads((folder / "environment.json").read_text())
    assert environment_json["versions"]["torch"]
    assert environment_json["git"]["sha"]
    assert environment_json["attention"] == {
        "backend": "sdpa-flash", "configured": "auto", "require": "any", "passed_over": {},
    }  # fmt: skip
    line = metrics(folder)[-1]
    assert {"step", "seconds", "loss", "velocity_loss", "alignment_loss", "grad_norm", "lr",
            "images_per_s", "model_flops_per_s", "peak_memory_bytes",
            *NAMES} <= line.keys()  # fmt: skip
    assert "mfu" not in line  # nobody has printed a CPU's peak
    assert f"memory {line['peak_memory_bytes'] / 1e9:.1f} GB" in out
    assert -1 <= line["alignment_loss"] <= 1
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"share of time/backward", "images_per_s", "loss"} <= set(board.Tags()["scalars"])


def test_a_finished_run_says_so_and_changes_nothing(trained):
    folder, _ = trained
    before = (folder / "metrics.jsonl").read_bytes()
    again = train(folder, "training.steps=4", "training.sample_every=2")
    assert "is finished already" in again.stdout
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
def test_sample(trained, tmp_path, sampler):
    folder, _ = trained
    out = tmp_path / "out"
    run("sample", folder, "--num", 5, "--sampler", sampler, "--steps", 3, "--cfg", 1.8,
        "--guidance-high", 0.7, "--classes", "Animals & Nature,5", "--out", out, "--npz",
        "--seed", 3, *(("--ema", "0.9") if sampler == "sde" else ()),
        cold=sampler == "ode")  # fmt: skip
    record = json.loads((out / "sampling.json").read_text())
    assert record["ema"] == ("0.9" if sampler == "sde" else "sigma_rel=0.1")
    images = np.load(next(out.glob("*.npz")))["arr_0"]
    assert images.shape == (5, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(np.asarray(Image.open(out / "000003.png")), images[3])


def test_two_samples_and_an_interrupt(trained, tmp_path):
    """The second of two into one folder is refused; the first is ended by Ctrl-C, and goes on."""
    out, how = tmp_path / "images", {"env": environment(), "stderr": subprocess.PIPE, "text": True}
    draw = ("sample", trained[0], "--batch-size", 2, "--steps", 2, "--out", out)
    with subprocess.Popen(command(*draw, "--num", 4000), **how) as first:
        until = time.monotonic() + 60
        while not (out / "000003.png").is_file():
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        second = subprocess.run(command(*draw, "--num", 4, "--seed", 1), check=False, **how)
        first.send_signal(signal.SIGINT)
        said = first.stderr.read()
    assert second.returncode == 1
    (line,) = second.stderr.splitlines()
    words = rf"fastrepa: error: {out}: in use by fastrepa sample on .+, process \d+, since .+"
    assert re.fullmatch(words, line)
    assert first.returncode == 130 and said.count("\n") <= 1 and "Traceback" not in said
    assert not list(out.glob(".*"))
    assert json.loads((out / "sampling.json").read_text())["seed"] == 0
    there = len(list(out.glob("0*.png")))
    assert f"4 were there, {there - 4} more stay" in run(*draw, "--num", 4)
    assert len(list(out.glob("0*.png"))) == there


def test_prepare_then_train_on_it(tmp_path):
    for i in range(12):
        folder = tmp_path / "photos" / ("cat", "dog", "owl")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 90), (20 * i, 100, 200 - 10 * i)).save(folder / f"{i}.jpg")
    shards = tmp_path / "shards"
    out = run("prepare", tmp_path / "photos", shards, "--resolution", 64, cold=True)
    assert "12 images of 3 classes in 1 shard" in out
    train(tmp_path / "run", f"data.path={shards}", "training.steps=2")
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize("source", ["cached", "online"])
def test_dry_run_of_a_paper_recipe(source):
    recipe = ROOT / "configs/imagenet256_sit_b2_dinov2b.yaml"
    settings = [f"data.latents={source}", f"vision.targets={source}"]
    if not launch.cpu_multiplies(torch.bfloat16):  # its bf16 would take many minutes
        settings.append("training.precision=fp32")
    out = run("train", recipe, "--dry-run", *settings)
    assert "137,845,008" in out
    assert "dinov2-vit-b 16x16x768 at 224 px" in out
    flops = float(next(x for x in out.splitlines() if "FLOPs per image" in x).split()[-3])
    # The published multiply-adds: 23.0 G and the projector's 2.1 G, forward and twice backward.
    expected = 6 * (23.0 + 2.1)
    if source == "online":
        # The encoder's 23.2 G; the VAE's encoder has no published figure, counted apart it is
        # 272.7 GFLOP.
        expected += 2 * 23.2 + 272.7
    assert flops == pytest.approx(expected, rel=0.01)
