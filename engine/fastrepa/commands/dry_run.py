"""`fastrepa train CONFIG --dry-run`: everything is built, one step is taken, nothing is written.

Encoders and codec get seeded random weights and the images are noise, so neither data nor downloads
are needed; shapes, memory and arithmetic are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Column, Table
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastrepa.config import Config, config_from_dict
from fastrepa.model.operations import EAGER, use_operations
from fastrepa.model.sit import Attention, SiT
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.runtime.terminal import Terminal, print_table
from fastrepa.runtime.world import World
from fastrepa.training.messages import first_line
from fastrepa.training.trainer import Trainer
from fastrepa.training.zero.settings import as_run
from fastrepa.vision.codec import SD_VAE_PARAMETERS
from fastrepa_kernels.attention import SDPA

BATCH = 2  # images of the one step


@dataclass(frozen=True)
class DryRun:
    """The findings of one step of a configuration."""

    first_line: str
    loss: float
    parameters: int
    trained: int
    flops_per_image: int
    flops_per_step: int
    memory: dict[str, int]
    """Estimated bytes per rank, by part."""


def dry_run(config: Config, world: World) -> DryRun:
    """Build the run of `config`, take one step at batch 2 per rank, and a second one to count."""
    tree = config.model_dump(mode="json")
    tree["training"] |= {"global_batch": BATCH * world.size, "micro_batch": BATCH}
    trainer = Trainer(config_from_dict(tree), world)
    batches = RandomBatches(trainer, world.device, BATCH)
    with _kept_for_backward(trainer.engine.module) as kept:
        metrics = trainer.train_step(batches)
    trainer.engine.module.recompute = 0  # FLOPs are those of the model, nothing twice
    # torch's counter cannot look into fused operations: the same products, counted unfused.
    use_operations(trainer.engine.module, EAGER)
    for module in trainer.engine.module.modules():
        if isinstance(module, Attention) and module.backend not in SDPA:
            module.backend = "math"
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(batches)
    parameters = list(trainer.engine.module.parameters())
    sizes = [getattr(p, "ds_numel", p.numel()) for p in parameters]
    trained = sum(n for n, p in zip(sizes, parameters, strict=True) if p.requires_grad)
    per_image = counter.get_total_flops() // BATCH
    micro = config.training.micro_batch or max(1, config.training.global_batch // world.size)
    loss = metrics["loss"]
    return DryRun(
        first_line=first_line(trainer),
        loss=float(loss),
        parameters=sum(sizes),
        trained=trained,
        flops_per_image=per_image,
        flops_per_step=per_image * config.training.global_batch,
        memory=_memory(config, world, trained, trainer, kept[0] // BATCH * micro),
    )


@contextmanager
def _kept_for_backward(model: SiT) -> Iterator[list[int]]:
    """Bytes that autograd keeps, each storage once, the weights left out."""
    total = [0]
    seen: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Asked anew each time: ZeRO-3 moves the weights while the model runs.
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        if storage.data_ptr() not in seen | weights:
            seen.add(storage.data_ptr())
            total[0] += storage.nbytes()
        return tensor

    def input_of(block: torch.nn.Module, args: tuple[Any, ...]) -> None:
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor):
                pack(leaf)

    # What runs again in backward keeps its input, and not by way of these hooks.
    blocks = [b for i, b in enumerate(model.blocks) if model.is_recomputed(i)]
    hooks = [block.register_forward_pre_hook(input_of) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield total
    for hook in hooks:
        hook.remove()


def _memory(
    config: Config, world: World, trained: int, trainer: Trainer, activations: int
) -> dict[str, int]:
    """Bytes per rank: ZeRO divides optimiser (1), gradients (2) and weights (3) by the ranks."""
    stage = as_run(config.zero, config.training, world.size).stage
    width = config.training.dtype.itemsize

    def share(since: int) -> int:
        return world.size if stage >= since else 1

    frozen = sum(
        p.numel() * p.element_size() for e in trainer.targets.encoders for p in e.parameters()
    )
    vae = SD_VAE_PARAMETERS if config.data.codec.is_autoencoder else 0  # a run samples with it
    # zero.offload: not on the GPU.
    where = f" ({config.zero.offload})" if config.zero.offloads else ""
    return {
        "weights": trained * width // share(3),
        "gradients": trained * width // share(2),
        # A second float32 copy exists wherever ZeRO or bf16 needs a master beside the weights.
        f"master weights{where}": 4 * trained // share(1) if config.training.bf16 or stage else 0,
        f"Adam moments{where}": 8 * trained // share(1),
        f"EMA{where}": 4 * trained * len(config.training.ema) // share(1),
        "encoders": frozen,
        "codec": vae * width,
        "kept for backward": activations,
    }


def print_dry_run(result: DryRun, global_batch: int) -> None:
    """Print what the run computes on, and a table of its numbers."""
    console = Terminal()
    console.print(result.first_line, soft_wrap=True)
    title = "dry run: one step at batch 2 on noise, random encoder weights"
    table = Table("what", Column("how much", justify="right"), title=title)
    table.add_row("loss", f"{result.loss:.4f}")
    table.add_row("parameters", f"{result.parameters:,}")
    table.add_row("  of them trained", f"{result.trained:,}")
    table.add_row("FLOPs per image (with encoders and codec)", _si(result.flops_per_image))
    table.add_row(f"FLOPs per step of {global_batch} images", _si(result.flops_per_step))
    table.add_section()
    for part, size in result.memory.items():
        table.add_row(f"memory per rank: {part}", f"{size / 2**30:.2f} GiB")
    table.add_row("memory per rank, estimate", f"{sum(result.memory.values()) / 2**30:.2f} GiB")
    print_table(console, table)


def _si(value: float) -> str:
    for unit in ("", " k", " M", " G", " T", " P"):
        if value < 1000:
            return f"{value:.2f}{unit}"
        value /= 1000
    return f"{value:.2f} E"
