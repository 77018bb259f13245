"""The optimiser's phase of a step in ZeRO 0, 1 and 2: one pass over flat tensors.

DeepSpeed's own scans every gradient for overflow, takes norms in float64 tensor by tensor and reads
both on the host; then copies gradients to float32, scales them, and copies the new weights back.
Here gradients are flattened once, their norm is one reduction, and AdamWEMA reads the flat gradient
as it is, clips, updates the float32 masters, and writes the weights that the forward reads, in one
pass. DeepSpeed keeps its own step where its gradients are elsewhere: stage 3, offloaded states, and
stage 1 with float32 sums of bf16 gradients (BF16_Optimizer).

Read in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py: step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor, nn

from fastrepa.training.optimizer import AdamWEMA

ALIGNED = 16  # elements: matrix products want weights that begin on 16 bytes


class FlatWeights:
    """The trained weights of a model that nothing divides, as views of one tensor.

    params: the model's, whose data become the views. weights [N]: what the forward reads, in
    `dtype`. master [N] float32: what the optimiser updates; in fp32 the weights themselves.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.params, self._starts, total = list(params), dict[Tensor, int](), 0
        for p in self.params:
            self._starts[p] = total
            total += -(-p.numel() // ALIGNED) * ALIGNED
        self.weights = torch.zeros(total, dtype=dtype, device=device)
        for p in self.params:
            p.data = self.view(self.weights, p).copy_(p.data)
        half = dtype != torch.float32
        self.master = nn.Parameter(self.weights.float() if half else self.weights)
        self.low = [self.weights] if half else None

    def view(self, flat: Tensor, p: Tensor) -> Tensor:
        """The part of flat [N] that belongs to the parameter, in its shape."""
        start = self._starts[p]
        return flat[start : start + p.numel()].view(p.shape)

    def gradients(self) -> Tensor:
        """The mean over ranks of all gradients [N], in the weights' dtype; they leave their
        parameters (collective).
        """
        pieces = []
        for p in self.params:
            pieces.append(torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1))
            if rest := -p.numel() % ALIGNED:
                pieces.append(p.new_zeros(rest))
            p.grad = None
        flat = torch.cat(pieces)
        del pieces
        if (ranks := dist.get_world_size()) > 1:
            # Divided first, as in DeepSpeed's stages 1 and 2: sums of many ranks stay small.
            deepspeed.comm.all_reduce(flat.mul_(1 / ranks))
        return flat


def order_streams(zero: Any) -> None:
    """Let the end of backward in stages 1 and 2 order streams where DeepSpeed stops the host.

    With overlap_comm gradients are reduced on a stream of its own, and it waits for the device
    before it frees what that stream reads. The compute stream, whose memory it is, can wait.
    """
    epilogue = zero.independent_gradient_partition_epilogue

    def ordered() -> None:
        accelerator: Any = get_accelerator()
        compute = accelerator.current_stream()
        accelerator.synchronize = lambda: compute.wait_stream(zero.reduction_stream)
        try:
            epilogue()
        finally:
            del accelerator.synchronize  # the class's own is back

    if zero.overlap_comm and zero.reduction_stream is not None:
        zero.independent_gradient_partition_epilogue = ordered


def unsharded_step(flat: FlatWeights, optimizer: AdamWEMA) -> None:
    """Update everything on every rank: stage 0."""
    optimizer.update([flat.master], [flat.gradients()], flat.low)


@torch.no_grad()
def sharded_step(zero: Any, optimizer: AdamWEMA) -> None:
    """Stages 1 and 2: each rank updates its partition, then all weights are gathered (collective).

    zero: DeepSpeed's optimiser of these stages, whose averaged gradients are taken.
    """
    zero.micro_step_id = INITIAL_MICRO_STEP_ID
    grads, low = [], []
    for i, whole in enumerate(zero.parallel_partitioned_bit16_groups):
        zero.free_grad_in_param_list(zero.params_not_in_partition[i])
        rank = dist.get_rank(zero.real_dp_process_group[i])
        flat = zero._get_preflattened_grad_partition(i)
        if flat is None:
            flat = zero.flatten_dense_tensors_aligned(
                zero.averaged_gradients[i], int(zero.partition_size[i])
            )
            zero.averaged_gradients[i] = None
        zero.free_grad_in_param_list(zero.params_in_partition[i])
        zero.all_grad_tensors[i] = None
        grads.append(flat)
        low.append(whole[rank])
    optimizer.update(zero.single_partition_of_fp32_groups, grads, low)
    del flat, grads  # before weights are gathered
    zero._release_preflattened_grad_buffers()
    for i in zero.averaged_gradients:  # parameters hold the dictionary too
        zero.averaged_gradients[i] = None
    zero._global_grad_norm = optimizer._global_grad_norm
    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )
