"""The published training step, as a rival: what REPA's train.py computes, by its own statements.

float32 weights under torch.autocast (fp16 with a gradient scaler, or bf16, or neither), an
alignment loss that goes sample by sample, AdamW, an average that is updated parameter by parameter,
and losses that the host reads after every step. The batch, its noise, the encoder and the
transformer's arithmetic are those of the trainer it takes the place in, so that losses compare.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrepa.config import TrainingConfig
from fastrepa.data.pipeline import Batch
from fastrepa.model.operations import EAGER, Operations, per_sample_alignment
from fastrepa.training.trainer import Trainer

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
DECAY = 0.9999  # the reference's


REFERENCE = replace(EAGER, projector_alignment=per_sample_alignment)


class ReferenceEngine:
    """Stands for a Trainer's DeepSpeed engine and optimiser; one process. Loss and norm are []."""

    def __init__(
        self, module: nn.Module, training: TrainingConfig, precision: str, forwards: int
    ) -> None:
        self.module, self.clip, self.forwards = module, training.clip, forwards
        self.device = next(module.parameters()).device
        self.dtype = AUTOCAST.get(precision)
        self.params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        o = training.optimizer
        self.adamw = torch.optim.AdamW(
            self.params.values(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
        )
        self.averages = {name: p.detach().clone() for name, p in self.params.items()}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.bad_loss: Tensor | None = None  # the trainer's; the reference has no such thing
        self.logged: list[float] = []
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def set_rate(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr

    def backward(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        self.scaler.scale(loss / self.forwards).backward()

    def step(self) -> None:
        if len(self._losses) < self.forwards:
            return
        self.scaler.unscale_(self.adamw)
        limit = self.clip or float("inf")
        self._norm = nn.utils.clip_grad_norm_(self.params.values(), limit)
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in self.params.items():
                self.averages[name].mul_(DECAY).add_(p, alpha=1 - DECAY)
        self.logged = [*(loss.item() for loss in self._losses), self._norm.item()]
        self._losses.clear()

    def get_global_grad_norm(self) -> Tensor | None:
        return self._norm


def use_reference(trainer: Trainer, precision: str) -> None:
    """Make `trainer`, built in fp32 with eager kernels and ZeRO 0, take the published step."""
    model = trainer.engine.module
    for module in model.modules():
        if isinstance(getattr(module, "operations", None), Operations):
            module.operations = REFERENCE
    engine = ReferenceEngine(model, trainer.config.training, precision, trainer.forwards)
    losses = trainer.forward_losses

    def under_autocast(
        batch: Batch, samples: Tensor, targets: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        with engine.autocast():
            return losses(batch, samples, targets)

    trainer.forward_losses = under_autocast  # type: ignore[method-assign]
    trainer.engine.destroy()
    trainer.engine = trainer.optimizer = engine  # type: ignore[assignment]
    del trainer.whole  # DeepSpeed's states go with it
