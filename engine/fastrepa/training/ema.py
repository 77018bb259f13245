"""AdamW that keeps moving averages of the weights as more of its states.

An EMA sits beside exp_avg and exp_avg_sq, so ZeRO shards it over the ranks in every stage, it
moves only on steps that are really taken, and it is saved and restored like any optimiser state.
The first of `training.ema` is the state `ema`; others are named by what they are:
`ema_decay_0.999`, `ema_sigma_rel_0.05`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrepa.config import EmaConfig, OptimizerConfig
from fastrepa_kernels import adamw_ema_
from fastrepa_kernels.adamw_ema import power_decay

EMA = "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")


def ema_keys(emas: Sequence[EmaConfig]) -> tuple[str, ...]:
    """The states' names, in order: `ema` for the first."""
    return (EMA, *(f"ema_{_words(e)}" for e in emas[1:]))


def _words(ema: EmaConfig) -> str:
    return f"decay_{ema.decay}" if ema.sigma_rel is None else f"sigma_rel_{ema.sigma_rel}"


def power_gamma(sigma_rel: float) -> float:
    """gamma of the power function with this relative standard deviation: the real root above 0 of
    sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (Karras et al. 2024, algorithm 2).
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class AdamWEMA(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019), then ema = decay ema + (1 - decay) weight for every EMA.

    An EMA starts as a copy of the weights. Its decay is fixed, or (1 - 1/t)^(gamma + 1) at the
    t-th update really taken. Parameters are float32 masters or flat partitions.
    kernels "fused" does it all in one pass (fastrepa_kernels.adamw_ema_); "eager" is torch's fused
    AdamW and another pass for each average. With a max_norm the gradients' norm is taken here, and
    clipped where it is > 0: only for the unsharded float32 engine, which keeps the norm to itself;
    every other engine does both before it calls, and `engine_norm` asks it.

    A step whose gradients' norm is not finite, or whose `bad_loss` (bool scalar, alike on all
    ranks) is set, changes nothing. On a GPU the kernels read the flag and the host does not.
    """

    def __init__(
        self,
        params: Any,
        config: OptimizerConfig,
        *,
        emas: Sequence[EmaConfig],
        max_norm: float | None = None,
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
        self.emas, self.ema_keys = tuple(emas), ema_keys(emas)
        self.ema_since: dict[str, int] = {}  # of those that began after so many updates
        self.max_norm, self.kernels = max_norm, kernels
        self._gammas = [None if e.sigma_rel is None else power_gamma(e.sigma_rel) for e in emas]
        self._global_grad_norm: Tensor | None = None  # DeepSpeed reads this name
        self.engine_norm: Callable[[], Tensor | float | None] = lambda: None
        self.bad_loss: Tensor | None = None

    def prepare(self, param: Tensor) -> None:
        """Create the states of one parameter where they are missing."""
        if not self.state[param]:
            self.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
                **{key: param.detach().clone() for key in self.ema_keys},
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
        bad: Tensor | None = self._bad(params)
        assert bad is not None
        if params[0].device.type == "cpu":  # offloaded: the gradients' norm has been waited for
            bad = bad.cpu()
        if bad.device.type == "cpu":  # in host memory already: reading it waits for nothing
            if bad:
                return
            bad = None
        if self.kernels == "fused":
            for group in self.param_groups:
                self._fused_step(group, bad)
            return
        self.found_inf = None if bad is None else bad.float()  # torch's name for it
        super().step(closure)
        self._average(params, bad)

    def _average(self, params: list[Tensor], bad: Tensor | None) -> None:
        """Move every EMA towards the weights, each in a pass of its own."""
        decays = self._decays(self.state[params[0]]["step"])
        for key, decay in zip(self.ema_keys, decays, strict=True):
            rest: Any = 1.0 - decay
            if bad is not None:
                rest = ((~bad) * torch.as_tensor(rest, device=bad.device)).float()
                rest = [rest.to(p.device) for p in params]
            torch._foreach_lerp_([self.state[p][key] for p in params], params, rest)

    def _bad(self, params: list[Tensor]) -> Tensor:
        """Whether this step must change nothing: a bool scalar, alike on all ranks."""
        norm = self.engine_norm()
        if self.max_norm is not None:
            grads = [p.grad for p in params if p.grad is not None]
            norm = self._global_grad_norm = torch.nn.utils.get_total_norm(grads)
            if self.max_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(params, self.max_norm, norm)
        bad = bad_norm(0.0 if norm is None else norm)
        return bad if self.bad_loss is None else bad.to(self.bad_loss.device) | self.bad_loss

    def _decays(self, step: Tensor | int) -> list[Any]:
        """Of every EMA at update number `step`; does not wait for a GPU.

        The update counts as the first where even that one was skipped: nothing is made of it.
        """
        t: Any = None
        if any(self._gammas):
            if isinstance(step, int) or step.device.type == "cpu":
                t = max(1, int(step))
            else:
                t = step.double().clamp(min=1)  # a decay near 1 needs more than float32
        return [
            ema.decay if gamma is None else power_decay(t, gamma)
            for ema, gamma in zip(self.emas, self._gammas, strict=True)
        ]

    def _fused_step(self, group: dict[str, Any], bad: Tensor | None) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        steps = [self.state[p]["step"] for p in params]
        if bad is None and steps[0].device.type == "cpu":
            torch._foreach_add_(steps, 1.0)
            step: Any = int(steps[0])
        else:
            keep = 1.0 if bad is None else (~bad).to(steps[0].device, torch.float32)
            torch._foreach_add_(steps, keep)
            step = steps[0]
        adamw_ema_(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [[self.state[p][key] for p in params] for key in self.ema_keys],
            step=step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            ema_decay=self._decays(step),
            skip=bad,
        )


def bad_norm(norm: Tensor | float) -> Tensor:
    """Whether a gradient norm is NaN, infinite or DeepSpeed's -1 for either: a bool scalar on
    its device.
    """
    value = torch.as_tensor(norm).reshape(())
    return ~value.isfinite() | (value < 0)
