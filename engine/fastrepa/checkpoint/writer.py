"""Saving beside training: a step pays for the copy to host memory, threads do the rest.

Every rank copies its own fragments of all tensors and goes on training, while a thread makes whole
tensors of everybody's (fragments.py), writes, hashes and flushes them. Once all ranks are done,
which they ask one another between steps, the first one writes the manifest, renames the folder and
drops what the policy keeps no longer. Values that are not finite are never given a checkpoint's
name, and what is saved while steps are bad replaces nothing.
"""

from __future__ import annotations

import errno
import os
import re
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
    NotFinite,
    RunState,
    checkpoint_path,
    damage,
    part_name,
    rng_state,
    seal,
    stranger,
    superseded,
)
from fastrepa.checkpoint.fragments import Fragments
from fastrepa.checkpoint.host_tensors import HostTensors, in_background, timed, write_durably
from fastrepa.checkpoint.kinds import WEIGHT, Whole, ema_keys
from fastrepa.config import TrainingConfig
from fastrepa.errors import CheckpointError, FastrepaError, worded
from fastrepa.runtime.files import fsync_folder, process_name, remove, sweep, temporary
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import World

_OLD_PARTIAL = re.compile(r"\.partial_(replaced_)?step_[0-9]{7,}")  # of earlier versions


class CheckpointWriter:
    """Writes a run's checkpoints, at most one at a time; every method is collective.

    `fixed` are the tensors that are not trained, by name. `group` is a gloo group of all ranks.
    A rank holds its share of every kind in host memory for as long as it trains: 12 bytes per
    parameter and 4 for each EMA, over the number of ranks, and what it sends to others (Fragments).
    `seconds` says what the last save cost this rank, by part: copy is what the step waited for,
    save all of it until the folder had its name. `good`: on the first rank, the newest checkpoint
    that has been looked at and whose step was none of the bad ones; at first the one resumed from.
    """

    def __init__(
        self,
        run: Path,
        whole: Whole,
        fixed: Mapping[str, Tensor],
        world: World,
        group: Any,
        policy: TrainingConfig,
        *,
        good: Path | None = None,
    ) -> None:
        self.run, self.whole, self.world, self.group = run, whole, world, group
        self.policy, self.good = policy, good
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
        self._bad_steps = torch.zeros((), pin_memory=pin)
        self._told: set[str] = set()  # checkpoints of which a warning has been said
        if world.is_rank_0:
            self._clear(run / "checkpoints")
        # All write to a folder of the first rank's: none of an earlier process writes there.
        names = [process_name()]
        dist.broadcast_object_list(names, src=0, group=group)
        self._by = names[0]

    @staticmethod
    def _clear(folder: Path) -> None:
        """Remove what killed processes left, also one that had this one's number."""
        sweep(folder)
        left = [p for p in folder.glob(".partial_*") if _OLD_PARTIAL.fullmatch(p.name)]
        for path in (*left, *folder.glob(f".*.{process_name()}.tmp")):
            remove(path)

    def save(
        self, state: RunState, bad_steps: Tensor | None = None, *, measured: bool = True
    ) -> None:
        """Copy everything to host memory and start to write it; waits for the save before.

        bad_steps: how many steps in a row were bad, [] on the device; if any, nothing is pruned.
        measured: the state's metrics are all that there will be, so that one which is not among
        them is unknown.
        """
        self.wait()
        self._measured = measured
        began = time.perf_counter()
        self._state, self._final = state, checkpoint_path(self.run, state.step)
        self._partial = temporary(self._final, self._by)
        self._fragments.copy(self._host)
        self._bad_steps.fill_(0) if bad_steps is None else self._bad_steps.copy_(
            bad_steps, non_blocking=True
        )
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
        except NotFinite as e:
            mine = f"not saved, as {e}"
        except Exception as e:
            known = isinstance(e, OSError | FastrepaError)
            mine = f"cannot be written ({'' if known else f'{type(e).__name__}: '}{e})"
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
            remove(self._partial)
        if required:
            last = f"; the last good one is {self.good.name}" if self.good else ""
            raise CheckpointError(f"{self._final}: {problem}; earlier ones are intact{last}")
        counts = f"{self.good.name} still counts" if self.good else "there is none before it"
        self._warn(f"{self._final}: {problem}; training goes on, and {counts}")

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
        for kind, host in self._host.items():
            if name := host.not_finite():
                raise NotFinite(f"{kind} {name} is not finite")
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
        replaced = self._put_aside() if os.path.lexists(self._final) else None
        self._partial.rename(self._final)
        fsync_folder(self._final.parent)
        ended = time.perf_counter()
        self.seconds |= {"finish": ended - began, "save": ended - self._began}
        if replaced is not None:
            remove(replaced)
        if not self._bad_steps:
            self.good = self._final
            self._prune()

    def _put_aside(self) -> Path | None:
        """Free the name of a checkpoint of a future that a resume undid; return what may go."""
        if (reason := stranger(self._final)) is None:
            replaced = temporary(self._final.with_name(f"replaced_{self._final.name}"))
            self._final.rename(replaced)
            return replaced
        number = 1
        while os.path.lexists(kept := self._final.with_name(f"{self._final.name}.{number}")):
            number += 1
        self._final.rename(kept)
        self._warn(f"{self._final}: in the way of a checkpoint, is now {kept.name} ({reason})")
        return None

    def _prune(self) -> None:
        """Drop what the policy keeps no longer, once the new one has been read back."""
        try:
            rule, known = self.policy.keep_best, self._state.metrics
            if rule and known and rule.metric not in known and self._measured:
                self._warn(
                    f"training.keep_best.metric: no metric {rule.metric!r} is logged "
                    f"(known: {', '.join(sorted(known))}), so none is kept as the best"
                )
            old = superseded(self.run, self._final, self.policy)
            problem = damage(self._final) if old else None
        except (OSError, CheckpointError) as e:  # the save itself is done
            self._warn(f"{self.run / 'checkpoints'}: old checkpoints stay ({worded(e)})")
            return
        if problem:
            self._warn(f"{self._final} reads back damaged ({problem}); earlier ones are kept")
            return
        for path in old:
            try:
                reason = stranger(path)
                if reason is None:
                    _remove_whole(path)
            except OSError as e:
                reason = worded(e)
            if reason and path.name not in self._told:
                self._told.add(path.name)
                self._warn(f"{path}: an old checkpoint, not removed ({reason})")


def _remove_whole(path: Path) -> None:
    """Remove a checkpoint so that whoever reads it, or is killed, never sees a part. OSError."""
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    gone = temporary(path.with_name(f"pruned_{path.name}"))
    path.rename(gone)
    shutil.rmtree(gone)


def _nothing() -> None:
    pass
