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
import torch.distributed as dist
from torch import Tensor

from fastrepa.checkpoint.kinds import ema_keys
from fastrepa.config import EmaConfig, OptimizerConfig
from fastrepa_kernels import adamw_ema_
from fastrepa_kernels.adamw_ema import power_decay

NORM_PIECE = 1 << 16  # elements


def power_gamma(sigma_rel: float) -> float:
    """Return gamma of the power function with this relative standard deviation: the real root above
    0 of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (Karras et al. 2024, algorithm 2).
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class AdamWEMA(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019), then ema = decay ema + (1 - decay) weight for every EMA.

    An EMA starts as a copy of the weights. Its decay is fixed, or (1 - 1/t)^(gamma + 1) at the
    t-th update really taken. Parameters are float32 masters or flat partitions.
    kernels "fused" does it all in one pass (fastrepa_kernels.adamw_ema_); "eager" is torch's fused
    AdamW and another pass for each average. With a max_norm the gradients' norm is taken here, of
    all ranks where parameters are `sharded` over them, and clipped to it where it is > 0. Without,
    the engine does both before it calls, and `engine_norm` asks it.

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
        sharded: bool = False,
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
        self.max_norm, self.sharded, self.kernels = max_norm, sharded, kernels
        self._gammas = [None if e.sigma_rel is None else power_gamma(e.sigma_rel) for e in emas]
        self._global_grad_norm: Tensor | None = None  # DeepSpeed reads this name
        self.engine_norm: Callable[[], Tensor | float | None] = lambda: None
        self.bad_loss: Tensor | None = None

    def prepare(self, param: Tensor) -> None:
        """Create the states of one parameter [...], in its shape, where they are missing."""
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

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if params:
            self.update(params, [p.grad for p in params])

    @torch.no_grad()
    def update(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], low: Sequence[Tensor] | None = None
    ) -> None:
        """Update `params` [...], of one parameter group, by `grads` of any floating dtype.

        grads have the shapes of params, and low too: tensors of another dtype that receive the new
        weights in the same pass.
        """
        for p in params:
            self.prepare(p)
        norm, scale = self._norm(grads)
        bad: Tensor | None = bad_norm(0.0 if norm is None else norm)
        assert bad is not None
        if self.bad_loss is not None:
            bad = bad.to(self.bad_loss.device) | self.bad_loss
        if self._on_host(params[0]):  # offloaded: the gradients' norm has been waited for
            if bad:
                return
            bad, scale = None, None if scale is None else float(scale)
        if self.kernels == "fused":
            self._fused_update(params, grads, low, bad, scale)
        else:
            self._eager_update(params, grads, low, bad, scale)

    @staticmethod
    def _on_host(param: Tensor) -> bool:
        """Flags and step counts of `param` are host memory: reading them waits for nothing."""
        return param.device.type == "cpu"

    def _norm(self, grads: Sequence[Tensor]) -> tuple[Any, Any]:
        """Return (the gradients' global norm, the factor that clips them or None)."""
        if self.max_norm is None:
            return self.engine_norm(), None
        norm = _norm_of(grads)
        if self.sharded and dist.get_world_size() > 1:
            square = norm.square()
            dist.all_reduce(square)
            norm = square.sqrt()
        self._global_grad_norm = norm
        return norm, (self.max_norm / (norm + 1e-6)).clamp(max=1) if self.max_norm > 0 else None

    def _decays(self, step: Tensor | int) -> list[Any]:
        """Return the decay of every EMA at update number `step`; does not wait for a GPU.

        The update counts as the first where even that one was skipped: nothing is made of it.
        """
        t: Any = None
        if any(self._gammas):
            if isinstance(step, int):
                t = max(1, step)
            else:
                t = step.double().clamp(min=1)  # a decay near 1 needs more than float32
        return [
            ema.decay if gamma is None else power_decay(t, gamma)
            for ema, gamma in zip(self.emas, self._gammas, strict=True)
        ]

    def _fused_update(self, params, grads, low, bad, scale) -> None:
        steps = [self.state[p]["step"] for p in params]
        taken: Any = 1.0 if bad is None else (~bad).to(steps[0].device, torch.float32)
        for count in steps:  # torch._foreach_add_ would read a scalar tensor on the host
            count.add_(taken)
        step: Any = int(steps[0]) if bad is None else steps[0]
        group = self.param_groups[0]
        adamw_ema_(
            params,
            grads,
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [[self.state[p][key] for p in params] for key in self.ema_keys],
            step=step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            ema_decay=self._decays(step),
            grad_scale=scale,
            skip=bad,
            low_precision=low,
        )

    def _eager_update(self, params, grads, low, bad, scale) -> None:
        """Update as torch does it, pass by pass."""
        theirs = [p.grad for p in params]  # where states are offloaded, DeepSpeed's own buffers
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(p.dtype)
            if scale is not None:
                p.grad.mul_(scale)
        self.found_inf = None if bad is None else bad.float()  # torch's name for it
        super().step()
        step = self.state[params[0]]["step"]
        decays = self._decays(int(step) if bad is None else step)
        for key, decay in zip(self.ema_keys, decays, strict=True):
            rest: Any = 1.0 - decay
            if bad is not None:
                rest = ((~bad) * torch.as_tensor(rest, device=bad.device)).float()
                rest = [rest.to(p.device) for p in params]
            torch._foreach_lerp_([self.state[p][key] for p in params], list(params), rest)
        if low is not None:
            torch._foreach_copy_(list(low), list(params))
        for p, g in zip(params, theirs, strict=True):
            p.grad = g


def _norm_of(grads: Sequence[Tensor]) -> Tensor:
    """The norm of all together, float32."""
    if grads[0].device.type == "cpu":  # ATen adds up in few lanes there: pieces keep the digits
        grads = [piece for g in grads for piece in g.reshape(-1).split(NORM_PIECE)]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def bad_norm(norm: Tensor | float) -> Tensor:
    """Tell whether a gradient norm, a number or [], is NaN, infinite or DeepSpeed's -1 for either:
    bool [] on its device.
    """
    value = torch.as_tensor(norm).reshape(())
    return ~((value >= 0) & (value < float("inf")))  # a NaN compares as false
