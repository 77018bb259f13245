"""Shards -> batches on the device, with NVIDIA DALI.

`ShardReader` hands DALI the encoded bytes and the label of each sample; DALI decodes ahead of time,
on its own threads (CPU) or on the GPU ("mixed"). One code path reads every data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType

import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from fastrepa.config import DataConfig
from fastrepa.data.reader import SampleOrder, ShardReader
from fastrepa.data.shards import ShardSet
from fastrepa.data.spawn import WORKER_DIED, DeathWatch, clean_start
from fastrepa.errors import ConfigError, DataError

# Decoding threads per rank at most; more only fight over memory.
MAX_DECODE_THREADS = 8


@dataclass
class Batch:
    """One forward pass of one rank.

    Attributes:
        image_u8: uint8 [B, 3, R, R], RGB.
        moments: [B, 2C, h, w], mean and std of the latents where the set holds them, else None.
        label: int64 [B].
    """

    image_u8: Tensor
    moments: Tensor | None
    label: Tensor


class DataPipeline(Iterator[Batch]):
    """The endless stream of one rank's batches, from `start_step` on.

    Batch k of a rank is forward pass k % A of step start_step + k // A, with
    A = global_batch / (world * micro_batch). The samples of a step depend on seed and step alone,
    never on ranks, workers or restarts (reader.py). A batch is never overwritten by a later one. On
    a GPU its memory is DALI's, bound to the stream that was current at `next`: work on it from
    another stream must be waited for there before the batch is dropped.

    Args:
        shards: an opened set.
        config: decode, workers, prefetch and window are used.
        global_batch: samples per step over all ranks.
        micro_batch: samples per rank per forward pass.
        rank, world: this process among those that train together.
        seed: of the order of the samples.
        start_step: step of the first batch.
        device: where the batches are wanted.

    Raises ConfigError for impossible combinations; iterating raises DataError, naming shard and
    sample, for bytes that are not the prepared ones.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start_step: int = 0,
        device: torch.device,
    ) -> None:
        if global_batch % (world * micro_batch):
            raise ConfigError(
                f"training.global_batch: {global_batch} is no multiple of {world} ranks"
                f" times a micro batch of {micro_batch}"
            )
        self._device = device
        self._resolution = shards.resolution
        self._reader = ShardReader(
            shards.shard_paths,
            shards.index_paths,
            SampleOrder(shards.shard_sizes, seed=seed, window=config.window),
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world=world,
            start_step=start_step,
        )
        self._pipe: Pipeline | None = _build(
            self._reader, config, micro_batch, _decode_device(config, device), device
        )
        pool = self._pipe._py_pool  # DALI has no public way to its workers
        self._workers = list(pool.pool._processes) if pool else []
        self._watch = DeathWatch(self._workers)

    def __next__(self) -> Batch:
        if self._pipe is None:
            raise DataError("the data pipeline is closed")
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            images, labels = (outputs.as_tensor() for outputs in self._pipe.run(stream))
        except Exception as error:  # DALI wraps the reader's errors in its own
            died = any(worker.exitcode is not None for worker in self._workers)
            failure = DataError(WORKER_DIED) if died else _data_error(error)
            self.close()
            raise failure from None
        # DALI's memory itself, no copy: its dynamic executor reuses a buffer only when the tensor
        # that holds it is gone.
        image_u8, label = torch.from_dlpack(images), torch.from_dlpack(labels)
        if image_u8.shape[2:] != (self._resolution, self._resolution):
            raise DataError(
                f"images of {tuple(image_u8.shape[2:])} pixels in a set of {self._resolution} px"
            )
        return Batch(image_u8=image_u8, moments=None, label=label)

    def close(self) -> None:
        """End the workers and free the buffers; batches already handed out stay valid."""
        if self._pipe is not None:
            with self._watch.closing():
                if self._pipe._py_pool is not None:
                    self._pipe._py_pool.close()
                self._pipe._shutdown()
                self._pipe = None
        self._reader.close()

    def __enter__(self) -> DataPipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _decode_device(config: DataConfig, device: torch.device) -> str:
    if config.decode == "mixed" and device.type != "cuda":
        raise ConfigError(
            f"data.decode: 'mixed' decodes on a GPU, but this run is on {device.type};"
            " use 'auto' or 'cpu'"
        )
    if config.decode == "auto":
        return "mixed" if device.type == "cuda" else "cpu"
    return config.decode


def _build(
    reader: ShardReader, config: DataConfig, batch: int, decode: str, device: torch.device
) -> Pipeline:
    """The started DALI pipeline: (images uint8 [B,3,R,R], labels int64 [B]) on `device`."""
    on_gpu = device.type == "cuda"
    parallel = config.workers > 0
    pipe = Pipeline(
        batch_size=batch,
        num_threads=_decode_threads(),
        device_id=_gpu_index(device) if on_gpu else None,
        prefetch_queue_depth=config.prefetch,
        exec_dynamic=True,
        py_num_workers=max(config.workers, 1),
        py_start_method="spawn",
    )
    with pipe:
        encoded, labels = fn.external_source(
            source=reader,
            num_outputs=2,
            batch=False,
            parallel=parallel,
            prefetch_queue_depth=config.prefetch if parallel else None,
            dtype=[types.DALIDataType.UINT8, types.DALIDataType.INT64],
            ndim=[1, 0],
        )
        images = fn.decoders.image(encoded, device=decode, output_type=types.DALIImageType.RGB)
        if on_gpu:
            images, labels = images.gpu(), labels.gpu()
        images = fn.transpose(images, perm=[2, 0, 1])
        pipe.set_outputs(images, labels)
    with clean_start() if parallel else nullcontext():
        pipe.build()
    return pipe


def _gpu_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _decode_threads() -> int:
    """This rank's share of the cores that the process may use."""
    cores = len(os.sched_getaffinity(0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores // ranks, MAX_DECODE_THREADS))


def _data_error(error: BaseException) -> DataError:
    """The reader's DataError inside whatever DALI made of it, or a DataError about DALI's own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DataError):
            return DataError(str(cause))
        cause = cause.__cause__ or cause.__context__
    # From a worker, DALI passes the message on, but the class only as text of the traceback.
    if error.__cause__ is not None and f"{DataError.__name__}: " in str(error):
        return DataError(str(error.__cause__))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return DataError(f"DALI could not make a batch: {lines[0] if lines else error!r}")
