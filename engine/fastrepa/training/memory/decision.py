"""`training.recompute: auto` and `training.keep: auto`, decided before a run is built.

The arithmetic is the one that `fastrepa plan` prints: resident states and the highest moment of
backward, update, encoding or sampling (activations.py, sharding.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastrepa.config import Config, TrainingConfig
from fastrepa.generation.generate import SAMPLE_BATCH
from fastrepa.model.sit import recomputed_blocks
from fastrepa.runtime.regions import SAMPLING
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import World, of_rank_0
from fastrepa.training.memory.sharding import (
    PARTS,
    Parameters,
    Sharding,
    backward_peak,
    resident,
    update_peak,
)
from fastrepa.training.memory.workload import Workload, measure_workload
from fastrepa.training.zero.settings import (
    as_run,
    block_elements,
    deepspeed_config,
    micro_batch,
    resolve_zero,
)

RESERVE = 4e9  # bytes of a GPU for CUDA, NCCL, libraries and fragmentation; plan's assumption


def resolve_memory(config: Config, world: World) -> Config:
    """Return the configuration with a decision in the place of every auto (collective).

    The budget is training.memory_budget_gb, or the GPU's memory less RESERVE; without either there
    is nothing to fit into: nothing is recomputed, and h is not kept. Where not even every block
    recomputed is enough, that is what is chosen, and the first rank warns.
    """
    t = config.training
    if "auto" not in (t.recompute, t.keep):
        return config
    (every, keep_h), warning = of_rank_0(
        world, lambda: _decide(config, world.size, _budget(t, world))
    )
    if warning and world.is_rank_0:
        say(f"warning: {warning}")
    keep = ("h" if keep_h else "none") if t.keep == "auto" else t.keep
    training = t.model_copy(update={"recompute": every or "none", "keep": keep})
    return config.model_copy(update={"training": training})


def _budget(training: TrainingConfig, world: World) -> float | None:
    """Bytes per rank."""
    if training.memory_budget_gb is not None:
        return 1e9 * training.memory_budget_gb
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory - RESERVE
    return None


def _decide(
    config: Config, world_size: int, budget: float | None
) -> tuple[tuple[int, bool], str | None]:
    """Return ((recompute, whether h is kept), warning)."""
    every = config.training.recompute
    open_ = every == "auto" or (every == "none" and config.fused)
    if budget is None or not open_:
        return (config.training.recompute_every, False), None
    # What drawing grids takes is the same whatever is decided, and to know it takes diffusers.
    training = config.training.model_copy(update={"sample_every": 0})
    work = measure_workload(config.model_copy(update={"training": training}))
    way = fitted(work, sharding(config, world_size, work.parameters), budget, reserve=0.0)
    warning = None
    if every == "auto":
        memory, _ = memory_peak(work, way, 0.0)
        total = sum(memory.values())
        if total > budget:
            warning = (
                f"training.recompute: with every block recomputed a rank still needs an estimated "
                f"{total / 1e9:.1f} GB of {budget / 1e9:.1f}; see fastrepa plan"
            )
    return (way.recompute, way.keep_h), warning


def sharding(config: Config, world: int, parameters: Parameters) -> Sharding:
    """Return the way that a configuration runs on `world` GPUs; what is auto: none."""
    training, zero = config.training, resolve_zero(config, parameters.numel, world).zero
    micro, forwards = micro_batch(training, world)
    return Sharding(
        world,
        as_run(zero, training, world).stage,
        micro,
        forwards,
        training.recompute_every,
        training.keep_h and config.fused,
        training.bf16,
        deepspeed_config(zero, training, config.run, world)["zero_optimization"],
        len(training.ema),
        block_elements(config.model),
        not config.fused,
    )


def fitted(w: Workload, s: Sharding, capacity: float, *, reserve: float) -> Sharding:
    """Return `s` with what is auto in the workload's configuration decided: h is kept where that
    fits into `capacity` bytes with nothing recomputed; else the fewest blocks are recomputed.
    """
    kept = with_h(w, s, capacity, reserve=reserve)
    if kept.keep_h != s.keep_h or w.config.training.recompute != "auto":
        return kept
    return replace(s, recompute=fewest_recomputed(w, s, capacity, reserve=reserve))


def with_h(w: Workload, s: Sharding, capacity: float, *, reserve: float) -> Sharding:
    """Return `s` with h kept, where training.keep is auto, nothing is recomputed and it fits."""
    if w.config.training.keep != "auto" or not w.config.fused or s.recompute:
        return s
    kept = replace(s, keep_h=True)
    return kept if _fits(w, kept, capacity, reserve) else s


def fewest_recomputed(w: Workload, s: Sharding, capacity: float, *, reserve: float) -> int:
    """The largest training.recompute, or 0 for none, with which `s` fits into `capacity` bytes;
    1, every block, where none does.
    """
    depth = w.config.model.depth
    # Of several that recompute as many blocks the smallest: fewer first.
    settings = {recomputed_blocks(depth, n): n for n in range(max(1, depth - 1), 0, -1)}
    choices = [0, *(settings[blocks] for blocks in sorted(settings) if blocks)]
    low, high = 0, len(choices) - 1  # more blocks never take more memory
    while low < high:
        middle = (low + high) // 2
        fits = _fits(w, replace(s, recompute=choices[middle]), capacity, reserve)
        low, high = (low, middle) if fits else (middle + 1, high)
    return choices[low] if choices else 0


def _fits(w: Workload, s: Sharding, capacity: float, reserve: float) -> bool:
    memory, _ = memory_peak(w, s, reserve)
    return sum(memory.values()) <= capacity


def memory_peak(w: Workload, s: Sharding, reserve: float) -> tuple[dict[str, float], str]:
    """Return (bytes per GPU by part, the moment they are the most)."""
    moments = memory_moments(w, s, reserve)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return moments[moment], moment


def memory_moments(w: Workload, s: Sharding, reserve: float) -> dict[str, dict[str, float]]:
    """Return bytes per GPU by part, at every moment that may be the highest."""
    p = w.parameters
    always = resident(s, p)
    always["encoders"] = sum(f.weights for _, f in w.encoders)
    always["codec"] = w.codec_weights
    always["reserve"] = reserve
    samples = w.config.training.sample_every > 0
    moments = {
        "backward": backward_peak(s, p, w.curve(s.recompute, s.keep_h)),
        "update": update_peak(s, p),
        "encoding": {
            "encoders": max((f.at(s.micro) for _, f in w.encoders), default=0.0),
            "codec": w.codec_encoder.at(s.micro) if w.codec_encoder else 0.0,
        },
        # A whole average on every GPU that samples, in the dtype of the weights (which stage 0 in
        # fp32 has already), and a batch of latents decoded.
        SAMPLING: {
            "EMA": float(s.itemsize * p.numel) if samples and (s.bf16 or s.stage) else 0.0,
            "codec": w.codec_decoder.at(SAMPLE_BATCH) if w.codec_decoder else 0.0,
        },
    }
    return {
        name: {part: always.get(part, 0.0) + peak.get(part, 0.0) for part in PARTS}
        for name, peak in moments.items()
    }
