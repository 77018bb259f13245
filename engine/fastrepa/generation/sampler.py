"""Samplers of latents: probability-flow ODE (Euler, Heun) and reverse SDE (Euler-Maruyama).

The network's velocity v(x, t) carries noise at t = 1 to data at t = 0 (SiT: Ma et al. 2024, section
2; REPA: Yu et al. 2025, appendix on sampling). The state is float64 throughout; only the network
runs in its own precision. Shapes: B batch, C channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastrepa.errors import ConfigError, nearest
from fastrepa.interpolant import path_coefficients

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""model(x [B,C,h,w], t [B], labels [B] int64) -> velocity [B,C,h,w]."""

SAMPLERS = ("ode", "heun", "sde")

# The SDE's drift and diffusion are not integrated below this time: one noiseless step ends there.
SDE_LAST_TIME = 0.04


def sampling_times(sampler: str, steps: int) -> list[float]:
    """The steps + 1 times, from 1 to 0, that a sampler's state stands at.

    ode, heun: linspace(1, 0, steps + 1). sde: linspace(1, 0.04, steps), then 0.
    Raises ConfigError for another sampler or fewer than one step.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(
            f"sampler: {sampler!r} is not one of {', '.join(SAMPLERS)}{nearest(sampler, SAMPLERS)}"
        )
    if steps < 1:
        raise ConfigError(f"steps: {steps} is less than 1")
    if sampler == "sde":
        return [*torch.linspace(1, SDE_LAST_TIME, steps, dtype=torch.float64).tolist(), 0.0]
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


def model_evaluations(sampler: str, steps: int) -> int:
    """Count `sample`'s calls of the network; a guided one counts once (on twice the batch)."""
    return 2 * steps - 1 if sampler == "heun" else steps


@dataclass(frozen=True)
class _Guided:
    """The network under classifier-free guidance (Ho and Salimans 2022) on an interval of time.

    v = v_null + cfg (v_label - v_null) where cfg > 1 and low <= t <= high (Kynkaanniemi et al.
    2024); elsewhere v = v_label, and the unconditional half is not computed.
    """

    model: Velocity
    labels: Tensor
    null_labels: Tensor
    cfg: float
    low: float
    high: float
    dtype: torch.dtype

    def active(self, t: float) -> bool:
        return self.cfg > 1.0 and self.low <= t <= self.high

    def velocity(self, x: Tensor, t: float, guided: bool) -> Tensor:
        """v(x, t) [B,C,h,w] float64 for the float64 state x; both halves in one forward."""
        labels = self.labels
        if guided:
            x = torch.cat((x, x))
            labels = torch.cat((labels, self.null_labels))
        # full() takes the number by value: no copy from the host that would wait for the device.
        time = torch.full((x.shape[0],), t, dtype=self.dtype, device=x.device)
        v = self.model(x.to(self.dtype), time, labels).double()
        if guided:
            v_label, v_null = v.chunk(2)
            v = v_null + self.cfg * (v_label - v_null)
        return v


@torch.no_grad()
def sample(
    model: Velocity,
    noise: Tensor,
    labels: Tensor,
    *,
    sampler: str,
    steps: int,
    cfg: float = 1.0,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    path: str = "linear",
    null_label: int,
    step_noise: Callable[[int], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Latents [B,C,h,w] in `dtype` from noise [B,C,h,w] (any float dtype) and labels [B] int64.

    `model` maps (x [B or 2B,C,h,w], t, labels) to a velocity and is called in `dtype`, which is its
    own; it must be in eval mode. `step_noise(i)` gives the standard normal [B,C,h,w] of the sde's
    step i = 0 .. steps - 2. `progress(i)` is called after step i = 1 .. steps.

    - ode: x += (t' - t) v(x, t).
    - heun: the same, then the mean of v at both ends of the step, except on the last step. Whether
      guidance acts is decided at the step's start, for both of its evaluations.
    - sde: with w = 2t and the score s that belongs to v, x += (v - w s / 2) dt + sqrt(w |dt|) n;
      the last step, from 0.04 to 0, adds no noise.

    Raises ConfigError for an unknown sampler, steps < 1 or an empty guidance interval, and
    ValueError for an unknown path or a missing `step_noise`.
    """
    times = sampling_times(sampler, steps)
    if cfg > 1 and guidance_low > guidance_high:
        raise ConfigError(
            f"guidance_low: {guidance_low} is above guidance_high = {guidance_high}:"
            f" cfg = {cfg} would never act"
        )
    if sampler == "sde" and step_noise is None and steps > 1:
        raise ValueError("step_noise: the sde sampler needs it")
    field = _Guided(
        model, labels, torch.full_like(labels, null_label), cfg, guidance_low, guidance_high, dtype
    )
    # On the host and for all times at once: the loop below never waits for the device.
    coefficients = torch.stack(
        path_coefficients(path, torch.tensor(times, dtype=torch.float64)), dim=1
    ).tolist()
    x = noise.double()
    for i, (t, t_next) in enumerate(pairwise(times)):
        dt, last = t_next - t, i == steps - 1
        guided = field.active(t)
        v = field.velocity(x, t, guided)
        if sampler == "sde":
            alpha, sigma, d_alpha, d_sigma = coefficients[i]
            ratio = alpha / d_alpha
            score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
            x = x + (v - t * score) * dt  # w / 2 = t
            if not last:
                assert step_noise is not None
                x = x + (2 * t * -dt) ** 0.5 * step_noise(i).double()
        elif sampler == "heun" and not last:
            v_next = field.velocity(x + dt * v, t_next, guided)
            x = x + dt * (0.5 * v + 0.5 * v_next)
        else:
            x = x + dt * v
        if progress is not None:
            progress(i + 1)
    return x.to(dtype)
