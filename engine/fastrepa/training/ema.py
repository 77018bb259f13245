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
from fastrepa_kernels import adamw_ema_

STATES = ("exp_avg", "exp_avg_sq", "ema")


class AdamWEMA(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019), then ema = decay ema + (1 - decay) weight.

    The EMA starts as a copy of the weights. Parameters are float32 masters or flat partitions.
    kernels "fused" does it all in one pass (fastrepa_kernels.adamw_ema_); "eager" is torch's fused
    AdamW and a second pass for the average. max_norm > 0 clips the gradients here: only for the
    unsharded float32 engine, whose own clipping keeps the norm to itself; every other engine clips
    before it calls.
    """

    def __init__(
        self,
        params: Any,
        config: OptimizerConfig,
        *,
        ema_decay: float,
        max_norm: float = 0.0,
        kernels: str = "fused",
    ) -> None:
        super().__init__(
            params,
            lr=0.0,  # the trainer sets every step's rate; a wrapper's own dry step changes nothing
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema_decay, self.max_norm, self.kernels = ema_decay, max_norm, kernels
        self._global_grad_norm: Tensor | None = None  # DeepSpeed reads this name

    def prepare(self, param: Tensor) -> None:
        """Create the states of one parameter where they are missing."""
        if not self.state[param]:
            # The step is read on the host by the fused pass, on the device by torch's.
            device = "cpu" if self.kernels == "fused" else param.device
            self.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
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
        if not params:
            return
        for p in params:
            self.prepare(p)
        if self.max_norm > 0:
            self._global_grad_norm = torch.nn.utils.clip_grad_norm_(params, self.max_norm)
        if self.kernels == "fused":
            for group in self.param_groups:
                self._fused_step(group)
        else:
            super().step(closure)
            averages = [self.state[p]["ema"] for p in params]
            torch._foreach_lerp_(averages, params, 1.0 - self.ema_decay)

    def _fused_step(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            self.state[p]["step"] += 1
        adamw_ema_(
            params,
            [p.grad for p in params],
            *([self.state[p][key] for p in params] for key in STATES),
            step=int(self.state[params[0]]["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            ema_decay=self.ema_decay,
        )
