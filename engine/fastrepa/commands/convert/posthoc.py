"""Post-hoc EMA: an average that was never kept, from the power-function averages that were.

Karras et al. 2024, section 3.2 and appendix C. An average of time t (updates taken) weighs the
weights of time tau by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), 0 < tau < t. The wanted p is
approached by a linear combination of the stored ones, least squares over tau; the same combination
of the stored averages is the wanted average.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrepa.checkpoint.format import (
    NotFinite,
    StoredTensors,
    check_finite,
    checkpoints,
    damage,
    read_state,
)
from fastrepa.checkpoint.kinds import WEIGHT
from fastrepa.config import EmaConfig
from fastrepa.errors import CheckpointError
from fastrepa.runtime.progress import counted
from fastrepa.training.optimizer import power_gamma

ENOUGH = 0.05  # of a profile that may be missing without a word


@dataclass(frozen=True)
class Snapshot:
    """A stored power-function average, after how many updates, and its gamma."""

    tensors: Mapping[str, Tensor]
    time: int
    gamma: float


def snapshots(run: Path, *, until: Path) -> list[Snapshot]:
    """Find the snapshots of every good checkpoint up to `until`, kept from the start on."""
    found = []
    for path in counted(checkpoints(run, until=until), "verifying"):
        if path != until and damage(path) is not None:
            continue
        try:
            found += _of_checkpoint(path)
        except NotFinite:
            continue
        except CheckpointError:
            if path.is_dir():  # otherwise the run has just pruned it
                raise
    return found


def _of_checkpoint(path: Path) -> list[Snapshot]:
    state, found = read_state(path), []
    for kind, value in state.emas.items():
        ema = EmaConfig.model_validate(value)
        from_the_start = state.optimizer_step > 0 and kind not in state.ema_since
        if ema.sigma_rel is not None and from_the_start:
            tensors = StoredTensors(path, kind)
            check_finite(path, kind, tensors)
            found.append(Snapshot(tensors, state.optimizer_step, power_gamma(ema.sigma_rel)))
    return found


def combination(
    times: Sequence[float], gammas: Sequence[float], time: float, gamma: float
) -> tuple[np.ndarray, float]:
    """Return (coefficients of the stored profiles, what the sum misses of the wanted one: the L2
    norm of the difference over that of the wanted).
    """
    t, g = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    inner = _inner(t[:, None], g[:, None], t[None], g[None])
    wanted, square = _inner(t, g, time, gamma), _inner(time, gamma, time, gamma)
    # Scaled to unit norm, which keeps profiles of early and late times comparable.
    norms = np.sqrt(np.diag(inner))
    unit = np.linalg.lstsq(inner / np.outer(norms, norms), wanted / norms, rcond=1e-13)[0]
    x = unit / norms
    missed = square - 2 * x @ wanted + x @ inner @ x
    return x, float(np.sqrt(max(0.0, missed) / square))


def _inner(t_a, gamma_a, t_b, gamma_b):
    """The integral of p_a p_b over tau. In logarithms: t^gamma is beyond float64 soon."""
    log = (gamma_a + gamma_b + 1) * np.log(np.minimum(t_a, t_b))
    log = log - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * np.exp(log)


def posthoc_ema(run: Path, newest: Path, sigma_rel: float) -> tuple[dict[str, Tensor], float]:
    """Return (the average of this relative deviation at the newest checkpoint, what it misses).

    Tensors are float32 [...], by parameter name; what is not trained is the newest checkpoint's.
    Warns where much is missing.
    Raises CheckpointError where no power-function average is stored.
    """
    stored = snapshots(run, until=newest)
    if not stored:
        raise CheckpointError(
            f"--ema-sigma-rel: {run} has no power-function averages kept from the start; train "
            "with training.ema=[{sigma_rel: 0.05}, {sigma_rel: 0.1}] and keep several checkpoints"
        )
    time = float(read_state(newest).optimizer_step)
    x, missed = combination(
        [s.time for s in stored], [s.gamma for s in stored], time, power_gamma(sigma_rel)
    )
    if missed > ENOUGH:
        warnings.warn(
            f"sigma_rel={sigma_rel}: {missed:.0%} of its profile is not in the "
            f"{len(stored)} stored averages; keep more checkpoints (training.keep_every)",
            stacklevel=2,
        )
    opened = [s.tensors for s in stored]
    trained, weights = StoredTensors(newest, "exp_avg"), StoredTensors(newest, WEIGHT)
    return {
        name: _sum(name, opened, x) if name in trained else weights[name]
        for name in counted(weights, "combining")
    }, missed


def _sum(name: str, opened: Sequence[Mapping[str, Tensor]], x: np.ndarray) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for tensors, factor in zip(opened, x, strict=True):
        total = total + float(factor) * tensors[name].double()
    return total.float()
