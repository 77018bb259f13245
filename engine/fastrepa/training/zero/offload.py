"""Optimiser states outside the GPU: DeepSpeed's ZeRO-Offload (host memory), ZeRO-Infinity (NVMe).

The masters, Adam's moments and the EMA stay where they are and the host's cores update them, by the
same AdamWEMA; only gradients and updated weights cross over. On NVMe they are in host memory one
sub-group at a time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrepa.config import ZeroConfig
from fastrepa.errors import ConfigError, worded
from fastrepa.runtime.files import HOST, cut, remove, temporary
from fastrepa.runtime.ownership import InUse, take

_SWAPPED = re.compile(r".*\.[0-9a-f]{8}\.[0-9]+@(?P<host>[\w.-]+)\.[0-9a-f]{8}\.swap", re.DOTALL)
_BEING_MADE, _ABANDONED = 60.0, 86400.0  # seconds without a change
_taken: set[Path] = set()  # for as long as this process lives


def offload_settings(zero: ZeroConfig, run: str, states: int) -> dict[str, Any]:
    """DeepSpeed's `offload_optimizer` and `offload_param`; states: tensors kept beside a weight."""
    if not zero.offloads:
        return {}
    pin = torch.cuda.is_available()  # there is nothing to copy to otherwise
    optimizer: dict[str, Any] = {"device": zero.offload, "pin_memory": pin}
    if zero.swaps:
        # A buffer for each state, the weight and its gradient.
        optimizer |= {"nvme_path": str(swap_folder(zero, run)), "buffer_count": states + 2}
    out: dict[str, Any] = {"offload_optimizer": optimizer}
    if zero.offload_parameters:
        out["offload_param"] = {"device": "cpu", "pin_memory": pin}
    return out


def swap_folder(zero: ZeroConfig, run: str) -> Path:
    """This process's own part of zero.nvme_path for a run, by where its folder is now.

    Nothing in it is needed once the process has ended; a later one removes it.
    """
    assert zero.nvme_path  # checked wherever `swaps` is true
    where = os.path.realpath(run)
    key = hashlib.sha256(os.fsencode(where)).hexdigest()[:8]
    process = f"{os.getpid()}@{HOST}.{_token(os.getpid())}"
    return Path(zero.nvme_path) / f"{cut(os.path.basename(where))}.{key}.{process}.swap"


@functools.cache
def _token(pid: int) -> str:
    """Tells processes apart that have one number in two containers."""
    return secrets.token_hex(4)


def check_offload(zero: ZeroConfig, run: str) -> None:
    """Raise ConfigError, before anything is built, where `zero.offload: nvme` cannot work here.
    Otherwise the swap folder is there and held, and those of processes that are no more are gone.

    DeepSpeed's async_io op is compiled at its first use, which takes minutes, once.
    """
    if not zero.swaps:
        return
    folder = swap_folder(zero, run)
    probe = temporary(folder.parent / "writable")
    with _writable(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x" * 4096)
        finally:
            remove(probe)
    _check_async_io()
    if folder not in _taken:
        with _writable(folder):
            sweep_swapped(folder.parent)
            take(folder, "fastrepa train")
        _taken.add(folder)


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ConfigError(f"zero.nvme_path: {folder} is not writable ({worded(e)})") from None


def sweep_swapped(nvme: Path) -> None:
    """Remove the swap folders in zero.nvme_path that processes left which are no more."""
    for path in nvme.glob("*.swap"):
        by = _SWAPPED.fullmatch(path.name)
        if by is None or path.is_symlink():
            continue
        with contextlib.suppress(OSError, InUse):
            # Another host's lock may not be seen here, but it writes at every step.
            here = by["host"] == HOST
            changed = [p.stat().st_mtime for p in (path, *([] if here else path.rglob("*")))]
            if time.time() - max(changed) > (_BEING_MADE if here else _ABANDONED):
                release = take(path, "fastrepa train")
                remove(path)
                release()


def _check_async_io() -> None:
    missing = [program for program in ("c++", "ninja") if shutil.which(program) is None]
    if missing:
        raise ConfigError(
            f"zero.offload: 'nvme' needs DeepSpeed's async_io op, and {' and '.join(missing)} to "
            "compile it, not found; or use zero.offload=cpu"
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if not _links_libaio(builder):
            raise ConfigError(
                "zero.offload: 'nvme' needs DeepSpeed's async_io op, and that needs libaio's "
                "header and library, not found: install libaio-dev (Debian) or libaio-devel "
                "(Fedora), or name their folders in CFLAGS and LDFLAGS; or use zero.offload=cpu"
            )
        try:
            builder.load(verbose=False)
        except Exception as e:
            reason = " ".join(str(e).split())[-300:]
            raise ConfigError(
                f"zero.offload: 'nvme' needs DeepSpeed's async_io op, which does not build: "
                f"{reason}"
            ) from None


def _links_libaio(builder: Any) -> bool:
    """DeepSpeed links a call of it to find out; the linker's own words go nowhere."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            return bool(builder.is_compatible(verbose=False))
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class SwappedStates:
    """Whole tensors of stage 3 whose masters and states are on NVMe.

    DeepSpeed's own access reads a whole sub-group for each tensor. This holds the last one in
    memory until another is wanted, and writes it back where it was changed. `release` gives the
    buffers back before the next step. Collective, as WholeTensors is.
    """

    def __init__(self, zero: Any, optimizer: Any) -> None:
        self.zero, self.optimizer = zero, optimizer
        self._held: int | None = None
        self._changed = False

    def prepare(self) -> None:
        """Create the states of every sub-group, each while its masters are in memory."""
        for group, master in enumerate(self.zero.fp32_partitioned_groups_flat):
            with self._group(group, change=True):
                self.optimizer.prepare(master)
        self.release()

    def get(self, p: Tensor, kind: str | None) -> Tensor:
        """Return the whole state `kind` [...] of a parameter, None: its master; float32."""
        whole: Tensor = self.zero._fp32_state_allgather(p, self.local(p, kind).to(p.device))
        return whole

    def local(self, p: Tensor, kind: str | None) -> Tensor:
        """Return this rank's slice [n], padded, until the next call or `release`; no collective."""
        group, part = self._part(p)
        with self._group(group, change=False):
            return self._tensor(group, kind).narrow(0, *part)

    def set(self, p: Tensor, kind: str | None, value: Tensor) -> None:
        group, (start, size) = self._part(p)
        with self._group(group, change=True):
            mine = torch.zeros(size)
            first = size * self.zero._get_param_partition_rank(p)
            flat = value.flatten()[first : first + size]  # the last rank's ends in padding
            mine[: flat.numel()] = flat
            self._tensor(group, kind).narrow(0, start, size).copy_(mine)

    def release(self) -> None:
        if self._held is None:
            return
        group, self._held = self._held, None
        if self.zero._swappable_optimizer_subgroup(group):
            if self._changed:
                self.zero._optimizer_states_and_gradient_swap_out(group)
            else:
                self.zero._release_swap_buffers(group)
        self._changed = False

    @contextlib.contextmanager
    def _group(self, group: int, *, change: bool) -> Iterator[None]:
        if self._held != group:
            self.release()
            if self.zero._swappable_optimizer_subgroup(group):
                self.zero._optimizer_states_and_gradient_swap_in(group)
            self._held = group
        self._changed |= change
        yield

    def _part(self, p: Tensor) -> tuple[int, tuple[int, int]]:
        group, start, size = self.zero.grad_position[self.zero.get_param_id(p)]
        return group, (start, size)

    def _tensor(self, group: int, kind: str | None) -> Tensor:
        master: Tensor = self.zero.fp32_partitioned_groups_flat[group]
        return (master if kind is None else self.optimizer.state[master][kind]).detach()
