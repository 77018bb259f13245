"""Real threads, real DALI: batches are what is stored, in order, exactly once, and safe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrepa.config import DataConfig
from fastrepa.data.datasets import DataSet, open_data
from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import ShardSet
from fastrepa.data.pipeline import Batch, DataPipeline
from fastrepa.data.reader import SampleOrder
from fastrepa.errors import ConfigError, DataError
from tests.sets import written
from tests.sets.trees import flip_byte

MakeSet = Callable[..., ShardSet]
CPU = torch.device("cpu")
CONFIG = ("readers", "read_ahead", "window", "decode", "prefetch", "flip", "remainder")
EVERYTHING: dict[str, Any] = {"moments": True, "features": ("one", "two")}


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """34 images of noise in shards of 8: make_set(image_format="jpeg", latents=2, ...)."""
    return lambda name="set", **options: written.write_set(tmp_path / name, **options)


@pytest.fixture
def full_set(make_set: MakeSet) -> ShardSet:
    """A set with latents and the features of two encoders, mirrored ones too."""
    return make_set(latents=2, encoders={"one": 2, "two": 2})


def open_pipeline(data: DataSet, **options: Any) -> DataPipeline:
    """A pipeline on the CPU; what belongs into the configuration goes there."""
    chosen = {"readers": 3, "window": 2, **{n: options.pop(n) for n in CONFIG if n in options}}
    config = DataConfig(path=str(data.path), resolution=data.resolution, **chosen)
    settings: dict[str, Any] = {"global_batch": 6, "micro_batch": 6, "device": CPU, **options}
    return DataPipeline(data, config, **settings)


def take(data: DataSet, batches: int, **options: Any) -> list[Batch]:
    with open_pipeline(data, **options) as pipeline:
        return [next(pipeline) for _ in range(batches)]


def exhaust(pipeline: DataPipeline) -> None:
    """More than an epoch."""
    for _ in range(100):
        next(pipeline)


def tensors(batch: Batch) -> list[torch.Tensor]:
    """Everything a batch holds."""
    stored = [t for f in batch.features for t in (f.scale, f.tokens)]
    return [t for t in (batch.image_u8, batch.moments, batch.label, *stored) if t is not None]


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*map(tensors, batches), strict=True)]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(joined(left), joined(right), strict=True))


def stack(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(parts))


def numbers(data: DataSet, positions: range, **options: Any) -> list[int]:
    """The samples at some positions of the order, by their numbers."""
    order = SampleOrder(data.shard_sizes, seed=0, window=2, **options)
    starts = np.cumsum([0, *data.shard_sizes])
    return [int(starts[shard]) + sample for shard, sample in map(order.locate, positions)]


@pytest.mark.parametrize(("image_format", "quality"), [("png", 95), ("webp", 100)])
def test_lossless_round_trip_over_epochs(
    make_set: MakeSet, image_format: str, quality: int
) -> None:
    shards = make_set(image_format=image_format, quality=quality)
    images, labels = joined(take(shards, 15))  # 90 samples: 2.6 epochs
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    expected = numbers(shards, range(90))
    assert torch.equal(images, stack([written.image(n) for n in expected]).permute(0, 3, 1, 2))
    assert labels.tolist() == [written.label(n) for n in expected]


def test_jpeg_round_trip(make_set: MakeSet) -> None:
    # Noise is JPEG's worst case; at quality 100 only rounding is left.
    shards = make_set(image_format="jpeg", quality=100)
    images, _ = joined(take(shards, 5))
    exact = stack([written.image(n) for n in numbers(shards, range(30))]).permute(0, 3, 1, 2)
    assert (images.float() - exact.float()).abs().mean() < 1.0


def test_columns_are_those_of_the_image_beside_them(full_set: ShardSet) -> None:
    batches = take(full_set, 12, **EVERYTHING)
    image, moments, label, scale, tokens, scale_2, tokens_2 = joined(batches)
    expected = numbers(full_set, range(72))
    assert torch.equal(image, stack([written.image(n) for n in expected]).permute(0, 3, 1, 2))
    assert label.tolist() == [written.label(n) for n in expected]
    assert moments.dtype == torch.float16
    assert torch.equal(moments, stack([written.moments(n, 0) for n in expected]))
    for s, t in ((scale, tokens), (scale_2, tokens_2)):
        assert (s.dtype, t.dtype) == (torch.float16, torch.int8)
        assert torch.equal(s, stack([written.scale(n, 0) for n in expected]))
        assert torch.equal(t, stack([written.tokens(n, 0) for n in expected]))


def test_without_images_no_image_is_read_and_dali_is_not_built(
    full_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in full_set.shard_paths:
        path.unlink()
    monkeypatch.setattr("nvidia.dali.pipeline.Pipeline", None)
    batch = take(full_set, 1, image=False, **EVERYTHING)[0]
    assert batch.image_u8 is None
    first = numbers(full_set, range(6))
    assert batch.label.tolist() == [written.label(n) for n in first]
    assert torch.equal(batch.features[1].tokens, stack([written.tokens(n, 0) for n in first]))


def test_flips_reach_image_and_columns_alike(full_set: ShardSet) -> None:
    image, moments, _, scale, tokens, *_ = joined(take(full_set, 12, flip=True, **EVERYTHING))
    views = []
    for i, n in enumerate(numbers(full_set, range(72))):
        straight = torch.from_numpy(written.image(n)).permute(2, 0, 1)
        view = int(torch.equal(image[i], straight.flip(-1)))
        assert view or torch.equal(image[i], straight)
        assert torch.equal(moments[i], torch.from_numpy(written.moments(n, view)))
        assert torch.equal(scale[i], torch.from_numpy(written.scale(n, view)))
        assert torch.equal(tokens[i], torch.from_numpy(written.tokens(n, view)))
        views.append(view)
    assert 20 < sum(views) < 52
    # A sample is mirrored in one epoch and not in another: the draw is the step's.
    assert views[:34] != views[34:68]


def test_flips_depend_on_seed_step_and_sample_alone(full_set: ShardSet) -> None:
    options: dict[str, Any] = {"global_batch": 12, "flip": True, "moments": True}
    whole = joined(take(full_set, 6, micro_batch=12, **options))
    ranks = [take(full_set, 12, micro_batch=3, world=2, rank=r, **options) for r in range(2)]
    steps = [[b for rank in ranks for b in rank[2 * s : 2 * s + 2]] for s in range(6)]
    shared = joined([batch for step in steps for batch in step])
    late = joined(take(full_set, 2, micro_batch=12, start_step=4, **options))
    without_images = joined(take(full_set, 6, micro_batch=12, image=False, **options))
    for a, b, c in zip(whole, shared, late, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[48:], c)
    assert torch.equal(whole[1], without_images[0])
    other = joined(take(full_set, 6, micro_batch=12, image=False, seed=1, **options))[0]
    assert not torch.equal(without_images[0], other)


def test_flip_of_images_alone_needs_no_columns(make_set: MakeSet) -> None:
    shards = make_set()
    straight, mirrored = (joined(take(shards, 4, flip=flip))[0] for flip in (False, True))
    flipped = [torch.equal(a.flip(-1), b) for a, b in zip(straight, mirrored, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(straight, mirrored, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 0 < sum(flipped) < 24


def test_flip_needs_both_views_of_what_is_read(make_set: MakeSet) -> None:
    shards = make_set(latents=1, encoders={"one": 2})
    with pytest.raises(ConfigError, match=r"data\.flip: the moments of .*prepare --flip"):
        open_pipeline(shards, flip=True, moments=True)
    take(shards, 1, flip=True, features=("one",))


def test_columns_that_are_not_there(make_set: MakeSet) -> None:
    shards = make_set(encoders={"one": 1})
    with pytest.raises(ConfigError, match=r"data\.latents: .* holds no latents"):
        open_pipeline(shards, moments=True)
    with pytest.raises(ConfigError, match=r"no features of two \(it holds one\)"):
        open_pipeline(shards, features=("two",))


@pytest.mark.parametrize("image", [True, False])
def test_batches_are_dense_and_never_overwritten(full_set: ShardSet, image: bool) -> None:
    with open_pipeline(full_set, prefetch=1, image=image, **EVERYTHING) as pipeline:
        kept = [next(pipeline) for _ in range(3)]
        copies = [[t.clone() for t in tensors(batch)] for batch in kept]
        later = [next(pipeline) for _ in range(12)]
    for batch, copy in zip(kept, copies, strict=True):
        for a, b in zip(tensors(batch), copy, strict=True):
            layout = torch.channels_last if a.ndim == 4 and a.shape[1] == 3 else None
            assert a.is_contiguous(memory_format=layout or torch.contiguous_format)
            assert torch.equal(a, b)  # after the pipeline is closed, too
    assert all(len({t.data_ptr() for t in group}) == 15
               for group in zip(*map(tensors, kept + later), strict=True))  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"readers": 1, "read_ahead": 1, "prefetch": 1},
        {"readers": 11, "read_ahead": 7, "prefetch": 3},
        {"readers": 2, "read_ahead": 1, "prefetch": 4},
    ],
)
def test_threads_and_depths_change_nothing(full_set: ShardSet, settings: dict[str, int]) -> None:
    assert same(take(full_set, 14, **EVERYTHING), take(full_set, 14, **EVERYTHING, **settings))


def test_resumed_is_uninterrupted(full_set: ShardSet) -> None:
    options: dict[str, Any] = {"global_batch": 10, "micro_batch": 5, **EVERYTHING}
    whole = take(full_set, 16, **options)  # two passes per step
    for step in (1, 4):
        assert same(whole[2 * step :], take(full_set, 16 - 2 * step, start_step=step, **options))


def test_ranks_share_the_steps_of_one_process(full_set: ShardSet) -> None:
    whole = joined(take(full_set, 5, global_batch=12, micro_batch=12, **EVERYTHING))
    options: dict[str, Any] = {"global_batch": 12, "micro_batch": 3, "world": 2, **EVERYTHING}
    ranks = [take(full_set, 10, rank=rank, **options) for rank in range(2)]
    steps = [[b for rank in ranks for b in rank[2 * s : 2 * s + 2]] for s in range(5)]
    together = joined([batch for step in steps for batch in step])
    assert all(torch.equal(a, b) for a, b in zip(together, whole, strict=True))


def test_dropped_remainders(make_set: MakeSet) -> None:
    shards = make_set()
    labels = joined(take(shards, 10, remainder="drop"))[1]  # epochs of 30 of 34 samples
    expected = numbers(shards, range(60), multiple_of=6)
    assert labels.tolist() == [written.label(n) for n in expected]
    assert len(set(expected[:30])) == len(set(expected[30:])) == 30
    with pytest.raises(ConfigError, match=r"data\.remainder: 'drop' leaves nothing of 34"):
        open_pipeline(shards, remainder="drop", global_batch=36, micro_batch=36)


def test_another_order(make_set: MakeSet) -> None:
    class Backwards:
        num_samples = 8

        def locate(self, position: int) -> tuple[int, int]:
            return 1, 7 - position % 8

    labels = joined(take(make_set(), 4, order=Backwards()))[1]
    assert labels.tolist() == [written.label(15 - i % 8) for i in range(24)]


def test_seed_changes_the_order(make_set: MakeSet) -> None:
    shards = make_set()
    assert not same(take(shards, 2), take(shards, 2, seed=1))


@pytest.mark.parametrize("what", ["image", "row"])
def test_damage_is_one_line_naming_file_and_sample(full_set: ShardSet, what: str) -> None:
    """The batches before it come whole; then the error; then it is closed, no thread left."""
    record = load_index(full_set.index_paths[3])[2]
    if what == "image":
        path = full_set.shard_paths[3]
        flip_byte(path, int(record["image_offset"]) + 30)
        expected = f"{path}: sample 00000026: damaged (its CRC-32 is not the index's)"
    else:
        path = full_set.path / "shard-00003.features.two.npy"
        rows = np.load(path, mmap_mode="r")
        flip_byte(path, rows.offset + 4 * rows.dtype.itemsize + 9)  # type: ignore[attr-defined]
        expected = f"{path}: sample 00000026 (row 2): damaged (its CRC-32 is wrong)"
    opened = ShardSet.open(full_set.path, verify="sizes")
    place = numbers(opened, range(34)).index(26)
    assert place >= 12
    # DALI starts with as many batches as it prefetches; from then on the count is exact.
    with open_pipeline(opened, **EVERYTHING) as pipeline:
        for _ in range(place // 6):
            next(pipeline)
            time.sleep(0.05)  # what is read ahead has failed already
        with pytest.raises(DataError) as caught:
            next(pipeline)
        assert str(caught.value) == expected
        assert not readers()
        with pytest.raises(DataError, match="closed"):
            next(pipeline)


def test_undecodable_image_is_named(make_set: MakeSet) -> None:
    """Bytes that index and manifest vouch for, but that are no image (another program's set)."""
    shards = make_set()
    index = load_index(shards.index_paths[0])
    record = index[3:4]
    record["image_size"] = 20
    start = int(record["image_offset"][0])
    record["image_crc32"] = zlib.crc32(shards.shard_paths[0].read_bytes()[start : start + 20])
    np.save(shards.index_paths[0], index)
    named = r"shard-00000\.tar: sample 00000003: cannot be decoded \("
    with open_pipeline(shards) as pipeline, pytest.raises(DataError, match=named) as caught:
        exhaust(pipeline)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_named(make_set: MakeSet) -> None:
    shards, larger = make_set(), make_set(name="larger", resolution=24)
    for kind in ("shard_paths", "index_paths"):
        getattr(shards, kind)[2].write_bytes(getattr(larger, kind)[2].read_bytes())
    named = r"shard-00002\.tar: sample 000000\d\d: an image of 24x24 pixels in a set of 16 px"
    with open_pipeline(shards) as pipeline, pytest.raises(DataError, match=named):
        exhaust(pipeline)


def test_impossible_combinations(make_set: MakeSet) -> None:
    shards = make_set()
    with pytest.raises(ConfigError, match=r"data\.decode: 'mixed' decodes on a GPU.*on cpu"):
        open_pipeline(shards, decode="mixed")
    with pytest.raises(ConfigError, match="global_batch: 10 is no multiple of 2 ranks"):
        open_pipeline(shards, global_batch=10, micro_batch=4, world=2)
    assert not readers()


# --- threads and processes ----------------------------------------------------------------------


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fastrepa-reader")]


@pytest.mark.parametrize("image", [True, False])
def test_no_thread_outlives_close(full_set: ShardSet, image: bool) -> None:
    def tasks() -> int:
        return len(os.listdir("/proc/self/task"))

    take(full_set, 1)  # what libraries start once, and keep
    time.sleep(0.2)  # a joined thread is the kernel's for a moment more
    before, files = tasks(), len(os.listdir("/proc/self/fd"))
    with open_pipeline(full_set, image=image, **EVERYTHING) as pipeline:
        batch = next(pipeline)
        assert len(readers()) == 3
        assert tasks() >= before + 3
    deadline = time.monotonic() + 5
    while tasks() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tasks() <= before
    assert len(os.listdir("/proc/self/fd")) <= files
    pipeline.close()  # twice is once
    assert batch.label.min() >= 0


def test_close_does_not_wait_for_all_that_was_asked_for(
    full_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reads under way end, the rest is not begun: on a slow file system."""
    from fastrepa.data.format.store import ShardStore

    fill = ShardStore.fill

    def slowly(*arguments: Any) -> None:
        time.sleep(0.1)
        fill(*arguments)

    monkeypatch.setattr(ShardStore, "fill", slowly)
    pipeline = open_pipeline(full_set, read_ahead=16, micro_batch=60, global_batch=60)
    pipeline._start_reads()
    began = time.monotonic()
    pipeline.close()
    assert time.monotonic() - began < 1.0  # the 20 reads of a task would take 2 s, all 32 s


def test_a_forked_process_says_so_and_leaves_its_parent_alone(full_set: ShardSet) -> None:
    with open_pipeline(full_set, **EVERYTHING) as pipeline:
        first = next(pipeline)
        child = os.fork()
        if not child:
            try:
                next(pipeline)
            except DataError as error:
                os._exit(3 if "forked" in str(error) else 4)
            finally:
                os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        rest = [first, *(next(pipeline) for _ in range(5))]
    assert same(rest, take(full_set, 6, **EVERYTHING))


PROGRAM = """
import sys, torch
from fastrepa.config import DataConfig
from fastrepa.data.datasets import open_data
from fastrepa.data.pipeline import DataPipeline

data = open_data(sys.argv[1])
config = DataConfig(path=sys.argv[1], resolution=16)
options = {"global_batch": 4, "micro_batch": 4, "device": torch.device("cpu")}
with DataPipeline(data, config, **options) as batches:
    next(batches)
    try:
        print("ready", flush=True)
        for batch in batches:
            pass
    except KeyboardInterrupt:
        print("interrupted", flush=True)
left_open = DataPipeline(data, config, **options)
next(left_open)
"""


def test_ctrl_c_ends_it_at_once_and_a_forgotten_one_does_not_hang(
    make_set: MakeSet, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(make_set().path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (0, "interrupted\n", "")


# --- the reference's layout, and the GPU -----------------------------------------------------


def test_reference_layout_gives_what_shards_give(make_set: MakeSet, tmp_path: Path) -> None:
    """Same images, latents and labels, whatever the order of the listing."""
    reference = open_data(written.write_reference(tmp_path / "reference"))
    assert reference.shard_sizes == [10, 10, 10, 4]
    image, moments, label = joined(take(reference, 12, moments=True))
    expected = numbers(reference, range(72))
    assert moments.dtype == torch.float32
    assert torch.equal(image, stack([written.image(n) for n in expected]).permute(0, 3, 1, 2))
    assert torch.equal(moments, stack([written.moments(n, 0) for n in expected]).float())
    assert label.tolist() == [written.label(n) for n in expected]
    with pytest.raises(ConfigError, match=r"data\.flip: the moments"):
        open_pipeline(reference, flip=True, moments=True)
    take(reference, 1, flip=True)


@pytest.mark.gpu
def test_decoding_on_the_gpu_is_decoding_on_the_cpu(make_set: MakeSet) -> None:
    device = torch.device("cuda")
    for image_format in ("png", "jpeg", "webp"):
        shards = make_set(name=image_format, image_format=image_format, latents=2)
        options = {"flip": True, "moments": True}
        host = joined(take(shards, 8, **options))
        mixed = joined(take(shards, 8, device=device, **options))
        uploaded = joined(take(shards, 8, device=device, decode="cpu", **options))
        assert all(tensor.is_cuda for tensor in (*mixed, *uploaded))
        for a, b, c in zip(host, mixed, uploaded, strict=True):
            assert torch.equal(c.cpu(), a)
            difference = (b.cpu().float() - a.float()).abs().max()
            assert difference <= (2 if image_format == "jpeg" and a.dtype == torch.uint8 else 0)
