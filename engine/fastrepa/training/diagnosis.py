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

from fastrepa.checkpoint.format import newest_checkpoint
from fastrepa.config import DataConfig
from fastrepa.data.datasets import DataSet
from fastrepa.data.reader import RankBatches, SampleOrder
from fastrepa.errors import TrainingError
from fastrepa.runtime.world import World, of_rank_0

NAMED = 5  # parameters and samples that a message names; the file has them all


def diagnosis(
    model: nn.Module,
    repeat: Callable[[int], dict[str, Tensor]],
    names: Sequence[Sequence[str]],
    *,
    run: Path,
    step: int,
    in_row: int,
    world: World,
    group: Any,
) -> TrainingError:
    """Repeat step number `step`, which was skipped, and say what in it is not finite (collective).

    repeat: the forward and backward of this rank's n-th micro-batch of that step once more, with
    the same weights, batch and noise; returns its losses [] by name. names: of the samples of each
    micro-batch. group: a gloo group of all ranks. Everything found is written to
    RUN/bad_step_*.json. The engine cannot go on afterwards.
    """
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

    hooks: list[Any] = [model.register_forward_hook(look)]
    for name, p in model.named_parameters():
        if p.requires_grad:

            def note(g: Tensor, name: str = name) -> None:
                if not bool(g.isfinite().all()):
                    gradients.setdefault(name)

            hooks.append(p.register_hook(note))
    for forward, named in enumerate(names):
        losses.append({k: float(v.detach()) for k, v in repeat(forward).items()})
        for i, name in enumerate(named):
            blame = [what for what, flags in seen[-1].items() if bool(flags[i])]
            if blame:
                samples.append(f"{name} ({blame[0]})")
    for hook in hooks:
        hook.remove()
    mine = {"losses": losses, "gradients": list(gradients), "samples": samples}
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine, group=group)
    return _told(run, step, in_row, everyone, world)


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
    if world.is_rank_0:
        file.write_text(json.dumps({"step": step, "in_row": in_row, "ranks": everyone}, indent=1))
    good = of_rank_0(world, lambda: newest_checkpoint(run, verify=False))
    last = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    return TrainingError(
        f"stopped at step {step}: {in_row} steps in a row had a loss or gradients that are not "
        f"finite, and were skipped; {reports(guilty[:NAMED]) or 'a repetition finds nothing wrong'}"
        f"; {last}; all there is to know: {file}"
    )


def _bad_samples(x: Tensor) -> Tensor:
    """Tell which samples of x [B, ...] hold a value that is not finite: bool [B]."""
    return ~x.detach().isfinite().flatten(1).all(1)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
