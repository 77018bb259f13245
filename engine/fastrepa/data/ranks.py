"""The ranks of `torchrun` that prepare a set together. A single process never imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from fastrepa.errors import ConfigError, DataError

_PATIENCE = timedelta(days=30)  # ranks with fewer images wait for those with more


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, and how they wait for each other."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = field(default=lambda: None)

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks of RANK and WORLD_SIZE in a gloo group; outside torchrun, this process alone.

    A rank that fails leaves; `wait` then raises DataError in the others instead of hanging.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK")
    if size <= 1:
        yield Ranks()
        return
    if rank is None:
        raise ConfigError(f"WORLD_SIZE is {size}, but RANK is not set; start it with torchrun")
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def wait() -> None:
        try:
            dist.barrier(group=group)
        except RuntimeError:  # gloo's, when a peer closes its connection
            raise DataError("another rank stopped; its own message says why") from None

    yield Ranks(int(rank), size, wait)
    # After an error the process ends, and the group with it.
    if ours:
        dist.destroy_process_group()
