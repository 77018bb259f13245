"""Samplers against closed forms, and against a naive re-derivation from the published formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastrepa.errors import ConfigError
from fastrepa.generation.sampler import model_evaluations, sample, sampling_times

NULL = 7
F64 = torch.float64


def coefficients(path: str, t: float) -> tuple[float, float, float, float]:
    """Return alpha, sigma, alpha', sigma' of REPA's two paths, in Python's floats."""
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    half = math.pi / 2
    return (
        math.cos(half * t),
        math.sin(half * t),
        -half * math.sin(half * t),
        half * math.cos(half * t),
    )


class Gaussian:
    """The exact velocity field when the data are N(mean, std^2) in every element."""

    def __init__(self, path: str, mean: float, std: float) -> None:
        self.path, self.mean, self.std = path, mean, std

    def affine(self, t: float) -> tuple[float, float]:
        """v(x, t) = slope x + offset: E[alpha' z + sigma' eps | x_t = x]."""
        alpha, sigma, d_alpha, d_sigma = coefficients(self.path, t)
        variance = (alpha * self.std) ** 2 + sigma**2
        slope = (d_alpha * alpha * self.std**2 + d_sigma * sigma) / variance
        return slope, d_alpha * self.mean - slope * alpha * self.mean

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        slope, offset = self.affine(float(t[0]))
        return slope * x + offset

    def data(self, noise: Tensor) -> Tensor:
        """Return where the exact flow ends: it keeps the standardised value."""
        return self.mean + self.std * noise


def toy_model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Something nonlinear that mixes elements and depends on time and label."""
    t, labels = t.view(-1, 1, 1, 1), labels.view(-1, 1, 1, 1)
    return torch.sin(x + t) * (0.5 + 0.1 * labels) + 0.3 * x.roll(1, -1) - 0.2 * labels * t


def noise_like(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# Times and calls ---------------------------------------------------------------------------------


def test_times():
    assert sampling_times("ode", 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sampling_times("heun", 2) == [1.0, 0.5, 0.0]
    assert sampling_times("sde", 4) == pytest.approx([1.0, 0.68, 0.36, 0.04, 0.0], abs=1e-15)
    assert len(sampling_times("sde", 250)) == 251


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[int, float, list[int]]] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert x.shape[0] == t.shape[0] == labels.shape[0]
        assert (t == t[0]).all()
        assert not torch.is_grad_enabled()
        self.calls.append((x.shape[0], float(t[0]), labels.tolist()))
        self.dtypes |= {x.dtype, t.dtype}
        return torch.zeros_like(x)


@pytest.mark.parametrize(("sampler", "steps"), [("ode", 5), ("heun", 5), ("sde", 5), ("sde", 1)])
def test_number_of_model_evaluations(sampler, steps):
    recorder, finished = Recorder(), []
    result = sample(
        recorder,
        torch.zeros(2, 3, 4, 4),
        torch.tensor([0, 1]),
        sampler=sampler,
        steps=steps,
        cfg=1.0,
        null_label=NULL,
        step_noise=lambda i: torch.zeros(2, 3, 4, 4),
        progress=finished.append,
    )
    expected = {"ode": steps, "heun": 2 * steps - 1, "sde": steps}[sampler]
    assert len(recorder.calls) == expected == model_evaluations(sampler, steps)
    assert all(call[0] == 2 for call in recorder.calls)
    assert finished == list(range(1, steps + 1))
    assert recorder.dtypes == {torch.float32}
    assert result.dtype == torch.float32


@pytest.mark.parametrize(
    ("sampler", "cfg", "low", "high", "guided"),
    [
        # One entry per step of linspace(1, 0, 5): both ends of the interval belong to it.
        ("ode", 2.0, 0.25, 0.75, [False, True, True, True]),
        ("ode", 2.0, 0.0, 0.7, [False, False, True, True]),
        ("ode", 2.0, 0.0, 1.0, [True] * 4),
        ("ode", 1.0, 0.0, 1.0, [False] * 4),
        # Predictor and corrector of a step alike, by the step's start.
        ("heun", 2.0, 0.5, 0.75, [False, False, True, True, True, True, False]),
    ],
)
def test_the_unconditional_half_runs_only_where_guidance_acts(sampler, cfg, low, high, guided):
    recorder = Recorder()
    labels = torch.tensor([4, 5, 6])
    sample(
        recorder,
        torch.zeros(3, 1, 2, 2),
        labels,
        sampler=sampler,
        steps=4,
        cfg=cfg,
        guidance_low=low,
        guidance_high=high,
        null_label=NULL,
    )
    assert [call[0] for call in recorder.calls] == [6 if g else 3 for g in guided]
    for (_, _, seen), g in zip(recorder.calls, guided, strict=True):
        assert seen == ([4, 5, 6, NULL, NULL, NULL] if g else [4, 5, 6])


# Naive re-derivation -----------------------------------------------------------------------------


def naive(
    noise: Tensor,
    labels: Tensor,
    sampler: str,
    steps: int,
    cfg: float,
    low: float,
    high: float,
    path: str,
    draws: list[Tensor],
) -> Tensor:
    """The samplers one image at a time, both halves apart, guidance on the drift."""
    out = []
    for b in range(len(noise)):
        x = noise[b : b + 1]

        def velocity(x: Tensor, t: float, label: int) -> Tensor:
            return toy_model(x, torch.tensor([t], dtype=F64), torch.tensor([label]))

        def drift(x: Tensor, t: float, label: int) -> Tensor:
            v = velocity(x, t, label)
            if sampler != "sde":
                return v
            if path == "linear":
                score = -(x + (1 - t) * v) / t
            else:
                alpha, sigma, d_alpha, d_sigma = coefficients(path, t)
                score = (alpha / d_alpha * v - x) / (sigma**2 - alpha / d_alpha * d_sigma * sigma)
            w = 2 * t
            return v - 0.5 * w * score

        def guided(x: Tensor, t: float, decided_at: float, b: int = b) -> Tensor:
            d = drift(x, t, int(labels[b]))
            if cfg > 1 and low <= decided_at <= high:
                d_null = drift(x, t, NULL)
                return d_null + cfg * (d - d_null)
            return d

        if sampler == "sde":
            times = [1 + (0.04 - 1) * i / (steps - 1) for i in range(steps)] + [0.0]
        else:
            times = [1 - i / steps for i in range(steps + 1)]
        for i in range(steps):
            t, dt = times[i], times[i + 1] - times[i]
            d = guided(x, t, t)
            if sampler == "heun" and i < steps - 1:
                d = (d + guided(x + dt * d, times[i + 1], t)) / 2
            x = x + dt * d
            if sampler == "sde" and i < steps - 1:
                x = x + math.sqrt(2 * t * abs(dt)) * draws[i][b : b + 1]
        out.append(x)
    return torch.cat(out)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
@pytest.mark.parametrize(
    ("cfg", "low", "high"), [(1.0, 0.0, 1.0), (1.8, 0.0, 0.7), (4.0, 0.25, 0.75), (2.5, 0.0, 1.0)]
)
def test_against_the_naive_form(sampler, path, cfg, low, high):
    shape, steps = (3, 2, 4, 4), 7
    noise, labels = noise_like(shape, 0), torch.tensor([0, 3, 5])
    draws = [noise_like(shape, 100 + i) for i in range(steps - 1)]
    ours = sample(
        toy_model,
        noise,
        labels,
        sampler=sampler,
        steps=steps,
        cfg=cfg,
        guidance_low=low,
        guidance_high=high,
        path=path,
        null_label=NULL,
        step_noise=draws.__getitem__,
        dtype=F64,
    )
    expected = naive(noise, labels, sampler, steps, cfg, low, high, path, draws)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


# Closed forms ------------------------------------------------------------------------------------


def solve(sampler: str, steps: int, path: str, dtype: torch.dtype = F64) -> float:
    """The largest error against the exact flow of a Gaussian."""
    field = Gaussian(path, mean=0.7, std=0.4)
    noise = noise_like((4, 1, 4, 4), 1)
    x = sample(
        field,
        noise,
        torch.zeros(4, dtype=torch.int64),
        sampler=sampler,
        steps=steps,
        cfg=1.0,
        path=path,
        null_label=NULL,
        dtype=dtype,
    )
    return float((x.double() - field.data(noise)).abs().max())


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "order"), [("ode", 1), ("heun", 2)])
def test_order_of_convergence(sampler, order, path):
    errors = [solve(sampler, steps, path) for steps in (100, 200, 400, 800)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.08), orders


def test_float32_models_do_not_make_the_state_float32():
    """A thousand equal small steps: summed in float32 they would miss by more than this."""
    third = torch.full((1, 1, 2, 2), 1 / 3, dtype=torch.float32)
    x = sample(
        lambda x, t, labels: third,
        torch.full((1, 1, 2, 2), 100.0),
        torch.zeros(1, dtype=torch.int64),
        sampler="ode",
        steps=1000,
        cfg=1.0,
        null_label=NULL,
    )
    exact = torch.full((1, 1, 2, 2), 100.0, dtype=F64) - third.double()
    assert torch.equal(x, exact.float())


def test_a_float32_model_costs_only_its_own_rounding():
    in_float64 = solve("heun", 200, "linear")
    assert abs(solve("heun", 200, "linear", torch.float32) - in_float64) < 1e-6


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_marginal_statistics(path):
    """Empirical mean and variance against the affine recursion of the discretised process.

    The field is affine in x, so that every step maps a Gaussian to a Gaussian; the recursion in
    turn must end near the data's own mean and variance.
    """
    field, steps, count = Gaussian(path, mean=0.7, std=0.4), 100, 40_000
    generator = torch.Generator().manual_seed(5)
    shape = (count // 1000, 1, 10, 100)
    x = sample(
        field,
        torch.randn(shape, dtype=F64, generator=generator),
        torch.zeros(shape[0], dtype=torch.int64),
        sampler="sde",
        steps=steps,
        cfg=1.0,
        path=path,
        null_label=NULL,
        step_noise=lambda i: torch.randn(shape, dtype=F64, generator=generator),
        dtype=F64,
    )
    mean, variance = 0.0, 1.0
    times = [1 + (0.04 - 1) * i / (steps - 1) for i in range(steps)] + [0.0]
    for i in range(steps):
        t, dt = times[i], times[i + 1] - times[i]
        slope, offset = field.affine(t)
        alpha, sigma, _, _ = coefficients(path, t)
        marginal = (alpha * field.std) ** 2 + sigma**2
        # The score of the exact marginal, not by way of the velocity: -(x - alpha mean) / marginal.
        drift_slope = slope + t / marginal
        drift_offset = offset - t * alpha * field.mean / marginal
        mean += (drift_slope * mean + drift_offset) * dt
        variance *= (1 + drift_slope * dt) ** 2
        if i < steps - 1:
            variance += 2 * t * -dt
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(variance / count)
    assert abs(float(x.var()) - variance) < 5 * variance * math.sqrt(2 / count)
    assert mean == pytest.approx(field.mean, rel=0.01)
    assert variance == pytest.approx(field.std**2, rel=0.06)


def test_the_last_sde_step_adds_no_noise():
    asked: list[int] = []

    def step_noise(i: int) -> Tensor:
        asked.append(i)
        return torch.full((1, 1, 2, 2), 10.0, dtype=F64)

    sample(
        Recorder(),
        torch.zeros(1, 1, 2, 2),
        torch.zeros(1, dtype=torch.int64),
        sampler="sde",
        steps=4,
        cfg=1.0,
        null_label=NULL,
        step_noise=step_noise,
    )
    assert asked == [0, 1, 2]


def test_wrong_arguments_are_named():
    def run(**changes):
        arguments = {"sampler": "ode", "steps": 2, "cfg": 1.0, "null_label": NULL, **changes}
        noise, labels = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
        return sample(Recorder(), noise, labels, **arguments)

    with pytest.raises(ConfigError, match=r"'huen' is not one of.*did you mean 'heun'"):
        run(sampler="huen")
    with pytest.raises(ConfigError, match="steps: 0 "):
        run(steps=0)
    with pytest.raises(ConfigError, match=r"guidance_low: 0\.8 is above guidance_high = 0\.7"):
        run(cfg=1.5, guidance_low=0.8, guidance_high=0.7)
    with pytest.raises(ValueError, match="step_noise"):
        run(sampler="sde")
    with pytest.raises(ValueError, match="path"):
        run(path="quadratic")
