"""Real DALI, real shards: batches are the prepared images, in order, exactly once, and safe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrepa.config import DataConfig
from fastrepa.data.images import load_square
from fastrepa.data.index import load_index
from fastrepa.data.pipeline import Batch, DataPipeline
from fastrepa.data.reader import SampleOrder
from fastrepa.data.shards import ShardSet
from fastrepa.data.spawn import WORKER_DIED
from fastrepa.errors import ConfigError, DataError
from tests.engine.data.trees import flip_byte

MakeSet = Callable[..., ShardSet]
CPU = torch.device("cpu")


def open_pipeline(shards: ShardSet, **options: Any) -> DataPipeline:
    """A pipeline on the CPU; `workers`, `window`, `decode` and `prefetch` go to the config."""
    names = ("workers", "window", "decode", "prefetch")
    data = {"workers": 0, "window": 2, **{n: options.pop(n) for n in names if n in options}}
    config = DataConfig(path=str(shards.path), resolution=shards.resolution, **data)
    settings: dict[str, Any] = {"global_batch": 6, "micro_batch": 6, "device": CPU, **options}
    return DataPipeline(shards, config, **settings)


def take(shards: ShardSet, batches: int, **options: Any) -> list[Batch]:
    with open_pipeline(shards, **options) as pipeline:
        return [next(pipeline) for _ in range(batches)]


def exhaust(pipeline: DataPipeline) -> None:
    """More than an epoch."""
    for _ in range(100):
        next(pipeline)


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([b.image_u8 for b in batches]), torch.cat([b.label for b in batches])


def same(left: list[Batch], right: list[Batch]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(joined(left), joined(right), strict=True))


def expected(shards: ShardSet, tree: Path, positions: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n,3,R,R] and labels [n], straight from the source files."""
    sources = [json.loads(line) for line in (shards.path / "sources.jsonl").open()]
    order = SampleOrder(shards.shard_sizes, seed=0, window=2)
    images, labels = [], []
    for shard, sample in map(order.locate, positions):
        key = int(load_index(shards.index_paths[shard])[sample]["key"])
        images.append(np.asarray(load_square(tree / sources[key], shards.resolution)))
        labels.append(shards.classes.index(sources[key].split("/")[0]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


@pytest.mark.parametrize(("image_format", "quality"), [("png", 95), ("webp", 100)])
def test_lossless_round_trip_over_epochs(
    make_set: MakeSet, tree: Path, image_format: str, quality: int
) -> None:
    shards = make_set(image_format=image_format, quality=quality)
    images, labels = joined(take(shards, 15))  # 90 samples: 2.6 epochs
    assert images.dtype == torch.uint8
    assert images.shape == (90, 3, 16, 16)
    assert labels.dtype == torch.int64
    true_images, true_labels = expected(shards, tree, range(90))
    assert torch.equal(images, true_images)
    assert torch.equal(labels, true_labels)


def test_jpeg_round_trip(make_set: MakeSet, tree: Path) -> None:
    # Noise is JPEG's worst case; at quality 100 only rounding is left.
    images, labels = joined(take(make_set(image_format="jpeg", quality=100), 5))
    true_images, true_labels = expected(make_set(name="png"), tree, range(30))
    assert torch.equal(labels, true_labels)
    assert (images.float() - true_images.float()).abs().mean() < 1.0


def test_batches_are_contiguous_and_never_overwritten(make_set: MakeSet) -> None:
    with open_pipeline(make_set(), prefetch=1) as pipeline:
        kept = [next(pipeline) for _ in range(3)]
        copies = [(batch.image_u8.clone(), batch.label.clone()) for batch in kept]
        later = [next(pipeline) for _ in range(12)]
    assert all(batch.image_u8.is_contiguous() for batch in kept)
    for batch, (image, label) in zip(kept, copies, strict=True):
        assert torch.equal(batch.image_u8, image)  # after the pipeline is closed, too
        assert torch.equal(batch.label, label)
    assert len({batch.image_u8.data_ptr() for batch in kept + later}) == 15


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(make_set: MakeSet, workers: int) -> None:
    shards = make_set()
    assert same(take(shards, 14), take(shards, 14, workers=workers))


def test_resumed_is_uninterrupted(make_set: MakeSet) -> None:
    shards = make_set()
    options: dict[str, Any] = {"global_batch": 10, "micro_batch": 5}  # two passes per step
    whole = take(shards, 16, **options)
    for step in (1, 4):
        assert same(whole[2 * step :], take(shards, 16 - 2 * step, start_step=step, **options))


def test_ranks_share_the_steps_of_one_process(make_set: MakeSet) -> None:
    shards = make_set()
    whole, labels = joined(take(shards, 5, global_batch=12, micro_batch=12))
    options: dict[str, Any] = {"global_batch": 12, "micro_batch": 3, "world": 2}
    ranks = [take(shards, 10, rank=rank, **options) for rank in range(2)]
    steps = [[b for rank in ranks for b in rank[2 * s : 2 * s + 2]] for s in range(5)]
    together = joined([batch for step in steps for batch in step])
    assert torch.equal(together[0], whole)
    assert torch.equal(together[1], labels)


def test_seed_changes_the_order(make_set: MakeSet) -> None:
    shards = make_set()
    assert not same(take(shards, 2), take(shards, 2, seed=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_flipped_byte_is_one_line_naming_shard_and_sample(make_set: MakeSet, workers: int) -> None:
    shards = make_set()
    record = load_index(shards.index_paths[3])[2]
    flip_byte(shards.shard_paths[3], int(record["image_offset"]) + 30)
    opened = ShardSet.open(shards.path, verify="sizes")
    with open_pipeline(opened, workers=workers) as pipeline:
        processes = children_of(os.getpid(), "spawn_main")
        assert len(processes) == workers
        with pytest.raises(DataError) as caught:
            exhaust(pipeline)
        assert_gone(processes, seconds=0)  # although `caught` keeps DALI's pipeline alive
        key = record["key"].decode()
        where = f"{shards.shard_paths[3]}: sample {key}"
        assert str(caught.value) == f"{where}: damaged (its CRC-32 is not the index's)"
        with pytest.raises(DataError, match="closed"):
            next(pipeline)


def test_undecodable_image_is_a_data_error(make_set: MakeSet) -> None:
    """Bytes that index and manifest vouch for, but that are no image (another program's set)."""
    shards = make_set()
    index = load_index(shards.index_paths[0])
    index["image_size"] = 20
    raw = shards.shard_paths[0].read_bytes()
    for record in index:
        start = int(record["image_offset"])
        record["image_crc32"] = zlib.crc32(raw[start : start + 20])
    np.save(shards.index_paths[0], index)
    with (
        open_pipeline(shards) as pipeline,
        pytest.raises(DataError, match="DALI could not make a batch") as caught,
    ):
        exhaust(pipeline)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_a_data_error(make_set: MakeSet) -> None:
    shards, larger = make_set(), make_set(name="larger", resolution=24)
    for kind in ("shard_paths", "index_paths"):
        for here, there in zip(getattr(shards, kind), getattr(larger, kind), strict=True):
            here.write_bytes(there.read_bytes())
    with open_pipeline(shards) as pipeline, pytest.raises(DataError, match=r"\(24, 24\).*16 px"):
        next(pipeline)


def test_impossible_combinations(make_set: MakeSet) -> None:
    shards = make_set()
    with pytest.raises(ConfigError, match=r"data\.decode: 'mixed' decodes on a GPU.*on cpu"):
        open_pipeline(shards, decode="mixed")
    with pytest.raises(ConfigError, match="global_batch: 10 is no multiple of 2 ranks"):
        open_pipeline(shards, global_batch=10, micro_batch=4, world=2)


def test_close_ends_the_workers(make_set: MakeSet) -> None:
    with open_pipeline(make_set(), workers=2) as pipeline:
        next(pipeline)
        workers = children_of(os.getpid(), "spawn_main")
        assert len(workers) == 2
    assert not any(alive(pid) for pid in workers)
    pipeline.close()  # twice is once


# --- how worker processes start and end (spawn.py) ---------------------------------------------

# Without `if __name__ == "__main__"`: spawned workers must not run this file again.
PROGRAM = """
import signal, sys, time, torch
print("program starts", flush=True)
from fastrepa.config import DataConfig
from fastrepa.data.pipeline import DataPipeline
from fastrepa.data.shards import ShardSet

shards = ShardSet.open(sys.argv[1])
config = DataConfig(path=sys.argv[1], resolution=16, workers=2)
pipeline = DataPipeline(shards, config, global_batch=4, micro_batch=4, device=torch.device("cpu"))
pipeline._watch._grace = 2.0
interrupts = []
signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(100))
next(pipeline)
print("ready", flush=True)
while not interrupts:
    time.sleep(0.05)
    next(pipeline)
for _ in range(20):
    next(pipeline)  # the workers still serve: a trainer finishes its step, and saves
print("interrupted", flush=True)
"""


def children_of(pid: int, command: str) -> list[int]:
    """Living children of a process whose command line holds a word."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode()
            if command in words and alive(int(child)):
                found.append(int(child))
    return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_gone(processes: list[int], seconds: float = 10) -> None:
    """All of them end within some seconds."""
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in processes)


@pytest.fixture
def program(make_set: MakeSet, tmp_path: Path) -> Any:
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(make_set().path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(2)]
    assert lines == ["program starts", "ready"], process.communicate()
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_ctrl_c_reaches_the_program_alone(program: subprocess.Popen[str]) -> None:
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to the whole group
    out, errors = program.communicate(timeout=30)
    assert program.returncode == 0
    assert out == "interrupted\n"
    assert errors == ""


def test_workers_are_light_and_do_not_outlive_a_killed_program(
    program: subprocess.Popen[str],
) -> None:
    workers = children_of(program.pid, "spawn_main")
    assert len(workers) == 2
    for pid in workers:
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "libdali" in mapped
        assert "libtorch" not in mapped
    program.kill()
    assert_gone(workers)


@pytest.mark.parametrize("stuck", [False, True])
def test_killed_worker_is_an_error_not_a_hang(program: subprocess.Popen[str], stuck: bool) -> None:
    workers = children_of(program.pid, "spawn_main")
    if stuck:  # as inside DALI, for want of the lock that the dead worker holds
        program.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
    os.kill(workers[0], signal.SIGKILL)
    _, errors = program.communicate(timeout=30)
    assert program.returncode == 1
    assert f"rror: {WORKER_DIED}\n" in errors  # by itself, or as the DataError of this program
    assert_gone(workers)


@pytest.mark.gpu
def test_decoding_on_the_gpu_is_decoding_on_the_cpu(make_set: MakeSet) -> None:
    device = torch.device("cuda")
    for image_format in ("png", "jpeg", "webp"):
        shards = make_set(name=image_format, image_format=image_format, quality=95)
        for workers in (0, 2):
            host, labels = joined(take(shards, 8))
            mixed = joined(take(shards, 8, device=device, workers=workers))
            uploaded = joined(take(shards, 8, device=device, decode="cpu", workers=workers))
            assert mixed[0].is_cuda
            assert mixed[1].is_cuda
            assert torch.equal(mixed[1].cpu(), labels)
            assert torch.equal(uploaded[0].cpu(), host)
            difference = (mixed[0].cpu().int() - host.int()).abs()
            assert difference.max() <= (2 if image_format == "jpeg" else 0)
