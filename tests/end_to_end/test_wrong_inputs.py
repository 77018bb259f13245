"""Every mistake a person can make ends in one line that names it, and a non-zero exit."""

import resource
import shutil
import subprocess

import pytest
import yaml
from PIL import Image

from tests.runs import ROOT, SMALL, command, environment, tensors, train

pytestmark = pytest.mark.slow

SHARDS = ROOT / "configs/quickstart/emoji/train"


def fails(args, *, ranks=1, cold=False, preexec_fn=None, with_output=False):
    """The one-line error by which a command must fail, and on request what it said before."""
    done = subprocess.run(
        command(*args, ranks=ranks, cold=cold or preexec_fn is not None), env=environment(),
        capture_output=True, text=True, timeout=200, preexec_fn=preexec_fn,
    )  # fmt: skip
    assert done.returncode != 0, done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("fastrepa: error")]
    assert len(errors) == ranks, done.stderr
    if ranks == 1:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == errors[0]
        assert "Traceback" not in done.stdout + done.stderr
    return (errors[0], done.stdout) if with_output else errors[0]


def training(run, *overrides):
    return ["train", ROOT / "configs/quickstart.yaml", f"run={run}", *SMALL, *overrides]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stepz=5", "training.stepz: unknown key (did you mean 'steps'?)"),
        ("training.steps=soon", "training.steps: 'soon' is not allowed"),
        (
            "vision.encoders.0.name=tf_eficientnet_lite0",
            "did you mean 'tf_efficientnet_lite0'",
        ),
        ("data.decode=mixed", "data.decode: 'mixed' decodes on a GPU"),
        (
            "attention.backend=sdpa-cudnn",
            "attention.backend: 'sdpa-cudnn' cannot run here: needs a GPU",
        ),
        ("data.path=nowhere", "nowhere"),
        ("data.resolution=128", "128"),
        ("model.num_classes=7", "holds 8 classes, model.num_classes is 7; model.num_classes=auto"),
        ("model.patch=5", "model.patch: 5 does not divide the latent side 32"),
    ],
)
def test_train_with_a_wrong_value(tmp_path, override, words):
    assert words in fails(training(tmp_path / "run", "training.steps=2", override))


def test_no_such_configuration(tmp_path):
    error = fails(["train", tmp_path / "quik.yaml"], cold=True)
    assert "quik.yaml: no such configuration file" in error


def test_batch_that_the_ranks_do_not_divide(tmp_path):
    args = training(tmp_path / "run", "training.global_batch=7")
    # Cold: forks end so fast that torchrun ends the other rank before it has said its line.
    assert "training.global_batch: 7 is not divisible by 2 ranks" in fails(args, ranks=2, cold=True)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_shard_is_named_before_training(tmp_path, damage):
    shards = tmp_path / "shards"
    shutil.copytree(SHARDS, shards)
    victim = shards / "shard-00001.tar"
    data = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    else:
        data[len(data) // 2] ^= 1
        victim.write_bytes(data[:-1024] if damage == "truncated" else data)
    error = fails(training(tmp_path / "run", f"data.path={shards}"))
    assert "shard-00001.tar" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_checkpoint_of_another_architecture_and_a_damaged_one(tmp_path):
    run = tmp_path / "run"
    train(run, "training.steps=2", "training.checkpoint_every=1")
    before = tensors(run, 2)
    saved = (run / "config.yaml").read_bytes()
    error = fails(training(run, "training.steps=3", "model.depth=4"))
    assert "step_0000002: blocks.3." in error
    assert "another architecture" in error
    assert (run / "config.yaml").read_bytes() == saved
    assert tensors(run, 2).keys() == before.keys()

    newest = run / "checkpoints" / "step_0000002" / "ema.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    again = train(run, "training.steps=3")
    assert "step_0000002 is damaged (ema.safetensors differs" in again.stdout
    assert "from step 1" in again.stdout
    for step in (1, 3):
        (run / "checkpoints" / f"step_{step:07d}" / "weights.safetensors").write_bytes(b"")
    shutil.rmtree(run / "checkpoints" / "step_0000002")
    assert "no undamaged checkpoint" in fails(training(run, "training.steps=4"))


def test_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    error = fails(training(tmp_path / "file" / "run"))
    assert f"{tmp_path}/file/run: the run folder is not writable" in error


def test_full_disk_keeps_the_checkpoint_before(tmp_path):
    run = tmp_path / "run"
    train(run, "training.steps=2")
    before = tensors(run, 2)

    def no_large_files():  # what a full disk does to a checkpoint, whatever user runs the test
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    # A save on the way is a warning and training goes on; the last one is an error, on every rank.
    args = training(run, "training.steps=5", "training.schedule.name=constant")
    error, said = fails(args, ranks=2, preexec_fn=no_large_files, with_output=True)
    assert "step_0000004: cannot be written" in said
    assert "step_0000002 still counts" in said
    assert "step_0000005: cannot be written" in error
    assert "earlier ones are intact" in error
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_0000002"]
    assert tensors(run, 2).keys() == before.keys()
    train(run, "training.steps=4")


@pytest.mark.parametrize("what", ["empty class folder", "unreadable image", "no classes", "out"])
def test_prepare_with_a_wrong_source(tmp_path, what):
    source, out = tmp_path / "source", tmp_path / "out"
    for name in ("cat", "dog"):
        (source / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(source / name / "a.png")
    words = "dog"
    if what == "empty class folder":
        (source / "dog" / "a.png").unlink()
    elif what == "unreadable image":
        (source / "dog" / "b.png").write_bytes(b"not an image")
        words = "b.png"
    elif what == "no classes":
        shutil.rmtree(source / "cat")
        shutil.rmtree(source / "dog")
        words = "source"
    else:
        out.mkdir()
        (out / "mine.txt").write_text("keep")
        words = "out"
    assert words in fails(["prepare", source, out, "--resolution", 32])
    assert sorted(p.name for p in out.glob("*")) == (["mine.txt"] if what == "out" else [])
    if what == "unreadable image":
        done = subprocess.run(
            command("prepare", source, out, "--resolution", 32, "--skip-bad"),
            env=environment(), capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "b.png" in done.stdout
        assert "2 images of 2 classes" in done.stdout


def test_sample_and_a_folder_that_is_no_run(tmp_path):
    assert "not a run folder" in fails(["sample", tmp_path, "--num", 1])
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "no checkpoint yet" in fails(["sample", tmp_path, "--num", 1])


def test_a_mistyped_command():
    trian = command("trian", cold=True)
    done = subprocess.run(trian, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert "No such command 'trian'" in done.stderr
