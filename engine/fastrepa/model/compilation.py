"""`training.compile`, `sample.compile`: the generator under torch.compile, by the block or whole as
CUDA graphs.

"graphs" is Inductor's reduce-overhead mode: one graph of the forward, one of the backward, replayed
for every micro-batch. Gradients that a graph wrote are overwritten by its next replay, which torch
refuses as soon as they are accumulated (https://github.com/pytorch/pytorch/issues/169545); so each
is copied as it leaves the graph, before it becomes `.grad`. That costs a pass over the gradients,
2 bytes read and written per parameter in bf16, and makes graphs work under gradient accumulation
and under ZeRO 0, 1 and 2. Stage 3 moves weights while the model runs, which no graph can follow.

"blocks" on a CPU, which our kernels are not for, is the whole forward: Inductor writes its passes
from the plain statements, and torch's partitioner chooses what backward makes again (its activation
memory budget, https://pytorch.org/blog/activation-checkpointing-techniques/), as the fused
operations choose it themselves. The alignment loss stays ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastrepa.errors import ConfigError
from fastrepa.model.operations import EAGER, use_operations

COMPILED = {"none": "", "blocks": ", compiled", "graphs": ", compiled into CUDA graphs"}
"""What a run's first line says of each setting."""


def check_compile(key: str, way: str, device: torch.device) -> None:
    """ConfigError naming `key` where it asks for graphs and `device` has none."""
    if way == "graphs" and device.type != "cuda":
        others = "'none'" if key.startswith("vision") else "'none' or 'blocks'"
        raise ConfigError(
            f"{key}: 'graphs' captures CUDA graphs, and this is on {device.type}; use {others}"
        )


MEMORY_BUDGET = 0.9
"""Of what a forward would keep on a CPU; far less takes products twice."""


def compile_generator(model: nn.Module, way: str, device: torch.device) -> None:
    """Compile a SiT in place, as is best on `device`; shapes are static."""
    if way == "blocks":
        if device.type == "cuda":
            for block in model.blocks:  # type: ignore[union-attr]
                block.compile(dynamic=False)
        else:
            for part in (model.blocks, model.final_layer):
                use_operations(part, EAGER)  # type: ignore[arg-type]
            compile_forward(model, backend=_within_budget)
    elif way == "graphs":
        compile_forward(model, mode="reduce-overhead")


def _within_budget(graph: Any, inputs: Any) -> Any:
    """Inductor, which keeps for backward at most MEMORY_BUDGET of what it would."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=MEMORY_BUDGET):
        return compile_fx(graph, inputs)


def copy_gradients(model: nn.Module) -> None:
    """Take each gradient out of the graph that wrote it, before it is accumulated."""
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(torch.clone)


def compile_forward(model: nn.Module, **options: Any) -> None:
    """Compile the forward alone: `model.compile` would take in the hooks that DeepSpeed sets around
    a whole model's, whose timers break the graph.
    """
    model.forward = torch.compile(model.forward, dynamic=False, **options)


def next_graph(way: str) -> None:
    """Let the graphs of the next forward overwrite what those of the one before still hold."""
    if way == "graphs":
        torch.compiler.cudagraph_mark_step_begin()
