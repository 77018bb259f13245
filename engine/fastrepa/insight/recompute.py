"""`training.recompute: auto`, decided before a run is built, by the arithmetic of plan."""

from __future__ import annotations

import torch

from fastrepa.config import Config
from fastrepa.training.zero import World, of_first_rank

RESERVE = 4e9  # bytes of a GPU for CUDA, NCCL, libraries and fragmentation; plan's assumption


def resolve_recompute(config: Config, world: World) -> Config:
    """The configuration with none or a number in the place of auto (collective).

    The budget is training.memory_budget_gb, or the GPU's memory less RESERVE; without either there
    is nothing to fit into, and it is none. Where not even every block recomputed is enough, that is
    what is chosen, and the first rank warns.
    """
    if config.training.recompute != "auto":
        return config
    every, warning = of_first_rank(
        world, lambda: _decide(config, world.size, _budget(config, world))
    )
    if warning and world.is_first:
        print(f"warning: {warning}", flush=True)
    training = config.training.model_copy(update={"recompute": every})
    return config.model_copy(update={"training": training})


def _budget(config: Config, world: World) -> float | None:
    """Bytes per rank."""
    if config.training.memory_budget_gb is not None:
        return 1e9 * config.training.memory_budget_gb
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory - RESERVE
    return None


def _decide(config: Config, world_size: int, budget: float | None) -> tuple[int | str, str | None]:
    """(setting, warning); imports what only plan needs."""
    if budget is None:
        return "none", None
    from dataclasses import replace

    from fastrepa.insight.plan import fewest_recomputed, memory_peak, sharding
    from fastrepa.insight.workload import measure_workload

    work = measure_workload(config)
    way = sharding(config, world_size, work.parameters)
    every = fewest_recomputed(work, way, budget, reserve=0.0)
    memory, _ = memory_peak(work, replace(way, recompute=every), 0.0)
    total, warning = sum(memory.values()), None
    if total > budget:
        warning = (
            f"training.recompute: with every block recomputed a rank still needs an estimated "
            f"{total / 1e9:.1f} GB of {budget / 1e9:.1f}; see fastrepa plan"
        )
    return every or "none", warning
