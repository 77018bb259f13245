"""DeepSpeed: the engine, and whole tensors in and out of it. Its dictionary is settings.py's, the
step of stages 0 to 2 step.py's, its collectives are collectives.py's.

A parameter's whole float32 weight and optimiser states can be read and written under every ZeRO
stage through `WholeTensors`; checkpoints are made of nothing else.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import (
    logger as deepspeed_logger,
)
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional

from fastrepa.checkpoint.kinds import MOMENTS, WEIGHT
from fastrepa.config import Config, EmaConfig
from fastrepa.runtime.world import World, destroy_by
from fastrepa.training.optimizer import AdamWEMA
from fastrepa.training.zero.settings import (
    as_run,
    deepspeed_config,
    micro_batch,
    resolve_zero,
    steps_itself,
    trained_elements,
)
from fastrepa.training.zero.step import FlatWeights, order_streams, sharded_step, unsharded_step

deepspeed_logger.setLevel(logging.ERROR)


def start_engine(model: nn.Module, config: Config, world: World) -> tuple[Any, AdamWEMA]:
    """Wrap the model; returns (DeepSpeed engine, our optimiser inside it)."""
    training = config.training
    config = resolve_zero(config, trained_elements(model.parameters()), world.size)
    zero = as_run(config.zero, training, world.size)
    stage = zero.stage
    ours = steps_itself(zero, training, micro_batch(training, world.size)[1])
    trainable: list[Any] = [p for p in model.parameters() if p.requires_grad]
    flat = None
    if stage == 0:
        dtype = training.dtype
        for p in model.parameters():
            p.data = p.data.to(world.device, dtype)
        flat = FlatWeights(trainable, dtype, world.device)
        trainable = [flat.master]
    optimizer = AdamWEMA(
        trainable,
        training.optimizer,
        emas=training.ema,
        max_norm=training.clip if ours else None,
        sharded=stage > 0,
        kernels=config.kernels,
    )
    _meet()
    # Broadcast by DeepSpeed from rank 0, so that every rank starts from the same weights.
    with _without_chatter():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(zero, training, config.run, world.size),
            dist_init_required=False,
        )
    if flat is not None:
        flat.master.data.copy_(flat.weights)
        engine.enable_backward_allreduce = False  # unsharded_step does it, of the flat gradient
        optimizer.step = partial(unsharded_step, flat, optimizer)  # type: ignore[method-assign]
    elif ours:
        engine.optimizer.step = partial(sharded_step, engine.optimizer, optimizer)
        order_streams(engine.optimizer)
    else:
        optimizer.engine_norm = lambda: getattr(engine.optimizer, "_global_grad_norm", None)
    engine.flat = flat
    optimizer.state.clear()  # what a wrapper's own dry step may have left
    if stage == 3:
        engine.module.forward = _parameters_saved()(engine.module.forward)
        engine.backward = _parameters_saved()(engine.backward)  # where blocks may run again
    return engine, optimizer


def _meet() -> None:
    """DeepSpeed over the world's group, once in a process."""
    if deepspeed.comm.is_initialized():
        return
    # None of its own operations: to ask which ones could be compiled starts compilers, and one
    # that could, an all-reduce of inference that nothing calls, costs minutes of C++.
    deepspeed.ops.__compatible_ops__ = {}
    with _without_chatter():
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
        )
    destroy_by(deepspeed.comm.destroy_process_group)


@contextlib.contextmanager
def _parameters_saved() -> Iterator[None]:
    """F.linear saves the parameter for backward, which stage 3 gathers again, and not its gathered
    value. DeepSpeed would replace F.linear for the whole process and for good, frozen encoders
    included, and round a half result before it adds the bias.
    """

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = zero3_linear_wrap(input.reshape(-1, input.shape[-1]), weight, bias)
        return rows.view(*input.shape[:-1], rows.shape[-1])

    before, functional.linear = functional.linear, linear
    try:
        yield
    finally:
        functional.linear = before


def grad_norm(engine: Any) -> float | Tensor:
    """Return the gradient's global norm before clipping, of the last step taken: a number or []."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else norm


class WholeTensors:
    """Reads and writes whole float32 tensors of a sharded engine, by parameter name.

    Every method that moves a tensor is collective: all ranks call it, in the same order.
    """

    def __init__(self, engine: Any, optimizer: AdamWEMA) -> None:
        self.optimizer = optimizer
        self.zero = engine.optimizer
        self.stage = engine.zero_optimization_stage()
        self.params = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        self._flat: FlatWeights | None = engine.flat
        self._swapped = None
        if getattr(self.zero, "swap_optimizer", False):
            from fastrepa.training.zero.offload import SwappedStates

            self._swapped = SwappedStates(self.zero, optimizer)
            self._swapped.prepare()
        else:
            for master in self._all_masters():
                optimizer.prepare(master)
        if self._flat is None and self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds: weight, exp_avg, exp_avg_sq, ema and the states of further EMAs."""
        return (WEIGHT, *MOMENTS, *self.optimizer.ema_keys)

    @property
    def emas(self) -> Sequence[EmaConfig]:
        """The moving averages, in the order of their kinds."""
        return self.optimizer.emas

    @property
    def ema_since(self) -> dict[str, int]:
        """Updates taken before an average began, of those that began later."""
        return self.optimizer.ema_since

    def _all_masters(self) -> Iterator[Tensor]:
        if self._flat is not None:
            yield self._flat.master
            return
        for name in (
            "fp32_partitioned_groups_flat",  # stage 3
            "fp32_groups_flat_partition",  # stage 1, bf16 with float32 accumulation
            "single_partition_of_fp32_groups",  # stages 1 and 2
        ):
            if hasattr(self.zero, name):
                yield from getattr(self.zero, name)
                return
        raise RuntimeError(f"unknown ZeRO optimiser {type(self.zero).__name__}")

    def _unsharded(self, flat: FlatWeights, p: Tensor, kind: str) -> Tensor:
        """A view of the parameter's part of stage 0's weights or of one of their states."""
        whole = flat.master if kind == WEIGHT else self.optimizer.state[flat.master][kind]
        return flat.view(whole.detach(), p)

    def get(self, name: str, kind: str) -> Tensor:
        """The whole tensor [...] of `kind`, one of `kinds`, on the engine's device."""
        p = self.params[name]
        if self._flat is not None:
            return self._unsharded(self._flat, p, kind)
        if self._swapped is not None:
            return self._swapped.get(p, None if kind == WEIGHT else kind)
        if kind == WEIGHT:
            return safe_get_full_fp32_param(p).detach()
        return safe_get_full_optimizer_state(p, kind).detach()

    def local(self, name: str, kind: str) -> tuple[int, Tensor]:
        """Return this rank's fragment of a tensor: where it begins in the flattened whole, and its
        float32 values [n], n = 0 where it has none. Asks no other rank.
        """
        p = self.params[name]
        if self._flat is not None:
            return 0, self.get(name, kind).flatten()
        if self.stage < 3:
            part = p._hp_mapping
            if part is None:
                return 0, torch.empty(0)
            values = part.get_hp_fragment(None if kind == WEIGHT else kind)
            return part.lp_fragment_address.start, values.detach()
        if self._swapped is not None:
            values = self._swapped.local(p, None if kind == WEIGHT else kind)
        elif kind == WEIGHT:
            values = safe_get_local_fp32_param(p).detach()
        else:
            values = safe_get_local_optimizer_state(p, kind).detach()
        start = values.numel() * dist.get_rank()
        return start, values[: max(0, p.ds_numel - start)]  # the last slices are padded

    @torch.no_grad()
    def set(self, name: str, kind: str, value: Tensor) -> None:
        """Overwrite the whole tensor of `kind` from `value` [...], of the parameter's shape."""
        p = self.params[name]
        if self._flat is not None:
            self._unsharded(self._flat, p, kind).copy_(value)
            return
        if self._swapped is not None:
            self._swapped.set(p, None if kind == WEIGHT else kind, value.to(torch.float32))
            return
        value = value.to(self._device(), torch.float32)
        if self.stage == 3:
            # DeepSpeed's own setter of whole tensors fails where a size does not divide by the
            # ranks: a slice is set instead, padded as it is kept.
            size = p.ds_tensor.numel()
            mine = value.flatten()[size * dist.get_rank() :][:size]
            mine = torch.nn.functional.pad(mine, (0, size - mine.numel()))
            if kind == WEIGHT:
                safe_set_local_fp32_param(p, mine)
            else:
                safe_set_local_optimizer_state(p, mine, kind)
            return
        if kind == WEIGHT:
            safe_set_full_fp32_param(p, value)
        else:
            safe_set_full_optimizer_state(p, value, kind)

    def release(self) -> None:
        """Free what came from NVMe: after the last get, local or set and before the next step."""
        if self._swapped is not None:
            self._swapped.release()

    def _device(self) -> torch.device:
        return next(self._all_masters()).device

    @property
    def optimizer_step(self) -> int:
        """Updates that the optimiser has really taken."""
        return int(next(self._steps()).item())

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        for step in self._steps():
            step.fill_(value)

    def _steps(self) -> Iterator[Tensor]:
        for master in self._all_masters():
            yield self.optimizer.state[master]["step"]


def _without_chatter() -> contextlib.AbstractContextManager[Any]:
    """DeepSpeed prints its progress as it starts; the run's first line says what came of it."""
    return contextlib.redirect_stdout(io.StringIO())
