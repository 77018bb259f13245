"""This process among its peers: the ranks that torchrun, deepspeed or srun started together.

Torch is imported where ranks meet: one process that prepares a set does without it.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastrepa.errors import ConfigError, DataError, FastrepaError, print_warning, shown, worded

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_LAUNCH = "start it with torchrun, which sets it, or unset them all"
_PATIENCE = timedelta(days=30)  # ranks with fewer images wait for those with more
_QUIET, _NAMELESS = 10.0, 60.0  # seconds to wait without a word, and for a host's name
_INTERFACE = "GLOO_SOCKET_IFNAME"
_on_loopback = False  # whether that is set by us
_destroy: Callable[[], None] | None = None


@dataclass(frozen=True)
class World:
    """This process among its peers; without arguments, a process alone.

    chosen_device: what `device` is, where it is not left to it. group: the process group of all
    peers; None: torch's default group. local_rank, local_size: among the ranks of this host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    chosen_device: torch.device | None = None
    group: Any = None
    local_size: int = 1

    @property
    def is_rank_0(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this rank's tensors: by default its GPU, or the CPU where there is none."""
        import torch

        if self.chosen_device is not None:
            return self.chosen_device
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank)

    def wait(self, tick: Callable[[], None] | None = None) -> None:
        """Return when every rank has come this far; `tick` is called now and then (collective)."""
        if self.size == 1:
            return
        import torch.distributed as dist

        with self._complete():
            work = dist.barrier(group=self.group, async_op=True)
            assert work is not None
            while tick is not None and not work.is_completed():
                tick()
                time.sleep(0.1)
            work.wait()

    @contextmanager
    def _complete(self) -> Iterator[None]:
        """Raise DataError where a peer leaves a patient world; the watch over a run that lost one
        wants torch's own error.
        """
        try:
            yield
        except RuntimeError:  # gloo's, when a peer closes its connection
            if self.group is None:
                raise
            raise DataError("another rank stopped; its own message says why") from None


def launched_world() -> World:
    """The world as the launcher's environment variables have it, joined or not.

    Raises ConfigError where one of them is no number, or contradicts another one.
    """

    def number(name: str, default: int) -> int:
        text = os.environ.get(name) or str(default)
        if not re.fullmatch("[0-9]{1,9}", text):
            raise ConfigError(f"{name}: {shown(text)} in the environment is no number of ranks")
        return int(text)

    world = World(
        rank=number("RANK", 0),
        size=number("WORLD_SIZE", 1),
        local_rank=number("LOCAL_RANK", 0),
        local_size=number("LOCAL_WORLD_SIZE", 1),
    )
    if world.rank and not os.environ.get("WORLD_SIZE"):
        raise ConfigError(f"RANK is {world.rank}, but WORLD_SIZE is not set; {_LAUNCH}")
    if world.rank >= world.size:
        raise ConfigError(f"RANK: {world.rank} is none of the {world.size} ranks of WORLD_SIZE")
    return world


def stated_rank() -> int:
    """This process's rank; 0 where its launcher's variables are wrong, as an error may say."""
    try:
        return launched_world().rank
    except ConfigError:
        return 0


def _check_meeting(world: World) -> None:
    """Refuse a world of several ranks that do not know who they are or where they meet: joining
    it would wait for ever.
    """
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world.size > 1 and not os.environ.get(name):
            raise ConfigError(f"WORLD_SIZE is {world.size}, but {name} is not set; {_LAUNCH}")
    port = os.environ.get("MASTER_PORT") or "1"
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise ConfigError(f"MASTER_PORT: {shown(port)} in the environment is no port")


def init_world(timeout_seconds: float = 1800.0) -> World:
    """The world of torchrun, deepspeed or srun by their environment variables, or a world of one.

    A collective that takes longer than the timeout is an error.

    Raises ConfigError where ranks were not told where to meet, or have no GPU among the host's.
    """
    import torch
    import torch.distributed as dist

    env = os.environ
    _take_over_slurm(env)
    world = launched_world()
    _check_meeting(world)
    if torch.cuda.is_available():
        if world.local_rank >= (there := torch.cuda.device_count()):
            raise ConfigError(f"LOCAL_RANK: {world.local_rank}, but this host shows {there} GPUs")
        torch.cuda.set_device(world.local_rank)
    world = replace(world, chosen_device=world.device)
    on_gpu = world.device.type == "cuda"
    if not dist.is_initialized():
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        env.update({key: value for key, value in alone.items() if not env.get(key)})
        # A world of one has no peer that a device would have to be bound for.
        device = world.device if on_gpu and world.size > 1 else None
        _join(world, "nccl" if on_gpu else "gloo", timedelta(seconds=timeout_seconds), device)
    return world


def _join(
    world: World, backend: str, timeout: timedelta, device: torch.device | None = None
) -> None:
    """Begin the process group of all ranks where they meet (collective)."""
    import torch.distributed as dist

    store = _meeting(world, timeout.total_seconds())
    _listen_where_they_meet(world, store)
    dist.init_process_group(
        backend,
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device,
    )


def _meeting(world: World, timeout_seconds: float) -> Any:
    """Return the store of a process group, on which all ranks have been seen.

    A rank that waits for others says so, once. Raises ConfigError where they cannot meet.
    """
    import torch.distributed as dist

    if world.size == 1:
        return dist.HashStore()  # nobody comes, so nothing listens
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    told = threading.Timer(_QUIET, _say_waiting, (where, world))
    told.daemon = True
    told.start()
    try:
        _await_name(os.environ["MASTER_ADDR"])
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own, which waits
            timeout = timedelta(seconds=timeout_seconds)
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
            return store
        store = _master_store(world, timeout_seconds)
        if store.add(f"fastrepa/{world.rank}", 1) > 1:
            raise ConfigError(f"RANK: another process at {where} is rank {world.rank} too")
        waits = time.monotonic() + timeout_seconds
        names = [f"fastrepa/{rank}" for rank in range(world.size)]
        while not store.check(names):
            if time.monotonic() > waits:
                missing = [r for r, name in enumerate(names) if not store.check([name])]
                raise ConfigError(
                    f"{where}: {len(missing)} of {world.size} ranks did not come in "
                    f"{timeout_seconds:g} s, the first of them rank {missing[0]}"
                )
            time.sleep(0.1)
        return store
    except (dist.DistError, OSError) as e:
        why = " ".join(str(e).split())[:200]
        raise ConfigError(f"{where}: the ranks cannot meet there ({why})") from None
    finally:
        told.cancel()


def _master_store(world: World, timeout_seconds: float) -> Any:
    """Return torch's store at MASTER_ADDR and MASTER_PORT, which the first rank holds."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not world.is_rank_0:
        _await_first(host, port, timeout_seconds)
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=world.is_rank_0,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds),
            multi_tenant=True,
        )
    except dist.DistNetworkError as e:
        if world.is_rank_0 and "EADDRINUSE" in str(e):
            raise ConfigError(
                f"MASTER_PORT: {port} is taken on this host; choose another"
            ) from None
        raise


def _await_name(host: str) -> None:
    """Wait until a host's name has an address: a cluster's may come after its processes."""
    ends = time.monotonic() + _NAMELESS
    while True:
        try:
            address_of(host)
            return
        except OSError as e:
            if time.monotonic() > ends:
                why = e.strerror or e
                raise ConfigError(f"MASTER_ADDR: {shown(host)} has no address ({why})") from None
            time.sleep(1.0)


def _await_first(host: str, port: int, timeout_seconds: float) -> None:
    """Wait until the first rank listens; torch would print stacks when it has waited in vain."""
    ends = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=10.0).close()
            return
        except OSError as e:
            if time.monotonic() > ends:
                raise ConfigError(
                    f"{host}:{port}: rank 0 did not come in {timeout_seconds:g} s ({worded(e)})"
                ) from None
            time.sleep(0.2)


def _say_waiting(where: str, world: World) -> None:
    print_warning(f"rank {world.rank} waits for the others of {world.size} at {where}")


def address_of(host: str) -> str:
    """The address that a host's name has here; OSError where it has none."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return str(found[0][4][0])


def _listen_where_they_meet(world: World, store: Any) -> None:
    """Keep gloo, whose every group listens, on the loopback interface where no rank is elsewhere;
    its own choice is the interface of the host's name (collective).
    """
    global _on_loopback
    here = True
    if world.size > 1:  # some operators tell the first rank "localhost", and the others its name
        loopback = re.fullmatch(r"localhost|::1|127\.[0-9.]+", os.environ["MASTER_ADDR"])
        store.set(f"fastrepa/here/{world.rank}", "yes" if loopback else "no")
        told = store.multi_get([f"fastrepa/here/{rank}" for rank in range(world.size)])
        here = all(word == b"yes" for word in told)
    if here and sys.platform == "linux" and not os.environ.get(_INTERFACE):
        os.environ[_INTERFACE] = "lo"  # for the groups that come later, too
        _on_loopback = True


def init_or_alone(device: torch.device | None = None) -> World:
    """Join torchrun's ranks where there are several; a process alone has no process group.

    device: of a process alone; by default the GPU where there is one.
    """
    return init_world() if launched_world().size > 1 else World(chosen_device=device)


@contextmanager
def patient_world() -> Iterator[World]:
    """Join torchrun's ranks in a gloo group that waits for days; outside torchrun, stay alone.

    A rank that fails leaves; the others' collectives then raise DataError instead of hanging.
    """
    world = launched_world()
    if world.size <= 1:
        yield World()
        return
    _check_meeting(world)
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        _join(world, "gloo", _PATIENCE)
    yield replace(world, group=dist.new_group(backend="gloo", timeout=_PATIENCE))
    # After an error the process ends, and the group with it.
    if ours:
        dist.destroy_process_group()


def outside_the_world() -> dict[str, str]:
    """This process's environment for one that it starts and that is no rank of this one's world:
    joining a world, of one even, leaves the launcher's variables behind.
    """
    left = (*LAUNCHER_VARIABLES, *[_INTERFACE] * _on_loopback)
    return {key: value for key, value in os.environ.items() if key not in left}


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
    if re.fullmatch("[0-9]+", on_node := env.get("SLURM_NTASKS_PER_NODE", "")):
        env["LOCAL_WORLD_SIZE"] = on_node


def of_rank_0(world: World, work: Callable[[], T]) -> T:
    """Return to all what `work` gives on rank 0, pickled; its FastrepaError is raised on all alike
    (collective).
    """
    answer: list[Any] = [None]
    if world.is_rank_0:
        try:
            answer[0] = work()
        except FastrepaError as e:
            answer[0] = e
    if world.size > 1:
        import torch.distributed as dist

        with world._complete():
            dist.broadcast_object_list(answer, src=0, group=world.group)
    if isinstance(answer[0], FastrepaError):
        raise answer[0]
    return cast(T, answer[0])


def on_all(world: World, work: Callable[[], T]) -> T:
    """Return what `work` gives here; the first rank's FastrepaError is raised on all (collective).

    `work` must not be collective, unless its errors are everybody's.
    """
    given: T | None = None
    error: FastrepaError | None = None
    try:
        given = work()
    except FastrepaError as e:
        error = e
    errors: list[Any] = [error]
    if world.size > 1:
        import torch.distributed as dist

        errors = [None] * world.size
        with world._complete():
            dist.all_gather_object(errors, error, group=world.group)
    for first in filter(None, errors):
        raise first
    return cast(T, given)


def destroy_world() -> None:
    """End the group of all ranks, where there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        if dist.get_world_size() > 1:
            # Gloo's threads let go of the last collective's tensors; later, while Python is taken
            # down, that would abort the process (pytorch #190489).
            time.sleep(0.1)
        (_destroy or dist.destroy_process_group)()


def destroy_by(destroy: Callable[[], None]) -> None:
    """End the group through `destroy`: a library that keeps references to it has its own way."""
    global _destroy
    _destroy = destroy
