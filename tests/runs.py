"""Small real runs for tests: emoji shards, EfficientNet-Lite0 with its weights, DALI, DeepSpeed."""

import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from fastrepa.runtime.world import outside_the_world

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


def command(*args, ranks=1):
    python = [sys.executable, "-m"]
    if ranks > 1:
        python += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return [*python, "fastrepa", *map(str, args)]


def train_command(run, *overrides, ranks=1):
    config = ROOT / "configs/quickstart.yaml"
    return command("train", config, f"run={run}", *SMALL, *overrides, ranks=ranks)


def train(run, *overrides, ranks=1, check=True):
    done = subprocess.run(
        train_command(run, *overrides, ranks=ranks),
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
