"""A bad step, repeated to find what in it is not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrepa.config import DataConfig
from fastrepa.data.datasets import DataSet
from fastrepa.data.reader import RankBatches, SampleOrder
from fastrepa.errors import TrainingError, worded
from fastrepa.runtime.files import write_whole
from fastrepa.runtime.world import World, of_rank_0

NAMED = 5  # parameters and samples that a message names; the file has them all


def diagnosis(
    model: nn.Module,
    repeats: Sequence[Callable[[], dict[str, Tensor]]],
    names: Callable[[int], Sequence[str]],
    *,
    run: Path,
    step: int,
    in_row: int,
    good: Path | None,
    world: World,
    group: Any,
) -> TrainingError:
    """Repeat step number `step`, which was skipped, and say what in it is not finite (collective).

    repeats: this rank's passes of that step (`Trainer.repeats`), which return losses []. names: of
    the samples of the n-th of them. good: on the first rank, the last good checkpoint. group: a
    gloo group of all ranks. Everything found is written to RUN/bad_step_*.json. The engine cannot
    go on afterwards.
    """
    gradients: dict[str, None] = {}  # in the order of the backward pass
    mine: dict[str, Any] = {"losses": [], "gradients": [], "samples": []}
    seen: dict[str, Tensor] = {}  # of a forward: bool [B] by what may not be finite
    flagged: list[dict[str, list[bool]]] = []  # of every forward

    def look(_: Any, args: tuple[Any, ...], out: Tensor | tuple[Tensor, Tensor]) -> None:
        targets = [_bad_samples(t) for t in args[3] or ()]
        velocity = out if isinstance(out, Tensor) else out[0]  # a pair where there are targets
        seen["its latent"] = _bad_samples(args[0])
        if targets:
            seen["its targets"] = torch.stack(targets).any(0)
        seen["its prediction"] = _bad_samples(velocity)

    hooks: list[Any] = [model.register_forward_hook(look)]
    for name, p in model.named_parameters():
        if p.requires_grad:

            def note(g: Tensor, name: str = name) -> None:
                if not bool(g.isfinite().all()):
                    gradients.setdefault(name)

            hooks.append(p.register_hook(note))
    try:
        for repeat in repeats:
            mine["losses"].append({k: float(v.detach()) for k, v in repeat().items()})
            flagged.append({what: flags.tolist() for what, flags in seen.items()})
        for forward, found in enumerate(flagged):
            for i, name in enumerate(names(forward)):
                if blame := [what for what, flags in found.items() if flags[i]]:
                    mine["samples"].append(f"{name} ({blame[0]})")
    except Exception as e:  # what could not be found out must not hide what is known
        mine["failed"] = f"{type(e).__name__}: {worded(e)}"
    for hook in hooks:
        hook.remove()
    mine["gradients"] = list(gradients)
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine, group=group)
    return _told(run, step, in_row, everyone, good, world)


class SampleNames:
    """The samples of a rank's batches as messages name them: shard file and key."""

    def __init__(
        self,
        data: DataSet,
        config: DataConfig,
        batches: RankBatches,
        *,
        seed: int,
        cached_latents: bool,
    ) -> None:
        self.batches = batches
        self.order = SampleOrder(
            data.shard_sizes,
            seed=seed,
            window=config.window,
            multiple_of=batches.global_batch if config.remainder == "drop" else 1,
        )
        self.store = data.store(
            image=not cached_latents, moments=cached_latents, features=(), open_shards=1
        )

    def of(self, step: int, forward: int) -> list[str]:
        """Name the samples of the forward-th micro-batch of the update that leads to `step`."""
        batch = (step - 1) * self.batches.passes + forward
        places = map(self.order.locate, self.batches.positions(batch))
        return [self.store.name(shard, sample) for shard, sample in places]


def _told(
    run: Path,
    step: int,
    in_row: int,
    everyone: list[dict[str, Any]],
    good: Path | None,
    world: World,
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
            if "failed" in r:
                wrong.append(f"its repetition failed ({r['failed']})")
            told.append(f"rank {rank}: {'; '.join(wrong) or 'nothing'}")
        return " | ".join(told)

    guilty = [r for r in range(world.size) if at_fault(everyone[r])]
    guilty = guilty or [r for r in range(world.size) if everyone[r]["gradients"]]
    guilty = guilty or [r for r in range(world.size) if "failed" in everyone[r]]

    def finished() -> str:
        """On the first rank, write the file; return the end of the line."""
        last = f"the last good checkpoint is {good}" if good else "there is no good checkpoint yet"
        return f"{last}; {_kept(run / f'bad_step_{step:07d}.json', step, in_row, everyone)}"

    return TrainingError(
        f"stopped at step {step}: {in_row} steps in a row had a loss or gradients that are not "
        f"finite, and were skipped; {reports(guilty[:NAMED]) or 'a repetition finds nothing wrong'}"
        f"; {of_rank_0(world, finished)}"
    )


def _kept(file: Path, step: int, in_row: int, everyone: list[dict[str, Any]]) -> str:
    """Write all that was found to a file; say where it is, or why it is not."""

    def losses(report: dict[str, Any]) -> list[dict[str, float | str]]:
        """JSON has no NaN: what is not finite becomes text."""
        return [
            {k: v if math.isfinite(v) else str(v) for k, v in parts.items()}
            for parts in report["losses"]
        ]

    ranks = [report | {"losses": losses(report)} for report in everyone]
    text = json.dumps({"step": step, "in_row": in_row, "ranks": ranks}, indent=1)
    try:
        write_whole(file, text.encode())
    except OSError as e:
        return f"{file}: cannot be written ({worded(e)})"
    return f"all there is to know: {file}"


def _bad_samples(x: Tensor) -> Tensor:
    """Tell which samples of x [B, ...] hold a value that is not finite: bool [B]."""
    return ~x.detach().isfinite().flatten(1).all(1)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
