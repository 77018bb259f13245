"""Interpolants: derivatives, ends, times, and velocities from a data prediction."""

import pytest
import torch

from fastrepa.interpolant import DATA_T_MIN, path_coefficients, velocity_from_data
from fastrepa.model.sit import SiT
from fastrepa.training.objective import lognormal_time


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_path_derivatives_and_ends(path):
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = path_coefficients(path, t)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        (slope,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        assert torch.allclose(slope, derivative, rtol=0, atol=1e-14)
    ends = torch.stack([alpha[0], sigma[0], alpha[-1], sigma[-1]])
    assert torch.allclose(ends, torch.tensor([1.0, 0, 0, 1]).double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_lognormal_time_sets_the_noise_to_signal_ratio(path):
    normal = torch.randn(100, dtype=torch.float64)
    alpha, sigma, *_ = path_coefficients(path, lognormal_time(path, normal))
    assert torch.allclose((sigma / alpha).log(), normal, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_true_data_give_the_true_velocity(path):
    z, noise = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    t = torch.linspace(DATA_T_MIN, 1, 6, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1, 1) for c in path_coefficients(path, t))
    x, exact = alpha * z + sigma * noise, d_alpha * z + d_sigma * noise
    assert torch.allclose(velocity_from_data(path, x, z, t), exact, rtol=0, atol=1e-12)


def test_a_data_prediction_stays_finite_at_the_data_end():
    x, z = torch.randn(2, 3, 1, 2, 2)
    v = velocity_from_data("linear", x, z, torch.tensor([0.0, 1e-6, 0.049]))
    assert torch.allclose(v, (x - z) / DATA_T_MIN, rtol=1e-5, atol=1e-6)


def test_the_model_reads_its_output_as_data_where_told_to():
    shape = {"side": 4, "channels": 3, "width": 32, "depth": 1, "heads": 2, "patch": 2,
             "num_classes": 4, "label_dropout": 0.0}  # fmt: skip
    plain, data = SiT(**shape), SiT(**shape, prediction="data", path="cosine")
    torch.nn.init.normal_(plain.final_layer.linear.weight)
    data.load_state_dict(plain.state_dict())
    x, t, labels = torch.randn(3, 3, 4, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    assert torch.equal(data(x, t, labels), velocity_from_data("cosine", x, plain(x, t, labels), t))
