"""Saving beside training: a step pays for the copy to host memory, threads do the rest.

Every rank copies its own fragments of all tensors and goes on training, while a thread makes whole
tensors of everybody's (fragments.py), writes, hashes and flushes them. Once all ranks are done,
which they ask one another between steps, the first one writes the manifest, renames the folder and
drops what the policy keeps no longer.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from fastrepa.checkpoint.format import (
    RunState,
    checkpoint_path,
    checkpoints,
    damage,
    part_name,
    rng_state,
    seal,
    superseded,
)
from fastrepa.checkpoint.fragments import Fragments
from fastrepa.checkpoint.host_tensors import HostTensors, in_background, timed, write_durably
from fastrepa.checkpoint.kinds import WEIGHT, Whole, ema_keys
from fastrepa.config import TrainingConfig
from fastrepa.errors import CheckpointError
from fastrepa.runtime.files import fsync_folder
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import World

PARTIAL = ".partial_"


class CheckpointWriter:
    """Writes a run's checkpoints, at most one at a time; every method is collective.

    `fixed` are the tensors that are not trained, by name. `group` is a gloo group of all ranks.
    A rank holds its share of every kind in host memory for as long as it trains: 12 bytes per
    parameter and 4 for each EMA, over the number of ranks, and what it sends to others (Fragments).
    `seconds` says what the last save cost this rank, by part: copy is what the step waited for,
    save all of it until the folder had its name.
    """

    def __init__(
        self,
        run: Path,
        whole: Whole,
        fixed: Mapping[str, Tensor],
        world: World,
        group: Any,
        policy: TrainingConfig,
    ) -> None:
        self.run, self.whole, self.world, self.group = run, whole, world, group
        self.policy = policy
        self.seconds: dict[str, float] = {}
        shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in whole.params.items()}
        self._fragments = Fragments(whole, shapes, world, group)
        mine = self._fragments.mine
        pin = world.device.type == "cuda"
        self._host: dict[str, HostTensors] = {}
        averaged = (WEIGHT, *ema_keys(whole.emas))
        for kind in whole.kinds:
            others = fixed if kind in averaged and world.is_rank_0 else {}
            held = {n: tuple(t.shape) for n, t in others.items()} | {n: shapes[n] for n in mine}
            self._host[kind] = HostTensors(held, pin=pin)
            for name, value in others.items():
                self._host[kind].put(name, value)
        self._thread: Future[Any] | None = None  # what this rank does for the save in flight
        self._asked: tuple[Tensor, Any] | None = None  # whether all are done, being asked
        self._parts: list[dict[str, Any]] | None = None  # every rank's digests, once all wrote
        if world.is_rank_0:
            for left in (run / "checkpoints").glob(f"{PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier(group=group)

    def save(self, state: RunState) -> None:
        """Copy everything to host memory and start to write it; waits for the save before."""
        self.wait()
        began = time.perf_counter()
        self._state, self._final = state, checkpoint_path(self.run, state.step)
        self._partial = self._final.with_name(PARTIAL + self._final.name)
        self._fragments.copy(self._host)
        copied = None
        if self.world.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self.seconds = {"copy": time.perf_counter() - began}
        self._began, self._parts = began, None
        self._thread = in_background(partial(self._write, copied, rng_state(self.world)))

    def poll(self) -> None:
        """Finish the save in flight where every rank has written its part; called once a step.

        Never waits for a disk. A save that failed is a warning: the run goes on, and what was
        saved before stays.
        """
        if self._thread is None:
            return
        if self._asked is None:
            self._ask()
        elif self._all_are_done():
            self._next_stage(required=False)

    def wait(self, *, required: bool = False) -> None:
        """Wait for the save in flight. A failed one is a warning, or where it is `required`, as
        the last one of a run is, CheckpointError on every rank.
        """
        while self._thread is not None:
            if self._asked is None:
                wait([self._thread], timeout=1.0)  # short: no collective outlives its time limit
                self._ask()
            if self._all_are_done():
                self._next_stage(required)

    def _ask(self) -> None:
        assert self._thread is not None
        flag = torch.tensor([int(self._thread.done())])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group, async_op=True)
        self._asked = (flag, work)

    def _all_are_done(self) -> bool:
        assert self._asked is not None
        flag, work = self._asked
        work.wait()
        self._asked = None
        return bool(flag)

    def _next_stage(self, required: bool) -> None:
        """Let the first rank finish once all have written, and say so once it has."""
        assert self._thread is not None
        mine: Any
        try:
            mine = self._thread.result()
        except Exception as e:
            mine = f"{type(e).__name__}: {e}" if not isinstance(e, OSError) else str(e)
        answers: list[Any] = [None] * self.world.size
        dist.all_gather_object(answers, mine, group=self.group)
        problem = next((a for a in answers if isinstance(a, str)), None)
        if problem is None and self._parts is None:
            self._parts = answers
            work = self._finish if self.world.is_rank_0 else _nothing
            self._thread = in_background(work)
            return
        self._thread = None
        if problem is not None:
            self._give_up(problem, required)

    def _give_up(self, problem: str, required: bool) -> None:
        if self.world.is_rank_0:
            shutil.rmtree(self._partial, ignore_errors=True)
        if required:
            raise CheckpointError(
                f"{self._final}: cannot be written ({problem}); earlier ones are intact"
            )
        earlier = checkpoints(self.run)
        counts = f"{earlier[-1].name} still counts" if earlier else "there is none before it"
        self._warn(f"{self._final}: cannot be written ({problem}); training goes on, and {counts}")

    def _warn(self, text: str) -> None:
        if self.world.is_rank_0:
            say(f"warning: {text}")

    # In the thread ----------------------------------------------------------------------------

    def _write(self, copied: Any, rng: dict[str, Tensor]) -> dict[str, Any]:
        """Write this rank's files; return their digests by name."""
        if copied is not None:
            copied.synchronize()
        with timed(self.seconds, "exchange"):
            self._fragments.exchange(self._host)
        self._partial.mkdir(parents=True, exist_ok=True)
        rank, size = self.world.rank, self.world.size
        digests = {}
        for kind, host in self._host.items():
            name = part_name(kind, rank, size)
            digests[name] = write_durably(self._partial / name, host.file_chunks(), self.seconds)
        name = f"rng_rank_{rank:05d}.safetensors"
        digests[name] = write_durably(self._partial / name, [safetensors.torch.save(rng)])
        return digests

    def _finish(self) -> None:
        began = time.perf_counter()
        assert self._parts is not None
        files = {name: digest for part in self._parts for name, digest in part.items()}
        seal(self._partial, files, self._state)
        replaced = None
        if self._final.exists():  # of a future that a resume undid
            replaced = self._final.with_name(f"{PARTIAL}replaced_{self._final.name}")
            self._final.rename(replaced)
        self._partial.rename(self._final)
        fsync_folder(self._final.parent)
        ended = time.perf_counter()
        self.seconds |= {"finish": ended - began, "save": ended - self._began}
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        """Drop what the policy keeps no longer, once the new one has been read back."""
        try:
            rule, known = self.policy.keep_best, self._state.metrics
            if rule and known and rule.metric not in known:
                self._warn(
                    f"training.keep_best.metric: no metric {rule.metric!r} is logged "
                    f"(known: {', '.join(sorted(known))}), so none is kept as the best"
                )
            old = superseded(self.run, self._final, self.policy)
            problem = damage(self._final) if old else None
            if problem:
                self._warn(f"{self._final} reads back damaged ({problem}); earlier ones are kept")
                return
            for path in old:
                shutil.rmtree(path)
        except (OSError, CheckpointError) as e:  # the save itself is done
            self._warn(f"{self.run / 'checkpoints'}: an old checkpoint stays ({e})")


def _nothing() -> None:
    pass
