"""This process among its peers: the ranks that torchrun, deepspeed or srun started together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from fastrepa.errors import ConfigError, FastrepaError

T = TypeVar("T")
_destroy: Callable[[], None] = dist.destroy_process_group


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
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=timeout_seconds),
            # A world of one has no peer that a device would have to be bound for.
            device_id=device if device.type == "cuda" and size > 1 else None,
        )
    return World(rank, size, local_rank, device)


def join_or_alone(device: torch.device | None = None) -> World:
    """Join torchrun's ranks where there are several; a process alone has no process group.

    device: of a process alone; by default the GPU where there is one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return join_world()
    return World(0, 1, 0, device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))


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
    """Return to all what `work` gives on rank 0; its FastrepaError is raised on all alike
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
    """End the group of all ranks, where there is one."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            # Gloo's threads let go of the last collective's tensors; later, while Python is taken
            # down, that would abort the process (pytorch #190489).
            time.sleep(0.1)
        _destroy()


def leave_by(destroy: Callable[[], None]) -> None:
    """End the group through `destroy`: a library that keeps references to it has its own way."""
    global _destroy
    _destroy = destroy


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
