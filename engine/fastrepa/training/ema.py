"""AdamW that keeps the weights' exponential moving average as one more state.

The EMA sits beside exp_avg and exp_avg_sq, so ZeRO shards it over the ranks in every stage, it
moves only on steps that are really taken, and it is saved and restored like any optimiser state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrepa.config import OptimizerConfig

STATES = ("exp_avg", "exp_avg_sq", "ema")


class AdamWEMA(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov & Hutter 2019), then ema = decay ema + (1 - decay) weight.

    The EMA starts as a copy of the weights. Parameters are float32 masters or flat partitions.
    max_norm > 0 clips the gradients here: only for the unsharded float32 engine, whose own clipping
    keeps the norm to itself; every other engine clips before it calls.
    """

    def __init__(
        self, params: Any, config: OptimizerConfig, *, ema_decay: float, max_norm: float = 0.0
    ) -> None:
        super().__init__(
            params,
            lr=0.0,  # the trainer sets every step's rate; a wrapper's own dry step changes nothing
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema_decay, self.max_norm = ema_decay, max_norm
        self._global_grad_norm: Tensor | None = None  # DeepSpeed reads this name

    def prepare(self, param: Tensor) -> None:
        """Create the states of one parameter where they are missing."""
        if not self.state[param]:
            self.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
                "ema": param.detach().clone(),
            }

    def set_rate(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p in params:
            self.prepare(p)
        if self.max_norm > 0 and params:
            self._global_grad_norm = torch.nn.utils.clip_grad_norm_(params, self.max_norm)
        super().step(closure)
        if params:
            averages = [self.state[p]["ema"] for p in params]
            torch._foreach_lerp_(averages, params, 1.0 - self.ema_decay)
