"""An average that was never kept, against the same one kept all along."""

import numpy as np
import pytest
import torch
from safetensors.torch import save

from fastrepa.checkpoint.averages import recorded
from fastrepa.checkpoint.format import RunState, checkpoint_path, part_name, seal
from fastrepa.checkpoint.host_tensors import write_durably
from fastrepa.checkpoint.kinds import ema_keys
from fastrepa.commands.convert.posthoc import combination, posthoc_ema
from fastrepa.config import EmaConfig
from fastrepa.errors import CheckpointError
from fastrepa.training.optimizer import power_gamma
from fastrepa_kernels.adamw_ema import power_decay

KEPT = (EmaConfig(sigma_rel=0.05), EmaConfig(sigma_rel=0.10))
STEPS, EVERY, SIGMA = 800, 50, 0.08


def trained_run(run, *, since=None):
    """Checkpoints of a weight on a random walk, and its average of SIGMA kept all along."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.zeros(64, dtype=torch.float64)
    gammas = [power_gamma(s) for s in (0.05, 0.10, SIGMA)]
    averages = [weight.clone() for _ in gammas]
    for t in range(1, STEPS + 1):
        weight = weight + 0.01 * torch.randn(64, generator=generator, dtype=torch.float64)
        for average, gamma in zip(averages, gammas, strict=True):
            average.lerp_(weight, 1 - power_decay(t, gamma))
        if t % EVERY == 0:
            folder = checkpoint_path(run, t)
            folder.mkdir(parents=True)
            fixed = torch.arange(3.0)
            tensors = {"weight": {"w": weight.float(), "fixed": fixed},
                       "exp_avg": {"w": weight.float()},
                       "exp_avg_sq": {"w": weight.float()}}  # fmt: skip
            for kind, average in zip(ema_keys(KEPT), averages, strict=False):
                tensors[kind] = {"w": average.float(), "fixed": fixed}
            files = {}
            for kind, named in tensors.items():
                name = part_name(kind, 0, 1)
                files[name] = write_durably(folder / name, [save(named)])
            state = RunState(
                step=t, optimizer_step=t, samples_seen=0, side=1, channels=1, encoder_widths=[],
                classes=[], world_size=1, emas=recorded(KEPT), ema_since=since or {},
            )  # fmt: skip
            seal(folder, files, state)
    return averages


def test_the_combination_is_the_average_that_was_not_kept(tmp_path):
    short, long, wanted = trained_run(tmp_path)
    tensors, missed = posthoc_ema(tmp_path, checkpoint_path(tmp_path, STEPS), SIGMA)
    error = (tensors["w"].double() - wanted).norm()
    nearest = min((wanted - short).norm(), (wanted - long).norm())
    assert error < nearest / 20
    assert missed < 0.01
    assert torch.equal(tensors["fixed"], torch.arange(3.0))  # not scaled by the coefficients' sum


def test_a_stored_average_is_itself(tmp_path):
    """An average that began in the middle, or is damaged, does not count."""
    short, *_ = trained_run(tmp_path)
    tensors, missed = posthoc_ema(tmp_path, checkpoint_path(tmp_path, STEPS), 0.05)
    assert missed < 1e-6
    assert torch.allclose(tensors["w"].double(), short, rtol=0, atol=1e-5)
    other = tmp_path / "other"
    trained_run(other, since=dict.fromkeys(ema_keys(KEPT), 7))
    with pytest.raises(CheckpointError, match="no power-function averages kept from the start"):
        posthoc_ema(other, checkpoint_path(other, STEPS), 0.05)


def test_a_profile_that_is_not_there_is_a_warning(tmp_path):
    trained_run(tmp_path)
    with pytest.warns(UserWarning, match=r"sigma_rel=0.01: \d+% of its profile is not in the 32"):
        posthoc_ema(tmp_path, checkpoint_path(tmp_path, STEPS), 0.01)


def test_the_combination_is_the_least_squares_of_the_profiles():
    """Against profiles sampled on a grid, at times beyond t^gamma's range in float64."""
    times, gammas = np.array([2e5, 3e5, 4e5, 4e5]), np.array([16.97, 6.94, 16.97, 6.94])
    x, missed = combination(times, gammas, 4e5, 10.0)
    tau = (np.arange(200_000) + 0.5) * 2.0
    ratio = [
        (g + 1) / t * np.where(tau < t, tau / t, 0.0) ** g
        for t, g in zip(times, gammas, strict=True)
    ]
    wanted = 11.0 / 4e5 * (tau / 4e5) ** 10.0
    best, *_ = np.linalg.lstsq(np.array(ratio).T, wanted, rcond=None)
    assert x == pytest.approx(best, rel=1e-3, abs=1e-4)
    difference = wanted - np.array(ratio).T @ x
    grid = np.linalg.norm(difference) / np.linalg.norm(wanted)
    assert missed == pytest.approx(grid, rel=1e-2)
    assert np.isfinite(combination([4e5, 4e5], [98.0, 16.97], 4e5, 60.0)[0]).all()
