"""Small real runs for tests: emoji shards, EfficientNet-Lite0 with its weights, DALI, DeepSpeed."""

import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from fastrepa.runtime.world import outside_the_world
from tests import warm

ROOT = Path(__file__).parents[1]
SMALL = [
    "data.path=" + str(ROOT / "configs/quickstart/emoji/train"),
    "model.width=48", "model.depth=3", "model.heads=3", "alignment.projector_width=40",
    "training.global_batch=8", "training.precision=fp32", "training.log_every=1",
    "training.sample_every=0", "training.schedule.warmup=2", "training.tensorboard=false",
    "sample.num=4", "sample.sampler=ode", "sample.steps=2", "training.checkpoint_every=2",
    "training.clip=0.5", "training.optimizer.lr=1e-3", "training.keep_checkpoints=0",
]  # fmt: skip


def environment():
    # One thread a process: two processes then do not fight over two cores.
    env = outside_the_world() | {"OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    return env


def program(module, *words, ranks=1, cold=False):
    """A command line that runs a module, under torchrun where in several processes: forks of what
    has imported everything (tests/warm.py), or, cold, Python's own starts.
    """
    start = [sys.executable] if cold else warm.python()
    command = [*start, "-m", module, *map(str, words)]
    if ranks == 1:
        return command
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, *launcher, "--no-python", *command]


def said_by(module, *words, ranks=2, timeout=900):
    """Return what a program of tests/programs printed; it must succeed."""
    done = subprocess.run(
        program(module, *words, ranks=ranks), env=environment(), capture_output=True, text=True,
        timeout=timeout, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def command(*args, **how):
    return program("fastrepa", *args, **how)


def train_command(run, *overrides, module="fastrepa", **how):
    config = ROOT / "configs/quickstart.yaml"
    return program(module, "train", config, f"run={run}", *SMALL, *overrides, **how)


def train(run, *overrides, check=True, **how):
    done = subprocess.run(
        train_command(run, *overrides, **how),
        env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def metrics(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def tensors(run, step):
    """Every tensor of a checkpoint, as kind/name."""
    folder = Path(run) / "checkpoints" / f"step_{step:07d}"
    return {
        f"{file.stem.split('-')[0]}/{name}": value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
