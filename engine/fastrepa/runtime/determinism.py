"""`deterministic: true`: two runs of one configuration end with the same bits.

What holds it together, and where: order, noise, time, label dropout and mirroring are keyed
(randomness.py, data/reader.py); our kernels use no float atomics (fastrepa_kernels); Triton block
sizes come from tables (launch.py); attention takes backends whose backward is deterministic; torch,
cuBLAS, cuDNN and Inductor are told here; JPEGs are decoded by the CPU, because the GPU's decoder
shares a batch out between its engines. An operation without a deterministic implementation is an
error that names it.

The same bits are promised for the same hardware, software, ranks, ZeRO stage, micro-batch and
threads. Other ranks, stages and micro-batches keep the order of the samples and every sample's
noise, and sum in another order: losses agree to rounding. NOT_ON_A_GPU says what nobody promises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastrepa.errors import ConfigError, TrainingError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility names these two.
CUBLAS_SETTINGS = (":4096:8", ":16:8")
INDUCTOR = "TORCHINDUCTOR_DETERMINISTIC"

NOT_ON_A_GPU = (
    "not guaranteed: the order in which NCCL sums over several GPUs, which it chooses by topology "
    "(same nodes, same order, as far as known)"
)


def make_deterministic(wanted: bool) -> None:
    """Turn it on for this process where it is `wanted`; to be called before CUDA starts.

    cuBLAS reads its variable once, when CUDA starts; a value that the user exported is kept.
    Raises ConfigError where that value allows other orders of summation, or it is too late.
    """
    if not wanted:
        return
    set_to = os.environ.get(CUBLAS)
    if set_to is None:
        if torch.cuda.is_initialized():
            raise ConfigError(
                f"deterministic: CUDA has started without {CUBLAS}; export "
                f"{CUBLAS}={CUBLAS_SETTINGS[0]}, or call make_deterministic before init_world"
            )
        os.environ[CUBLAS] = CUBLAS_SETTINGS[0]
    elif set_to not in CUBLAS_SETTINGS:
        raise ConfigError(
            f"deterministic: {CUBLAS} is {set_to!r}; export {' or '.join(CUBLAS_SETTINGS)}, "
            "or leave it unset"
        )
    os.environ.setdefault(INDUCTOR, "1")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


@contextmanager
def refusals_by_name() -> Iterator[None]:
    """Torch's refusal of an operation, as a TrainingError of one line that names it."""
    try:
        yield
    except RuntimeError as e:
        name, found, _ = str(e).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise TrainingError(
            f"deterministic: {name} has no deterministic implementation in torch "
            f"{torch.__version__}; set deterministic=false, or do without what uses it"
        ) from e
