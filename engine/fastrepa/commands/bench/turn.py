"""One contender's turn, in a process of its own (or several, under torchrun): `fastrepa bench`
starts it, and reads the lines that it prints: times as soon as they are known, then all.

    python -m fastrepa.commands.bench.turn '{"config": {...}, "contender": "ours", ...}'

It ends when its stdin does, which is how it learns that who started it was killed.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from fastrepa.commands.bench.peak_memory import highest, storages
from fastrepa.commands.bench.plain_step import DeviceRandom, PlainLoop
from fastrepa.commands.bench.reference_step import use_reference
from fastrepa.config import Config, config_from_dict
from fastrepa.generation.generate import generate
from fastrepa.model.compilation import compile_forward
from fastrepa.profiling.activity import Annotating, profile_steps
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.reading.text import parse_json
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import World, destroy_world, init_world
from fastrepa.training.memory.decision import resolve_memory
from fastrepa.training.messages import first_line
from fastrepa.training.trainer import Trainer
from fastrepa.training.zero.collectives import time_collectives

MARK = "BENCH "
DOES_NOT_FIT = "does not fit"
NO_MEMORY = ("out of memory", "ALLOC_FAILED")  # the driver's, cuBLAS's and cuDNN's words


def contender_config(tree: dict[str, Any], contender: str, precision: str) -> Config:
    """The run's configuration as this contender needs it."""
    tree["training"]["precision"] = precision
    if contender == "reference":
        tree["training"]["precision"] = "fp32"  # autocast makes the difference
        tree["zero"] = {"stage": 0}
    if not contender.startswith("ours"):
        tree["kernels"] = "eager"
        tree["training"] |= {"recompute": "none", "compile": "none"}
        tree["vision"] |= {"look_ahead": False, "compile": "none", "precision": "run"}
        tree["attention"] = {"backend": "sdpa"}
    if contender == "ours+recompute":
        tree["training"]["recompute"] = 1
    if contender == "ours+compile":
        tree["training"]["compile"] = "blocks"
    if contender == "ours+graphs":
        tree["training"]["compile"] = tree["vision"]["compile"] = "graphs"
    return config_from_dict(tree)


def training_turn(task: dict[str, Any], config: Config, world: World) -> dict[str, Any]:
    """Warm up, time, and measure the highest moment of memory of one more step."""
    contender, steps, warmup = task["contender"], task["steps"], task["warmup"]
    trainer: Trainer | PlainLoop
    if contender == "plain+compile":
        trainer = PlainLoop(config, world.device)
        model, line = trainer.model, ""
    else:
        trainer = Trainer(config, world)
        line = first_line(trainer) if contender != "reference" else ""
        if contender == "reference":
            use_reference(trainer, task["precision"])
        model = trainer.engine.module
        if contender == "eager+compile":
            compile_forward(model)
    batches = RandomBatches(trainer, world.device, config.training.global_batch // world.size)
    # Made once: reading is not measured.
    source = itertools.cycle([next(batches)])
    losses: list[Any] = []

    def step() -> None:
        losses.append(trainer.train_step(source)["loss"])

    for _ in range(warmup):
        step()
    if isinstance(trainer, PlainLoop):  # its losses are those of the others on these draws alone
        for _ in range(steps):
            step()
        trainer.random = DeviceRandom()
    timed = _timed(step, steps, world)
    out: dict[str, Any] = timed | {
        "losses": [float(loss) for loss in losses[: warmup + steps]],
        "line": line,
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if world.is_rank_0:
        _say(out)  # what follows may fail, and takes no time with it
    if task["memory"]:
        held = sum(s.nbytes() for s in storages(world.device).values())
        out["peak_bytes"] = held + highest(step, world.device)
        out["held_bytes"] = held
        if world.device.type == "cuda":  # with what CUDA graphs hold, which is in no other count
            out["reserved_bytes"] = torch.cuda.max_memory_reserved(world.device)
    if task["profile"]:
        if isinstance(trainer, Trainer):
            trainer.meter = annotating = Annotating(world, config.training.global_batch)
            time_collectives(annotating.region)
        out["profile"] = profile_steps(step, world.device)
    return out


def sampling_turn(task: dict[str, Any], config: Config, world: World) -> dict[str, Any]:
    """Images of random weights: what they show does not change what they cost."""
    trainer = Trainer(config, world)
    model = trainer.engine.module
    if task["contender"] == "eager+compile":
        compile_forward(model)
    batch = config.training.global_batch
    numbers = torch.arange(batch)
    labels = numbers % config.model.num_classes

    def draw() -> None:
        generate(
            model,
            trainer.codec,
            labels,
            seed=config.seed,
            sample_ids=numbers,
            batch_size=batch,
            sample_config=config.sample,
            path=config.objective.path,
        )

    for _ in range(task["warmup"]):
        draw()
    return _timed(draw, task["steps"], world) | {"line": first_line(trainer)}


def _timed(work: Callable[[], object], times: int, world: World) -> dict[str, Any]:
    """Return seconds, and how they were taken: on a GPU one mean, as a sync after each step would
    show every launch that a run hides behind the step before.
    """
    if world.device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(world.device)
        began.record()
        for _ in range(times):
            work()
        torch.cuda.synchronize(world.device)  # streams beside this one are part of a step
        ended.record()
        ended.synchronize()
        mean = began.elapsed_time(ended) / 1e3 / times
        return {"seconds": [mean], "timing": f"events over {times} steps"}
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "timing": "clock around each step"}


def main(text: str) -> int:
    threading.Thread(target=_end_with_stdin, name="end-with-stdin", daemon=True).start()
    task = parse_json(text, "task")
    world = init_world()
    config = contender_config(task["config"], task["contender"], task["precision"])
    config = resolve_memory(config, world)
    turn = sampling_turn if task["sampler"] else training_turn
    try:
        result = turn(task, config, world)
    except Exception as e:
        if world.is_rank_0:  # its traceback goes to stderr, among what libraries say when they end
            _say({"problem": problem_of(e)})
        raise
    if world.is_rank_0:
        _say(result)
    destroy_world()
    return 0


def _say(result: dict[str, Any]) -> None:
    say(MARK + json.dumps(result))


def problem_of(e: Exception) -> str:
    """One line on an exception; torch's and libraries' words for too little memory are one."""
    if any(words in str(e) for words in NO_MEMORY):
        return DOES_NOT_FIT
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__


def _end_with_stdin() -> None:
    while os.read(0, 1):  # sys.stdin would hold a lock that the interpreter's end waits for
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
