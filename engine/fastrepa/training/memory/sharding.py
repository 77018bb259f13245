"""DeepSpeed's shards: what every GPU keeps and sends, per ZeRO stage.

The rules are those of DeepSpeed 0.19, read in its source and measured on it (test_plan.py):

    stage  whole on every GPU     divided by the GPUs    sent per step
    0      everything             -                      all_reduce of gradients
    1      weights, gradients     masters, moments, EMA  the same, all_gather of weights
    2      weights                gradients too          the same, all_reduce at every forward
    3      -                      weights too            all_gather of weights and reduce_scatter
                                                         of gradients at every forward

DeepSpeed reduces gradients of stages 1 and 2 by all_reduce (its use_multi_rank_bucket_allreduce),
so they send half as much again as the ZeRO paper's reduce_scatter would.

With offload_optimizer the masters, moments and EMA are in host memory, or on NVMe, beside what else
`host` counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastrepa.training.memory.activations import MemoryCurve

# What DeepSpeed takes for settings that deepspeed_config leaves out, in elements.
ZERO_DEFAULTS: dict[str, Any] = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}

PARTS = (
    "weights", "gradients", "master weights", "Adam moments", "EMA", "activations", "encoders",
    "codec", "communication buffers", "reserve",
)  # fmt: skip
HOST_PARTS = (
    "master weights", "Adam moments", "EMA", "gradients", "weights", "NVMe buffers",
    "checkpoint writer",
)  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """Sizes of the generator's parameters, in elements."""

    trained: tuple[int, ...]
    fixed: tuple[int, ...]

    @property
    def numel(self) -> int:
        return sum(self.trained)


@dataclass(frozen=True)
class Sharding:
    """A way to run: how many GPUs, ZeRO stage, images per GPU and forward, forwards per step.

    recompute: every how manieth block runs again in backward, 0: none. keep_h: GELU's output is
    kept for backward. zero: DeepSpeed's own settings, the dictionary `zero_optimization`. emas:
    averages kept. block: elements of one of the generator's blocks. eager: kernels are torch's own.
    """

    world: int
    stage: int
    micro: int
    forwards: int
    recompute: int
    keep_h: bool
    bf16: bool
    zero: Mapping[str, Any] = field(default_factory=dict)
    emas: int = 1
    block: int = 0
    eager: bool = False

    def number(self, name: str) -> int:
        return int(self.zero.get(name, ZERO_DEFAULTS[name]))

    @property
    def overlaps(self) -> bool:
        return bool(self.zero.get("overlap_comm", self.stage == 3))

    @property
    def keep(self) -> str:
        """The value of training.keep: h or none."""
        return "h" if self.keep_h else "none"

    @property
    def offload(self) -> str:
        """The value of zero.offload: none, cpu or nvme."""
        return str(self.zero.get("offload_optimizer", {}).get("device", "none"))

    @property
    def offloads_parameters(self) -> bool:
        return "offload_param" in self.zero

    @property
    def itemsize(self) -> int:
        """Bytes of a weight, and of a gradient as it is made and sent."""
        return 2 if self.bf16 else 4

    def share(self, since: int) -> int:
        """Return the number of GPUs that share what ZeRO divides from stage `since` on."""
        return self.world if self.stage >= since else 1

    @property
    def _sums_in_fp32(self) -> bool:
        """zero/engine.py asks for float32 sums where several bf16 gradients are added."""
        return self.bf16 and self.stage > 0 and self.forwards > 1

    @property
    def _sums_whole(self) -> bool:
        """Stage 1 with float32 sums is another optimiser of DeepSpeed's, unless it offloads."""
        return self.stage == 1 and self._sums_in_fp32 and self.offload == "none"

    @property
    def leaves_early(self) -> bool:
        """Tell whether stage 1's gradients leave during backward, as those of stage 2 always do."""
        return self.stage == 1 and self.overlaps and not self._sums_whole

    def persistent(self, p: Parameters) -> int:
        """Elements that stage 3 keeps whole because they are small."""
        limit = self.number("stage3_param_persistence_threshold")
        return sum(n for n in (*p.trained, *p.fixed) if n <= limit) if self.stage == 3 else 0

    def reused(self, p: Parameters) -> int:
        """Elements that stage 3 still holds when backward starts: those used again soon.

        The way from a weight's forward to its backward passes all that come after it twice.
        """
        return min(p.numel, self.number("stage3_max_reuse_distance") // 2)


def resident(s: Sharding, p: Parameters) -> dict[str, float]:
    """Bytes per GPU that are there between steps, by part."""
    w, n, here = s.itemsize, p.numel, s.offload == "none"
    gradients = 0.0
    if s.stage == 3 and here:
        gradients = (4 if s._sums_in_fp32 else w) * n / s.world
    elif s._sums_whole:
        gradients = 4 * n  # BF16_Optimizer divides the states alone
    sharded = 0 if s.offloads_parameters else (n + sum(p.fixed)) / s.share(3)
    # Copies on their way to the host need room for the largest of them.
    passage = w * max(p.trained) if s.stage in (1, 2) and not here else 0
    return {
        "weights": w * (sharded + s.persistent(p) * (1 - 1 / s.world)),
        "gradients": gradients,
        "master weights": 4 * n / s.share(1) if here and (s.bf16 or s.stage) else 0,
        "Adam moments": 8 * n / s.share(1) if here else 0,
        "EMA": 4 * n * s.emas / s.share(1) if here else 0,
        "communication buffers": passage
        + (w * s.number("reduce_bucket_size") if s.stage == 3 else 0),
    }


def host(s: Sharding, p: Parameters, *, saves: bool = True) -> dict[str, float]:
    """Bytes of host memory per GPU, by part: offloaded states, and the checkpoint writer, which
    keeps its share of weight, moments and averages in float32 for as long as the run lasts, and in
    stage 3, whose tensors are in slices, what it sends to the ranks that write them.
    """
    w, n, part = s.itemsize, p.numel, p.numel / s.world
    out = dict.fromkeys(HOST_PARTS, 0.0)
    states = 12 + 4 * s.emas  # bytes of weight, moments and averages
    sent = 1 - 1 / s.world if s.stage == 3 else 0
    out["checkpoint writer"] = states * part * (1 + sent) if saves else 0.0
    if s.offload == "none":
        return out
    if s.offload == "cpu":
        out |= {"master weights": 4 * part, "Adam moments": 8 * part, "EMA": 4 * part * s.emas}
        out["gradients"] = 4 * part
    else:
        group = min(part, s.number("sub_group_size"))
        out["NVMe buffers"] = 4 * group * s.zero["offload_optimizer"]["buffer_count"]
    if s.stage == 3:
        # Sums of the micro-batches' gradients.
        out["gradients"] += (4 if s._sums_in_fp32 else w) * part
        if s.offloads_parameters:
            out["weights"] = w * (n + sum(p.fixed)) / s.world
    else:
        out["weights"] = w * part  # updated ones on their way back
        out["gradients"] += w * max(p.trained) + host_sums(s, p)
    return out


def host_sums(s: Sharding, p: Parameters) -> float:
    """Bytes of those that are there from backward to update alone: stages 1 and 2 add up whole
    gradients where there are several micro-batches.
    """
    whole = s.offload != "none" and s.stage in (1, 2) and s.forwards > 1
    return float(s.itemsize * p.numel) if whole else 0.0


def nvme(s: Sharding, p: Parameters) -> float:
    """Bytes on NVMe per GPU: masters, moments, EMA."""
    return (12 + 4 * s.emas) * p.numel / s.world if s.offload == "nvme" else 0.0


def backward_peak(s: Sharding, p: Parameters, curve: MemoryCurve) -> dict[str, float]:
    """Bytes per GPU beside `resident` at the highest moment of forward and backward, by part."""
    w, n, several = s.itemsize, p.numel, s.forwards > 1
    bucket = w * s.number("reduce_bucket_size")
    copy = 0.0
    before, kept = 0.0, 0.0  # bytes of earlier forwards' gradients; bytes kept per new element
    if s.stage == 2 or (s.leaves_early and not several):
        size = (4 if s._sums_in_fp32 else w) / s.world if s.offload == "none" else 0.0
        before, kept = (size * n, 0.0) if several else (0.0, size)
    elif s.stage < 2:
        before, kept = (w * n, 0.0) if several else (0.0, w)
    if s.stage == 0 or s._sums_whole:
        bucket = 0
    elif s.stage == 3:
        # reduce_scatter's input, beside the bucket that is always there.
        bucket = min(bucket, w * n) if s.world > 1 else 0
    else:
        if s.overlaps:
            bucket *= 2
        if s.stage == 2 or s.leaves_early:
            # all_reduce sends a flattened copy of what is in the bucket, once that is full.
            copy = min(w * s.number("reduce_bucket_size"), w * n)
    gathered = 0.0
    if s.stage == 3 and s.world > 1:
        whole = min(n, s.reused(p) + s.number("stage3_prefetch_bucket_size"))
        # Persistent weights and this GPU's own shards are counted where they reside.
        if s.recompute and s.reused(p) < n:
            whole = min(n, whole + s.block)  # all of it again, for its second forward
        gathered = w * max(0, whole - s.persistent(p))
    moments = [
        {
            "activations": live,
            "gradients": before + kept * done,
            # The bucket is made for the first gradient that is ready.
            "communication buffers": gathered
            + (bucket if i else 0)
            + (copy if w * done >= copy or i == len(curve.done) - 1 else 0),
        }
        for i, (live, done) in enumerate(zip(curve.at(s.micro), curve.done, strict=True))
    ]
    return max(moments, key=lambda m: sum(m.values()))


def twice_let_go(width: int, blocks: int) -> int:
    """Elements of `blocks` recomputed blocks' attention and modulation. The MLP stays: the second
    forward ends inside it, with the input of its last product.
    """
    return blocks * (10 * width**2 + 10 * width)


def update_peak(s: Sharding, p: Parameters) -> dict[str, float]:
    """Bytes per GPU beside `resident` when backward is over: gradients, and their copies on the way
    to the optimiser.
    """
    w, n = s.itemsize, p.numel
    # As they were made, and flat; then flat, and in the masters' dtype where torch's own AdamW
    # wants it.
    flattened = max(2 * w, w + 4 if s.eager and s.bf16 else 0)
    if s.stage == 0:
        return {"gradients": flattened * n}
    if s.stage == 3 and s.offload == "none":
        part = min(n / s.world, s.number("sub_group_size"))
        return {"gradients": (4 + (2 if s.bf16 else 0)) * part}
    if s._sums_whole:
        return {"gradients": w * n}
    if s.offload != "none":  # they have left already, but stage 1 may start only now
        return {"gradients": w * n} if s.stage == 1 and not s.leaves_early else {}
    # The shard's gradients, and flat; float32 sums of bf16 ones are flat from the first.
    update = (4 if s._sums_in_fp32 else flattened) * n / s.world
    if s.stage == 1 and not s.leaves_early:
        # Before that they leave the whole ones by way of the bucket, whose flattened copy takes
        # the place of those in it until the sending is over.
        bucket, leaving = w * s.number("reduce_bucket_size"), w * n * (1 + 1 / s.world)
        if bucket + leaving > update:
            return {"gradients": leaving, "communication buffers": bucket}
    return {"gradients": update}


@dataclass(frozen=True)
class Message:
    """Collectives of one kind in one step. size: bytes of the whole tensors, shards put together;
    logged: bytes as DeepSpeed's comms logger counts them (a gather by the shard that goes in).
    """

    op: str
    size: float
    logged: float
    calls: int
    overlapped: bool

    def sent(self, world: int) -> float:
        """Bytes that each GPU sends in a ring."""
        return (2 if self.op == "all_reduce" else 1) * self.size * (world - 1) / world


def messages(s: Sharding, p: Parameters, recomputed: int = 0) -> list[Message]:
    """List what one step sends; norms and flags of a few bytes are left out.

    recomputed: elements of the weights that stage 3 lets go once more between a block's second
    forward and its backward (`twice_let_go`).
    """
    if s.world == 1:
        return []
    w, n = s.itemsize, p.numel
    if s.stage == 0:
        return [Message("all_reduce", w * n, w * n, 1, False)]
    if s.stage < 3:
        times = s.forwards if s.stage == 2 else 1
        calls = times * math.ceil(n / s.number("reduce_bucket_size"))
        return [
            Message("all_reduce", w * n * times, w * n * times, calls, s.overlaps),
            Message("all_gather_into_tensor", w * n, w * n / s.world, 1, False),
        ]
    everything, small = n + sum(p.fixed), s.persistent(p)
    again = max(0, n - s.reused(p))  # let go after forward, wanted in backward
    once_more = recomputed * again / n
    elements = small + s.forwards * (
        everything - small + min(again, everything - small) + once_more
    )
    gathers = math.ceil(elements / max(1, s.number("stage3_prefetch_bucket_size")))
    scatters = s.forwards * math.ceil(n / s.number("reduce_bucket_size"))
    return [
        Message("all_gather_into_tensor", w * elements, w * elements / s.world, gathers, True),
        Message(
            "reduce_scatter_tensor", w * n * s.forwards, w * n * s.forwards, scatters, s.overlaps
        ),
    ]
