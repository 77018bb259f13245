"""Steps whose loss or gradients are not finite: skipped on every rank alike, counted, explained.

A step is bad where any rank's loss, or the gradients' global norm, is NaN or infinite. AdamWEMA (or
DeepSpeed before it) then leaves weights, optimiser states and EMA as they were. All ranks know
alike: the loss flag is all-reduced on the device, the norm is global. The host reads the count only
when the device has it ready, so a healthy run waits for nothing.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrepa.checkpoint.format import newest_checkpoint
from fastrepa.data.pipeline import Batch
from fastrepa.data.reader import RankBatches, SampleOrder
from fastrepa.errors import TrainingError
from fastrepa.runtime.world import World
from fastrepa.training.optimizer import bad_norm

if TYPE_CHECKING:
    from fastrepa.training.trainer import Trainer

NAMED = 5  # parameters and samples that a message names; the file has them all
LINES = 50  # logged losses that a spike is compared with
FEWEST = 10  # of them, before there is a verdict


class BadSteps:
    """Whether the step under way is bad, and how many in a row were."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._loss = torch.zeros((), dtype=torch.bool, device=world.device)
        self._in_row = torch.zeros((), dtype=torch.float32, device=world.device)
        self._host = torch.zeros((), pin_memory=world.device.type == "cuda")
        self._copied: Any = None
        self._seen = 0

    def add(self, loss: Tensor) -> None:
        """A micro-batch's loss, a scalar of this rank."""
        self._loss = self._loss | ~loss.detach().isfinite()

    def agree(self) -> Tensor:
        """Whether any rank's loss of this step is not finite: bool, on the device (collective)."""
        flag = self._loss.float()
        if self.world.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._loss = flag > 0
        return self._loss

    def taken(self, norm: Tensor | float) -> Tensor:
        """The step is over, with this global gradient norm; whether it was skipped, 0 or 1."""
        bad = (self._loss | bad_norm(norm).to(self.world.device)).float()
        self._loss = torch.zeros_like(self._loss)
        self._in_row = (self._in_row + 1) * bad
        if self._copied is None or self._copied.query():
            self._seen = int(self._host)
            self._host.copy_(self._in_row, non_blocking=True)
            if self.world.device.type == "cuda":
                self._copied = torch.cuda.Event()
                self._copied.record()
            else:
                self._seen = int(self._host)
        return bad

    @property
    def seen(self) -> int:
        """Bad steps in a row, as far as the host knows without waiting: a step or two late."""
        return self._seen

    def in_row(self) -> int:
        """Bad steps in a row up to the last step; waits for the device."""
        return int(self._in_row)


class Spikes:
    """Warns of a logged loss far above those before it, in units of their standard deviation."""

    def __init__(self, threshold: float, earlier: Sequence[float] = ()) -> None:
        self.threshold = threshold
        self._losses = deque((x for x in earlier if math.isfinite(x)), maxlen=LINES)

    def check(self, step: int, loss: float) -> str | None:
        """A warning, or None; a spike does not count as normal for the lines after it."""
        losses = list(self._losses)
        if not math.isfinite(loss):
            return None
        if self.threshold and len(losses) >= FEWEST:
            mean = sum(losses) / len(losses)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in losses) / (len(losses) - 1))
            if loss > mean + self.threshold * deviation and loss > mean:
                away = f"{(loss - mean) / deviation:.0f} deviations" if deviation else "well"
                return (
                    f"loss spike at step {step}: {loss:.4g}, {away} above the {mean:.4g} of the "
                    f"{len(losses)} lines before it (survival.loss_spike {self.threshold:g})"
                )
        self._losses.append(loss)
        return None


def diagnosis(trainer: Trainer, batches: Sequence[Batch], in_row: int) -> TrainingError:
    """Repeat the last step, which was skipped, and say what in it is not finite (collective).

    The same weights, batches and noise give the same values again. Everything found is written to
    RUN/bad_step_*.json. The engine cannot go on afterwards.
    """
    trainer.step -= 1
    step, world = trainer.step + 1, trainer.world
    gradients: dict[str, None] = {}  # in the order of the backward pass
    losses: list[dict[str, float]] = []
    samples: list[str] = []
    seen: list[dict[str, Tensor]] = []

    def look(_: Any, args: tuple[Any, ...], out: tuple[Tensor, Any]) -> None:
        seen.append(
            {
                "its latent": _bad_samples(args[0]),
                "its targets": torch.stack(
                    [torch.zeros(len(args[0]), dtype=torch.bool, device=world.device)]
                    + [_bad_samples(t) for t in args[3] or ()]
                ).any(0),
                "its prediction": _bad_samples(out[0]),
            }
        )

    hooks: list[Any] = [trainer.engine.module.register_forward_hook(look)]
    for name, p in trainer.engine.module.named_parameters():
        if p.requires_grad:

            def note(g: Tensor, name: str = name) -> None:
                if not bool(g.isfinite().all()):
                    gradients.setdefault(name)

            hooks.append(p.register_hook(note))
    names = _Names(trainer)
    for forward, batch in enumerate(batches):
        parts = trainer.forward_losses(batch, trainer.sample_numbers(forward))
        losses.append({k: float(v.detach()) for k, v in parts.items()})
        for i, name in enumerate(names.of(step, forward)):
            blame = [what for what, flags in seen[-1].items() if bool(flags[i])]
            if blame:
                samples.append(f"{name} ({blame[0]})")
        trainer.engine.backward(parts["loss"])
    for hook in hooks:
        hook.remove()
    mine = {"losses": losses, "gradients": list(gradients), "samples": samples}
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine, group=trainer.host_group)
    return _told(trainer.run, step, in_row, everyone, world)


def _told(
    run: Path, step: int, in_row: int, everyone: list[dict[str, Any]], world: World
) -> TrainingError:
    """One line that names the ranks at fault, and the file with the rest."""

    def at_fault(report: dict[str, Any]) -> bool:
        return bool(report["samples"]) or not all(
            math.isfinite(v) for parts in report["losses"] for v in parts.values()
        )

    def reports(ranks: Sequence[int]) -> str:
        told = []
        for rank in ranks:
            r = everyone[rank]
            parts = {k: v for part in r["losses"] for k, v in part.items() if not math.isfinite(v)}
            wrong = [f"{k} is {v}" for k, v in parts.items()]
            if r["gradients"]:
                wrong.append(f"the gradients of {_some(r['gradients'])} are not finite")
            if r["samples"]:
                wrong.append(f"samples: {_some(r['samples'])}")
            told.append(f"rank {rank}: {'; '.join(wrong) or 'nothing'}")
        return " | ".join(told)

    guilty = [r for r in range(world.size) if at_fault(everyone[r])]
    guilty = guilty or [r for r in range(world.size) if everyone[r]["gradients"]]
    file = run / f"bad_step_{step:07d}.json"
    if world.is_first:
        file.write_text(json.dumps({"step": step, "in_row": in_row, "ranks": everyone}, indent=1))
    good: Path | None = None
    if world.is_first:
        good = newest_checkpoint(run, verify=False)
    answer = [str(good) if good else None]
    dist.broadcast_object_list(answer, src=0)
    last = f"the last good checkpoint is {answer[0]}" if answer[0] else "there is no checkpoint yet"
    return TrainingError(
        f"stopped at step {step}: {in_row} steps in a row had a loss or gradients that are not "
        f"finite, and were skipped; {reports(guilty[:NAMED]) or 'a repetition finds nothing wrong'}"
        f"; {last}; all there is to know: {file}"
    )


class _Names:
    """The samples of this rank's batches as messages name them: shard file and key."""

    def __init__(self, trainer: Trainer) -> None:
        config, world = trainer.config, trainer.world
        batch = config.training.global_batch
        self.batches = RankBatches(batch, trainer.micro, world.rank, world.size)
        self.order = SampleOrder(
            trainer.shards.shard_sizes,
            seed=config.seed,
            window=config.data.window,
            multiple_of=batch if config.data.remainder == "drop" else 1,
        )
        cached = trainer.cached_latents
        self.store = trainer.shards.store(
            image=not cached, moments=cached, features=(), open_shards=1
        )

    def of(self, step: int, forward: int) -> list[str]:
        """Of the forward-th micro-batch of the update that leads to `step`."""
        batch = (step - 1) * self.batches.passes + forward
        places = map(self.order.locate, self.batches.positions(batch))
        return [self.store.name(shard, sample) for shard, sample in places]


def _bad_samples(x: Tensor) -> Tensor:
    """bool [B]: which samples of x [B, ...] hold a value that is not finite."""
    return ~x.detach().isfinite().flatten(1).all(1)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
