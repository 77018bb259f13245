"""The speed of the generator, by its shapes and its micro-batch, and what calibrates that.

    forward and backward of one micro-batch = max(work, launches x seconds of one)
    work = products / (share of peak) + attention / (share of peak) + traffic / HBM

The shares and the traffic are those of our own record (RECORD), where they add up to what was
measured; on other GPUs they are carried over by the datasheets' peak and bandwidth. Runs of others
(docs/published_numbers.md has the sources) reach far less of peak; a plan says both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastrepa.errors import ConfigError
from fastrepa.runtime.hardware import GPU, find_gpu
from fastrepa.training.memory.workload import Workload

RECORD = "SiT-XL/2 on one H200, 256 images a forward: 398.9 ms a step, 642 images/s"
PRODUCTS = 0.69  # of peak: 677 TFLOP/s of 989 in products of 65,536 rows
HALF_ROWS = 1024  # where tiles of 128 rows leave half of the processors idle
ATTENTION = 0.134  # of peak, of the model's FLOPs: cuDNN's backward makes the scores again
# Bytes that all else moves, for each element of the blocks' outputs [N, D], at 80% of bandwidth.
TRAFFIC = {"fused": 140.0, "eager": 424.0}
LAUNCHES = 56  # of kernels in a block, forward and backward
OTHER_LAUNCHES = 220  # 1,784 were counted in a step of 28 blocks
LAUNCH = {"none": 8e-6, "blocks": 8e-6, "graphs": 3.3e-6}  # seconds; assumed


@dataclass(frozen=True)
class PublicRun:
    """A run that others have reported: model FLOPs of its images per second, as a share of peak."""

    share: float
    what: str


LIGHTNING = PublicRun(0.21, "LightningDiT-XL on 8 H800, 2,280 images/s")
PUBLIC = {"A100 SXM 80 GB": PublicRun(0.125, "DiT-XL/2 on 8 A100, 438 images/s")}


def public_run(gpu: GPU) -> PublicRun:
    """The fastest public run of this size on that kind of GPU, or else on Hopper."""
    found = (run for title, run in PUBLIC.items() if gpu.title.startswith(title))  # or ", changed"
    return next(found, LIGHTNING)


def generator_seconds(
    w: Workload, micro: int, gpu: GPU, *, hbm_efficiency: float, efficiency: float | None = None
) -> float:
    """Seconds of forward and backward of `micro` images; efficiency, where it is given, is the
    share of peak that is reached whatever the shapes.
    """
    model, training = w.config.model, w.config.training
    peak = gpu.bf16 if training.bf16 else gpu.fp32
    floor = (LAUNCHES * model.depth + OTHER_LAUNCHES) * LAUNCH[training.compile]
    flops = micro * w.training_flops
    if efficiency is not None:
        return max(flops / (peak * efficiency), floor)
    tokens = (w.side // model.patch) ** 2
    rows = micro * tokens
    attention = 12 * rows * tokens * model.width * model.depth  # Q K^T and A V, three times
    moved = TRAFFIC[w.config.kernels] * rows * model.width * model.depth
    work = (
        (flops - attention) / (peak * PRODUCTS * rows / (rows + HALF_ROWS))
        + attention / (peak * ATTENTION)
        + moved * (1 if training.bf16 else 2) / (gpu.hbm * hbm_efficiency)
    )
    return max(work, floor)


def choose_gpu(
    name: str | None,
    *,
    tflops: float | None = None,
    memory: float | None = None,
    bandwidth: float | None = None,
) -> GPU:
    """The GPU of a name (default: h100) with what is given in the place of its own values, or one
    of all three without a name. tflops: dense, in training.precision, in 1e12 FLOP/s; memory in
    GB; bandwidth in GB/s. ConfigError names what is not allowed, or missing.
    """
    given = {"--gpu-tflops": tflops, "--gpu-memory": memory, "--gpu-bandwidth": bandwidth}
    for option, value in given.items():
        if value is not None and not 1e-3 <= value <= 1e9:
            raise ConfigError(f"{option}: must be above 0 (0.001 to 1e9), got {value:g}")
    missing = [option for option, value in given.items() if value is None]
    if missing and len(missing) < len(given) and name is None:
        raise ConfigError(
            f"{missing[0]}: a GPU without a name needs {', '.join(given)}; with --gpu NAME they "
            f"stand in the place of its own"
        )
    gpu = find_gpu(name or "h100")
    if len(missing) == len(given):
        return gpu
    changed = replace(
        gpu,
        title=f"{gpu.title}, changed" if name else "GPU as given",
        memory=gpu.memory if memory is None else 1e9 * memory,
        hbm=gpu.hbm if bandwidth is None else 1e9 * bandwidth,
        source=f"{gpu.source}; the rest as given" if name else "as given",
    )
    if tflops is not None:
        changed = replace(changed, bf16=1e12 * tflops, fp32=1e12 * tflops)
    if name is None:  # PCIe in the place of NVLink, and one adapter of 100 Gb/s for each GPU
        changed = replace(changed, nvlink=25e9, network=12.5e9)
    return changed
