"""The objective in closed form: what a prediction costs, at every time."""

import math

import pytest
import torch

from fastrepa.config import ObjectiveConfig
from fastrepa.interpolant import velocity_from_data
from fastrepa.model.sit import SiT
from fastrepa.training.objective import Objective

PATHS = ("linear", "cosine")
# Both ends, both sides of the clamp at 0.05, and the clamp itself.
TIMES = torch.tensor([0.0, 1e-6, 0.01, 0.03, 0.049, 0.05, 0.051, 0.3, 0.7, 0.99, 1.0])


def clamped_square(path):
    """The square of what a prediction of the data is divided by, for each of TIMES: float64."""
    t = TIMES.double().clamp(min=0.05)
    return t**2 if path == "linear" else (torch.sin(math.pi / 2 * t) / (math.pi / 2)) ** 2


def example(path, prediction):
    z, noise = torch.randn(2, len(TIMES), 3, 4, 4)
    objective = Objective(ObjectiveConfig(path=path, prediction=prediction))
    return objective, z, noise, *objective.interpolate(z, noise, TIMES)


@pytest.mark.parametrize("path", PATHS)
def test_a_perfect_prediction_of_the_data_costs_nothing_at_any_time(path):
    objective, z, _, x, target = example(path, "data")
    velocity = velocity_from_data(path, x, z, TIMES)
    assert torch.equal(velocity, target)
    assert objective.velocity_loss(velocity, target) == 0


@pytest.mark.parametrize("path", PATHS)
def test_an_error_in_the_data_costs_its_square_over_the_clamped_sigma_squared(path):
    objective, z, _, x, target = example(path, "data")
    error = torch.randn_like(z)
    velocity = velocity_from_data(path, x, z + error, TIMES)
    expected = error.double().square().mean((1, 2, 3)) / clamped_square(path)
    costs = [objective.velocity_loss(v, w) for v, w in zip(velocity, target, strict=True)]
    assert torch.allclose(torch.stack(costs).double(), expected, rtol=1e-4, atol=0)
    loss = objective.velocity_loss(velocity, target).double()
    assert torch.allclose(loss, expected.mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_the_models_data_and_the_target_are_clamped_alike(path):
    """A model whose last layer is zero predicts z = 0, whose error is z."""
    model = SiT(side=4, channels=3, width=32, depth=1, heads=2, patch=2, num_classes=4,
                prediction="data", path=path).eval()  # fmt: skip
    objective, z, _, x, target = example(path, "data")
    with torch.no_grad():
        velocity = model(x, TIMES, torch.zeros(len(TIMES), dtype=torch.int64))
    expected = (z.double().square().mean((1, 2, 3)) / clamped_square(path)).mean()
    loss = objective.velocity_loss(velocity, target).double()
    assert torch.allclose(loss, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", ["velocity", "data"])
@pytest.mark.parametrize("path", PATHS)
def test_samples_and_targets(path, prediction):
    """x_t = alpha z + sigma eps, and its derivative; the clamp scales a data target below 0.05."""
    _, z, noise, x, target = example(path, prediction)
    z, noise, t = z.double(), noise.double(), TIMES.double().view(-1, 1, 1, 1)
    if path == "linear":
        alpha, sigma, velocity = 1 - t, t, noise - z
    else:
        alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        velocity = math.pi / 2 * (alpha * noise - sigma * z)
    if prediction == "data":
        low = 0.05 if path == "linear" else math.sin(math.pi / 2 * 0.05)
        velocity = velocity * (sigma / low).clamp(max=1)
    assert torch.allclose(x.double(), alpha * z + sigma * noise, rtol=0, atol=1e-6)
    assert torch.allclose(target.double(), velocity, rtol=0, atol=1e-4)


def test_the_velocity_loss_is_the_mean_square_in_float32():
    a, b = torch.randn(2, 3, 4, 5, 5).bfloat16()
    loss = Objective.velocity_loss(a, b)
    assert loss.dtype == torch.float32
    exact = (a.double() - b.double()).square().mean()
    assert torch.allclose(loss.double(), exact, rtol=1e-6, atol=0)
