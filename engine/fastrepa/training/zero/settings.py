"""What `auto` stands for in `zero`: numbers from the model's size and the number of ranks.

D is the generator's width, N its trained elements, w the bytes of one, and a block has
4 D^2 (attention) + 8 D^2 (MLP) + 6 D^2 (modulation) of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastrepa.config import Config

# Of DistributedDataParallel, near the optimum of its authors on 16 and 32 GPUs (Li et al. 2020,
# "PyTorch Distributed", section 5.3): a smaller message does not fill the links.
LEAST_BUCKET = 25 * 2**20  # bytes
# A ring sends 1 / ranks of a message at a time; 128 KiB keep that part above the latency. Assumed.
LEAST_PART = 128 * 2**10  # bytes
# DeepSpeed's own defaults, as the most: beyond them a bucket is memory and nothing else.
MOST_BUCKET, MOST_PREFETCH, SUB_GROUP = 500_000_000, 50_000_000, 1_000_000_000
# Every tensor of a sub-group has a pinned buffer while its part is updated from NVMe.
NVME_SUB_GROUP = 100_000_000


def resolve_zero(config: Config, trained: int, world_size: int) -> Config:
    """The configuration with a number for every auto in `zero`; `trained` is N."""
    auto = {k: v for k, v in auto_settings(config, trained, world_size).items()
            if getattr(config.zero, k) == "auto"}  # fmt: skip
    return config.model_copy(update={"zero": config.zero.model_copy(update=auto)})


def auto_settings(config: Config, trained: int, world_size: int) -> dict[str, Any]:
    """Every setting of `zero` that can be auto, in elements."""
    width, block = config.model.width, block_elements(config)
    itemsize = config.training.dtype.itemsize
    everything = _even(trained)
    # One block's gradients leave together, while backward works on the block before it.
    bucket = max(block, LEAST_BUCKET // itemsize, LEAST_PART // itemsize * world_size)
    return {
        # Two buckets instead of one are little, now that a bucket is about a block.
        "overlap_comm": world_size > 1 and config.zero.stage > 0,
        "reduce_bucket_size": min(everything, _even(bucket), MOST_BUCKET),
        # DeepSpeed 0.19 gathers in one call wherever all_gather_into_tensor exists, as it does in
        # NCCL and gloo, and then does not look at this.
        "allgather_bucket_size": min(everything, MOST_BUCKET),
        # The next block's weights come while this one computes.
        "prefetch_bucket_size": min(everything, block, MOST_PREFETCH),
        # Biases (6 D at most) stay, matrices (16 D at least) do not: ten widths is what Hugging
        # Face's transformers takes for auto.
        "param_persistence_threshold": 10 * width,
        "sub_group_size": NVME_SUB_GROUP if config.zero.offload == "nvme" else SUB_GROUP,
    }


def block_elements(config: Config) -> int:
    """Of the weights of one block, biases left out."""
    return 18 * config.model.width**2


def trained_elements(parameters: Iterable[Tensor]) -> int:
    """N, also of parameters that ZeRO-3 has taken apart."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)


def _even(n: int) -> int:
    return n + n % 2  # NCCL's alignment, which DeepSpeed insists on
