"""DeepSpeed: the world, the engine's dictionary, and whole tensors in and out. The step of stages 0
to 2 is step.py's, its collectives are collectives.py's, its files those of
commands/convert/zero_format.py.

A parameter's whole float32 weight and optimiser states can be read and written under every ZeRO
stage through `WholeTensors`; checkpoints are made of nothing else.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is first imported
    # It would warn that no CUDA runtime is there, which the run's first line says better.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

import deepspeed
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

from fastrepa.config import Config
from fastrepa.errors import ConfigError, FastrepaError
from fastrepa.training.optimizer import EMA, MOMENTS, AdamWEMA
from fastrepa.training.zero.offload import SwappedStates, offload_settings
from fastrepa.training.zero.settings import resolve_zero, trained_elements
from fastrepa.training.zero.step import FlatWeights, order_streams, sharded_step, unsharded_step

WEIGHT = "weight"
KINDS = (WEIGHT, *MOMENTS, EMA)  # of every run; WholeTensors.kinds has those of one

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def join_world(timeout_seconds: float = 1800.0) -> World:
    """The world of torchrun, deepspeed or srun by their environment variables, or a world of one.

    A collective that takes longer than the timeout is an error.

    Raises ConfigError where srun's tasks were not told where to meet.
    """
    deepspeed_logger.setLevel(logging.ERROR)
    env = os.environ
    _take_over_slurm(env)
    size = int(env.get("WORLD_SIZE", "1"))
    rank, local_rank = int(env.get("RANK", "0")), int(env.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()) if "MASTER_PORT" not in env else env["MASTER_PORT"],
        }
        for key, value in alone.items():
            env.setdefault(key, value)
        backend = "nccl" if device.type == "cuda" else "gloo"
        # None of its own operations: to ask which ones could be compiled starts compilers, and one
        # that could, an all-reduce of inference that nothing calls, costs minutes of C++.
        deepspeed.ops.__compatible_ops__ = {}
        with _without_chatter():
            deepspeed.init_distributed(
                dist_backend=backend,
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timedelta(seconds=timeout_seconds),
            )
    return World(rank, size, local_rank, device)


def _take_over_slurm(env: MutableMapping[str, str]) -> None:
    """Say what srun says by torchrun's names. A batch script itself is not a task of a step."""
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    if "RANK" in env or "SLURM_STEP_ID" not in env or tasks == "1":
        return
    missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in env]
    if missing:
        raise ConfigError(
            f"{missing[0]}: not set, and srun started {tasks} tasks; export it in the batch script "
            "as configs/cluster/slurm.sbatch does"
        )
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
    env.update({ours: env[theirs] for ours, theirs in names.items()}, WORLD_SIZE=tasks)
    if env.get("SLURM_NTASKS_PER_NODE", "").isdigit():
        env["LOCAL_WORLD_SIZE"] = env["SLURM_NTASKS_PER_NODE"]


def of_first_rank(world: World, work: Callable[[], T]) -> T:
    """What `work` gives on the first rank, given to all; its FastrepaError is raised on all alike
    (collective).
    """
    answer: list[Any] = [None]
    if world.is_first:
        try:
            answer[0] = work()
        except FastrepaError as e:
            answer[0] = e
    if world.size > 1:
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], FastrepaError):
        raise answer[0]
    return cast(T, answer[0])


def leave_world() -> None:
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            # Gloo's threads let go of the last collective's tensors; later, while Python is taken
            # down, that would abort the process (pytorch #190489).
            time.sleep(0.1)
        deepspeed.comm.destroy_process_group()


def micro_batch(config: Config, world_size: int) -> tuple[int, int]:
    """(images per rank per forward, forwards per step) for the global batch.

    Raises ConfigError where the batch does not divide.
    """
    t = config.training
    if t.global_batch % world_size:
        raise ConfigError(
            f"training.global_batch: {t.global_batch} is not divisible by {world_size} ranks"
        )
    per_rank = t.global_batch // world_size
    micro = t.micro_batch or per_rank
    if per_rank % micro:
        raise ConfigError(
            f"training.micro_batch: {micro} does not divide the {per_rank} images of each rank "
            f"(training.global_batch {t.global_batch} over {world_size} ranks)"
        )
    return micro, per_rank // micro


def as_run(config: Config, world_size: int) -> Config:
    """The configuration with the ZeRO stage that runs.

    Stages 1 and 2 divide nothing on one rank, where stage 0's step is the shorter. Float32 sums of
    several forwards' bf16 gradients are theirs alone.
    """
    z, (_, forwards) = config.zero, micro_batch(config, world_size)
    if world_size > 1 or z.stage == 3 or z.offload != "none" or _sums_in_fp32(config, forwards):
        return config
    return config.model_copy(update={"zero": z.model_copy(update={"stage": 0})})


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The dictionary DeepSpeed wants, computed from ours, in which `zero` has numbers for auto."""
    config = as_run(config, world_size)
    micro, forwards = micro_batch(config, world_size)
    out: dict[str, Any] = {
        "train_batch_size": config.training.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": forwards,
        # Stage 0's weights are cast by us: DeepSpeed would keep masters of its own for each tensor.
        "bf16": {"enabled": config.training.precision == "bf16" and config.zero.stage > 0},
        "zero_optimization": _zero_optimization(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
        "gradient_clipping": 0.0 if _steps_itself(config, forwards) else config.training.clip,
        # It waits for the device at every forward and step.
        "timers": {"throughput": {"enabled": False}},
    }
    if _sums_in_fp32(config, forwards):
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    return out


def _sums_in_fp32(config: Config, forwards: int) -> bool:
    """Sums of many bf16 gradients lose what each adds."""
    return config.training.precision == "bf16" and config.zero.stage > 0 and forwards > 1


def _steps_itself(config: Config, forwards: int) -> bool:
    """The optimiser's phase is step.py's, with norm and clipping in AdamWEMA."""
    z = config.zero
    if z.stage == 1 and _sums_in_fp32(config, forwards):
        return False
    return z.stage < 3 and z.offload == "none"


def _zero_optimization(config: Config) -> dict[str, Any]:
    z = config.zero
    out: dict[str, Any] = {
        "stage": z.stage,
        "overlap_comm": z.overlap_comm,
        "reduce_bucket_size": z.reduce_bucket_size,
        "allgather_bucket_size": z.allgather_bucket_size,
        "stage3_prefetch_bucket_size": z.prefetch_bucket_size,
        "stage3_param_persistence_threshold": z.param_persistence_threshold,
        "sub_group_size": z.sub_group_size,
        "memory_efficient_linear": False,  # see _parameters_saved
    }
    undecided = [name for name, value in out.items() if value == "auto"]
    if undecided:
        raise ValueError(f"zero.{undecided[0]}: still auto; resolve_zero comes first")
    return out | offload_settings(config, len(MOMENTS) + len(config.training.ema))


def start_engine(model: nn.Module, config: Config, world: World) -> tuple[Any, AdamWEMA]:
    """Wrap the model; returns (DeepSpeed engine, our optimiser inside it)."""
    config = as_run(
        resolve_zero(config, trained_elements(model.parameters()), world.size), world.size
    )
    stage, ours = config.zero.stage, _steps_itself(config, micro_batch(config, world.size)[1])
    trainable: list[Any] = [p for p in model.parameters() if p.requires_grad]
    flat = None
    if stage == 0:
        dtype = config.training.dtype
        for p in model.parameters():
            p.data = p.data.to(world.device, dtype)
        flat = FlatWeights(trainable, dtype, world.device)
        trainable = [flat.master]
    optimizer = AdamWEMA(
        trainable,
        config.training.optimizer,
        emas=config.training.ema,
        max_norm=config.training.clip if ours else None,
        sharded=stage > 0,
        kernels=config.kernels,
    )
    # Broadcast by DeepSpeed from rank 0, so that every rank starts from the same weights.
    with _without_chatter():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, world.size),
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
    """The gradient's global norm before clipping, of the last step taken."""
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
            self._swapped = SwappedStates(self.zero, optimizer)
            self._swapped.prepare()
        else:
            for master in self._all_masters():
                optimizer.prepare(master)
        if self._flat is None and self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    @property
    def kinds(self) -> tuple[str, ...]:
        """weight, exp_avg, exp_avg_sq, ema and the states of further EMAs."""
        return (WEIGHT, *MOMENTS, *self.optimizer.ema_keys)

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
        """The whole tensor of `kind`, one of `kinds`, on the engine's device."""
        p = self.params[name]
        if self._flat is not None:
            return self._unsharded(self._flat, p, kind)
        if self._swapped is not None:
            return self._swapped.get(p, None if kind == WEIGHT else kind)
        if kind == WEIGHT:
            return safe_get_full_fp32_param(p).detach()
        return safe_get_full_optimizer_state(p, kind).detach()

    def local(self, name: str, kind: str) -> tuple[int, Tensor]:
        """This rank's fragment of a tensor: where it begins in the flattened whole, and its float32
        values [n], n = 0 where it has none. Asks no other rank.
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
        """Overwrite the whole tensor of `kind` from `value`, float32, the parameter's shape."""
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

    def let_go(self) -> None:
        """After the last get, local or set and before the next step: what came from NVMe goes."""
        if self._swapped is not None:
            self._swapped.let_go()

    def _device(self) -> torch.device:
        return next(self._all_masters()).device

    @property
    def optimizer_step(self) -> int:
        """How many updates the optimiser has really taken."""
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


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
