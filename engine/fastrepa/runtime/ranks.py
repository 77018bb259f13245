"""The ranks of `torchrun` that prepare a set together. A single process never imports torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from fastrepa.errors import ConfigError, DataError

_PATIENCE = timedelta(days=30)  # ranks with fewer images wait for those with more


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, and how they wait for each other."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = field(default=lambda: None)
    wait_while: Callable[[Callable[[], None]], None] = field(default=lambda tick: None)
    """Like `wait`, calling `tick` now and then."""
    share: Callable[[Any], Any] = field(default=lambda value: value)
    """The first rank's value, in every rank (collective); it is pickled."""

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
    import torch
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @contextmanager
    def together() -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # gloo's, when a peer closes its connection
            raise DataError("another rank stopped; its own message says why") from None

    def wait(tick: Callable[[], None] | None = None) -> None:
        with together():
            work = dist.barrier(group=group, async_op=True)
            assert work is not None
            while tick is not None and not work.is_completed():
                tick()
                time.sleep(0.1)
            work.wait()

    def share(value: Any) -> Any:
        box = [value]
        with together():
            dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
        return box[0]

    yield Ranks(int(rank), size, wait, wait, share)
    # After an error the process ends, and the group with it.
    if ours:
        dist.destroy_process_group()
