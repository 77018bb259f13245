"""ZeRO's settings as arithmetic: what `auto` stands for, from the model's size and the number of
ranks, and the dictionary that DeepSpeed wants. Nothing here needs DeepSpeed.

D is the generator's width, N its trained elements, w the bytes of one, and a block has
4 D^2 (attention) + 8 D^2 (MLP) + 6 D^2 (modulation) of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastrepa.checkpoint.kinds import MOMENTS
from fastrepa.config import Config, ModelConfig, TrainingConfig, ZeroConfig
from fastrepa.errors import ConfigError

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
    zero, itemsize = config.zero, config.training.dtype.itemsize
    settings = auto_settings(zero, config.model, itemsize, trained, world_size)
    auto = {k: v for k, v in settings.items() if getattr(zero, k) == "auto"}
    return config.model_copy(update={"zero": zero.model_copy(update=auto)})


def auto_settings(
    zero: ZeroConfig, model: ModelConfig, itemsize: int, trained: int, world_size: int
) -> dict[str, Any]:
    """Every setting of `zero` that can be auto, in elements of `itemsize` bytes."""
    block, everything = block_elements(model), _even(trained)
    # One block's gradients leave together, while backward works on the block before it.
    bucket = max(block, LEAST_BUCKET // itemsize, LEAST_PART // itemsize * world_size)
    return {
        # Two buckets instead of one are little, now that a bucket is about a block.
        "overlap_comm": world_size > 1 and zero.stage > 0,
        "reduce_bucket_size": min(everything, _even(bucket), MOST_BUCKET),
        # DeepSpeed 0.19 gathers in one call wherever all_gather_into_tensor exists, as it does in
        # NCCL and gloo, and then does not look at this.
        "allgather_bucket_size": min(everything, MOST_BUCKET),
        # The next block's weights come while this one computes.
        "prefetch_bucket_size": min(everything, block, MOST_PREFETCH),
        # Biases (6 D at most) stay, matrices (16 D at least) do not: ten widths is what Hugging
        # Face's transformers takes for auto.
        "param_persistence_threshold": 10 * model.width,
        "sub_group_size": NVME_SUB_GROUP if zero.swaps else SUB_GROUP,
    }


def block_elements(model: ModelConfig) -> int:
    """Count the weights of one block, biases left out."""
    return 18 * model.width**2


def trained_elements(parameters: Iterable[Tensor]) -> int:
    """Count the elements of what is trained, [...] each, also where ZeRO-3 has taken it apart."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)


def _even(n: int) -> int:
    return n + n % 2  # NCCL's alignment, which DeepSpeed insists on


def micro_batch(training: TrainingConfig, world_size: int) -> tuple[int, int]:
    """Return (images per rank per forward, forwards per step) for the global batch.

    Raises ConfigError where the batch does not divide.
    """
    batch = training.global_batch
    if batch % world_size:
        raise ConfigError(f"training.global_batch: {batch} is not divisible by {world_size} ranks")
    per_rank = batch // world_size
    micro = training.micro_batch or per_rank
    if per_rank % micro:
        raise ConfigError(
            f"training.micro_batch: {micro} does not divide the {per_rank} images of each rank "
            f"(training.global_batch {batch} over {world_size} ranks)"
        )
    return micro, per_rank // micro


def as_run(zero: ZeroConfig, training: TrainingConfig, world_size: int) -> ZeroConfig:
    """The settings with the ZeRO stage that runs.

    Stages 1 and 2 divide nothing on one rank, where stage 0's step is the shorter. Float32 sums of
    several forwards' bf16 gradients are theirs alone.
    """
    forwards = micro_batch(training, world_size)[1]
    if (
        world_size > 1
        or zero.stage == 3
        or zero.offloads
        or _sums_in_fp32(zero, training, forwards)
    ):
        return zero
    return zero.model_copy(update={"stage": 0})


def deepspeed_config(
    zero: ZeroConfig, training: TrainingConfig, run: str, world_size: int
) -> dict[str, Any]:
    """The dictionary DeepSpeed wants, computed from ours, in which `zero` has numbers for auto."""
    zero = as_run(zero, training, world_size)
    micro, forwards = micro_batch(training, world_size)
    ours = steps_itself(zero, training, forwards)
    out: dict[str, Any] = {
        "train_batch_size": training.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": forwards,
        # Stage 0's weights are cast by us: DeepSpeed would keep masters of its own for each tensor.
        "bf16": {"enabled": training.bf16 and zero.stage > 0},
        "zero_optimization": _zero_optimization(zero, run, emas=len(training.ema)),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
        "gradient_clipping": 0.0 if ours else training.clip,
        # It waits for the device at every forward and step.
        "timers": {"throughput": {"enabled": False}},
    }
    if _sums_in_fp32(zero, training, forwards):
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    return out


def _sums_in_fp32(zero: ZeroConfig, training: TrainingConfig, forwards: int) -> bool:
    """Sums of many bf16 gradients lose what each adds."""
    return training.bf16 and zero.stage > 0 and forwards > 1


def steps_itself(zero: ZeroConfig, training: TrainingConfig, forwards: int) -> bool:
    """Tell whether the optimiser's phase is step.py's, with norm and clipping in AdamWEMA."""
    if zero.stage == 1 and _sums_in_fp32(zero, training, forwards):
        return False
    return zero.stage < 3 and not zero.offloads


def _zero_optimization(zero: ZeroConfig, run: str, *, emas: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": zero.overlap_comm,
        "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_bucket_size": zero.allgather_bucket_size,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero.param_persistence_threshold,
        "sub_group_size": zero.sub_group_size,
        "memory_efficient_linear": False,  # see engine.py
    }
    undecided = [name for name, value in out.items() if value == "auto"]
    if undecided:
        raise ValueError(f"zero.{undecided[0]}: still auto; resolve_zero comes first")
    if zero.offloads:
        from fastrepa.training.zero.offload import offload_settings

        out |= offload_settings(zero, run, len(MOMENTS) + emas)
    return out
