"""A data set -> batches on the device: threads read, NVIDIA DALI decodes.

Threads read whole batches ahead (store.py) into host memory. Encoded images go on to DALI, which
decodes them on threads of its own (CPU) or on the GPU ("mixed"); rows of columns are where they
belong as soon as they are read. A set of which no image is wanted never meets DALI.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrepa.config import DataConfig
from fastrepa.data.datasets import DataSet
from fastrepa.data.format.shards import FeaturesColumn, MomentsColumn
from fastrepa.data.format.store import SampleStore, Slots
from fastrepa.data.reader import Order, RankBatches, SampleOrder
from fastrepa.errors import ConfigError, DataError
from fastrepa.randomness import KeyedRandom, Stream
from fastrepa.runtime.hardware import usable_cores
from fastrepa.runtime.world import launched_world

# Decoding threads per rank at most; more only fight over memory.
MAX_DECODE_THREADS = 8


@dataclass
class StoredFeatures:
    """An encoder's stored tokens: token t of sample b is scale[b,t] * tokens[b,t].

    Attributes:
        scale: fp16 [B, T].
        tokens: int8 [B, T, Z], row-major over the encoder's own grid.
    """

    scale: Tensor
    tokens: Tensor


@dataclass
class Batch:
    """One forward pass of one rank.

    Attributes:
        image_u8: uint8 [B, 3, R, R], RGB, channels last in memory, as it was decoded (to move
            them would cost a quarter of the decoding); None where no image is wanted.
        moments: [B, 2C, h, w], mean and standard deviation of the latents, fp16 from shards, fp32
            from the reference's layout; None where they are not wanted.
        label: int64 [B].
        features: of each encoder wanted, in the order asked for.
    """

    image_u8: Tensor | None
    moments: Tensor | None
    label: Tensor
    features: tuple[StoredFeatures, ...] = ()


class DataPipeline(Iterator[Batch]):
    """The endless stream of one rank's batches, from `start_step` on.

    Batch k of a rank is forward pass k % A of step start_step + k // A, with
    A = global_batch / (world * micro_batch). The samples of a step, and which of them are mirrored,
    depend on seed and step alone, never on ranks, threads or restarts (reader.py). A batch is never
    overwritten by a later one. On a GPU an image's memory is DALI's, bound to the stream that was
    current at `next`: work on it from another stream must be waited for there before the batch is
    dropped.

    Args:
        data: an opened set (`open_data`).
        config: decode, readers, read_ahead, prefetch, window, flip and remainder are used.
        global_batch: samples per step over all ranks.
        micro_batch: samples per rank per forward pass.
        rank, world: this process among those that train together.
        seed: of the order of the samples, and of the mirroring.
        start_step: step of the first batch.
        device: where the batches are wanted.
        image: whether decoded images are wanted.
        moments: whether stored latents are wanted.
        features: encoders whose stored features are wanted.
        order: another order than `SampleOrder`'s.

    Raises ConfigError for impossible combinations; iterating raises DataError, naming file and
    sample, for bytes that are not the prepared ones, and closes the pipeline. To be used by one
    thread, of the process that made it.
    """

    def __init__(
        self,
        data: DataSet,
        config: DataConfig,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start_step: int = 0,
        device: torch.device,
        image: bool = True,
        moments: bool = False,
        features: Sequence[str] = (),
        order: Order | None = None,
    ) -> None:
        self._batches = RankBatches(global_batch, micro_batch, rank, world, start_step)
        self._columns = _wanted_columns(data, moments, features, config.flip)
        decode = _decode_device(config, device) if image else None
        self._order: Order = order or SampleOrder(
            data.shard_sizes,
            seed=seed,
            window=config.window,
            multiple_of=global_batch if config.remainder == "drop" else 1,
        )
        self._device, self._resolution = device, data.resolution
        self._random = KeyedRandom(seed) if config.flip else None
        # The window being read and the one before it, which a batch may straddle.
        self._store: SampleStore = data.store(
            image=image, moments=moments, features=features, open_shards=2 * config.window
        )
        self._readers, self._read_ahead = config.readers, config.read_ahead
        self._process = os.getpid()
        self._closed, self._stop = False, threading.Event()
        self._next_batch = 0
        self._reading: deque[_Reading] = deque()
        self._decoder = None
        if decode is not None:
            self._decoder = _Decoder(micro_batch, config.prefetch, decode, device, config.flip)
        self._pool = ThreadPoolExecutor(config.readers, thread_name_prefix="fastrepa-reader")

    def __next__(self) -> Batch:
        if self._closed:
            raise DataError("the data pipeline is closed")
        if self._process != os.getpid():
            raise DataError("a data pipeline cannot be used in a process forked from its own")
        try:
            if self._decoder is None:
                return self._on_device(self._read(), None)
            self._feed(self._decoder)
            return self._on_device(*self._decoded(self._decoder))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads and free the buffers; batches already handed out stay valid."""
        if self._closed or self._process != os.getpid():
            return
        self._closed = True
        self._stop.set()  # what is queued ends at once, what is under way after its sample
        self._pool.shutdown(wait=True)
        self._reading.clear()
        self._store.close()
        if self._decoder is not None:
            self._decoder.close()

    def __enter__(self) -> DataPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading ----------------------------------------------------------------------------------

    def _start_reads(self) -> None:
        """Keep `read_ahead` batches being read."""
        while len(self._reading) < self._read_ahead:
            host = self._empty(self._next_batch)
            self._next_batch += 1
            # Several neighbouring samples a task: a future for each would cost more than its read.
            size = len(host.slots.places)
            share = -(-size // self._readers)
            tasks = [
                self._pool.submit(self._fill, host.slots, range(i, min(i + share, size)))
                for i in range(0, size, share)
            ]
            self._reading.append(_Reading(host, tasks))

    def _empty(self, batch: int) -> _Host:
        """A batch's samples, and memory for them."""
        size = self._batches.micro_batch
        places = [self._order.locate(position) for position in self._batches.positions(batch)]
        views = [0] * size
        if self._random is not None:
            step, numbers = self._batches.step_and_numbers(batch)
            samples = torch.arange(numbers.start, numbers.stop)
            draws = self._random.uniform(Stream.FLIP, step, samples)
            views = (draws < 0.5).int().tolist()

        def memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            pinned = self._device.type == "cuda"
            return torch.empty(size, *shape, dtype=dtype, pin_memory=pinned)

        moments, features = None, []
        for column in self._columns:
            if isinstance(column, MomentsColumn):
                shape = (2 * column.channels, column.side, column.side)
                moments = memory(shape, torch.float16 if column.files else torch.float32)
            else:
                tokens = column.grid**2
                scale = memory((tokens,), torch.float16)
                features.append(StoredFeatures(scale, memory((tokens, column.width), torch.int8)))
        batch_ = Batch(None, moments, memory((), torch.int64), tuple(features))
        slots = Slots(
            places=places,
            views=views,
            label=batch_.label.numpy(),
            encoded=None if self._decoder is None else [None] * size,
            moments=None if moments is None else moments.numpy(),
            features=tuple((f.scale.numpy(), f.tokens.numpy()) for f in features),
        )
        return _Host(batch_, slots)

    def _fill(self, slots: Slots, samples: range) -> None:
        for i in samples:
            if self._stop.is_set():
                return
            self._store.fill(slots, i)

    def _read(self) -> _Host:
        """The next batch, read; meanwhile the one after the last is begun."""
        self._start_reads()
        reading = self._reading.popleft()
        self._start_reads()
        for task in reading.tasks:
            task.result()
        return reading.host

    # Decoding ---------------------------------------------------------------------------------

    def _feed(self, decoder: _Decoder) -> None:
        """Hand DALI what it has room for and is read; wait for a batch only if it has none."""
        self._start_reads()
        while decoder.has_room and (decoder.starves or self._reading[0].done):
            if decoder.pending and self._reading[0].failed:
                return  # not before what was read before it
            decoder.feed(self._read())

    def _decoded(self, decoder: _Decoder) -> tuple[_Host, Tensor]:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        problem = None
        try:
            host, images = decoder.take(stream)
        except Exception as error:
            problem = self._undecodable(decoder, error)
        if problem:  # raised out here, it does not keep DALI alive in its context
            raise DataError(problem)
        side = self._resolution
        for (shard, sample), shape in zip(host.slots.places, images.shape(), strict=True):
            if tuple(shape) != (side, side, 3):
                raise DataError(
                    f"{self._store.name(shard, sample)}: an image of {shape[1]}x{shape[0]} pixels "
                    f"in a set of {side} px"
                )
        # DALI's memory itself, no copy: its dynamic executor reuses a buffer only when the tensor
        # that holds it is gone.
        return host, torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)

    def _undecodable(self, decoder: _Decoder, error: Exception) -> str:
        """DALI's message, and the sample at fault, which DALI does not name."""
        from fastrepa.data.images import UnreadableImageError, decode_rgb

        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else repr(error)
        for host in decoder.pending:
            for place, encoded in zip(host.slots.places, host.slots.encoded or (), strict=True):
                try:
                    decode_rgb(encoded.tobytes())
                except UnreadableImageError:
                    return f"{self._store.name(*place)}: cannot be decoded ({why})"
        return f"DALI could not make a batch: {why}"

    def _on_device(self, host: _Host, image: Tensor | None) -> Batch:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, non_blocking=True)

        batch = host.batch
        return Batch(
            image_u8=image,
            moments=None if batch.moments is None else moved(batch.moments),
            label=moved(batch.label),
            features=tuple(StoredFeatures(moved(f.scale), moved(f.tokens)) for f in batch.features),
        )


@dataclass
class _Host:
    """A batch in host memory, and the readers' view of the same memory."""

    batch: Batch
    slots: Slots


@dataclass
class _Reading:
    host: _Host
    tasks: list[Future[None]]

    @property
    def done(self) -> bool:
        return all(task.done() for task in self.tasks)

    @property
    def failed(self) -> bool:
        """Return the error of what is done."""
        return any(task.exception() is not None for task in self.tasks)


class _Decoder:
    """DALI: encoded images in, uint8 [B,R,R,3] on the device out, `prefetch` batches ahead."""

    def __init__(
        self, batch: int, prefetch: int, decode: str, device: torch.device, flip: bool
    ) -> None:
        # A step on noise, or on columns alone, must run where DALI is not installed.
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        self.pending: deque[_Host] = deque()  # fed, and not yet taken
        self._prefetch, self._flip = prefetch, flip
        self._started = False
        on_gpu = device.type == "cuda"
        self._pipe: Pipeline | None = Pipeline(
            batch_size=batch,
            num_threads=_decode_threads(),
            device_id=_gpu_index(device) if on_gpu else None,
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,
        )
        with self._pipe:
            encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
            images = fn.decoders.image(
                encoded,
                device=decode,
                output_type=types.DALIImageType.RGB,
                adjust_orientation=False,  # pixels are stored upright
                jpeg_fancy_upsampling=True,  # "mixed" as "cpu"
            )
            if on_gpu:
                images = images.gpu()
            if flip:
                mirror = fn.external_source(name="mirror", dtype=types.DALIDataType.INT32, ndim=0)
                images = fn.flip(images, horizontal=mirror)
            self._pipe.set_outputs(images)
        self._pipe.build()

    @property
    def has_room(self) -> bool:
        return len(self.pending) < self._prefetch

    @property
    def starves(self) -> bool:
        # DALI's first run is `prefetch` runs, which all need their input.
        return not self.pending or not self._started

    def feed(self, host: _Host) -> None:
        assert self._pipe is not None
        self._pipe.feed_input("encoded", host.slots.encoded)
        if self._flip:
            self._pipe.feed_input("mirror", [np.int32(view) for view in host.slots.views])
        self.pending.append(host)
        if self._started or not self.has_room:
            self._pipe.schedule_run()
            self._started = True

    def take(self, stream: Any) -> tuple[_Host, Any]:
        """The oldest batch and its images, DALI's TensorList; they stay pending if that fails."""
        assert self._pipe is not None
        (images,) = self._pipe.outputs(stream)
        return self.pending.popleft(), images

    def close(self) -> None:
        self._pipe = None
        self.pending.clear()


def _wanted_columns(
    data: DataSet, moments: bool, features: Sequence[str], flip: bool
) -> list[MomentsColumn | FeaturesColumn]:
    """The columns that are read, in a batch's order; ConfigError for one that is not there."""
    columns: list[MomentsColumn | FeaturesColumn] = []
    if moments:
        if data.moments is None:
            raise ConfigError(f"data.latents: {data.path} holds no latents")
        columns.append(data.moments)
    stored = {column.encoder: column for column in data.features}
    for encoder in features:
        if encoder not in stored:
            raise ConfigError(
                f"vision.targets: {data.path} holds no features of {encoder}"
                f" (it holds {', '.join(stored) or 'none'})"
            )
        columns.append(stored[encoder])
    for column in columns:
        if flip and column.views < 2:
            raise ConfigError(
                f"data.flip: the {column.name} of {data.path} are of unmirrored images only; "
                "prepare them with `fastrepa prepare --flip`, or set data.flip=false"
            )
    return columns


def _decode_device(config: DataConfig, device: torch.device) -> str:
    if config.decode == "mixed" and device.type != "cuda":
        raise ConfigError(
            f"data.decode: 'mixed' decodes on a GPU, but this run is on {device.type};"
            " use 'auto' or 'cpu'"
        )
    if config.decode == "auto":
        return "mixed" if device.type == "cuda" else "cpu"
    return config.decode


def _gpu_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _decode_threads() -> int:
    """Twice this rank's share of the cores that the process may use.

    Twice, because a batch is done when its last image is: measured 5% faster on two busy cores.
    """
    return max(1, min(2 * usable_cores() // launched_world().local_size, MAX_DECODE_THREADS))
