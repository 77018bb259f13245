"""cost: counts against figures known from elsewhere, and ceilings that are really measured."""

import pytest
import torch

from fastrepa_kernels.cost import (
    Ceilings,
    Cost,
    diffusion_transformer_flops,
    matmul_cost,
    measure_ceilings,
    median_seconds,
)


@pytest.mark.parametrize(
    ("width", "depth", "giga_multiply_adds"), [(1152, 28, 118.6), (1024, 24, 80.7), (768, 12, 23.0)]
)
def test_sit_models_against_the_published_counts(width, depth, giga_multiply_adds):
    flops = diffusion_transformer_flops(1, 256, width, depth)
    assert flops / 2e9 == pytest.approx(giga_multiply_adds, abs=0.05)
    assert diffusion_transformer_flops(3, 256, width, depth) == 3 * flops


def test_costs_add_and_scale():
    product = matmul_cost(2, 3, 5, itemsize=4)
    assert product == Cost(flops=60, bytes=4 * (10 + 15 + 6))
    assert product + product == product * 2


def test_floor_is_the_larger_of_two_times():
    ceilings = Ceilings(bytes_per_second=10.0, flops_per_second=100.0)
    assert ceilings.floor_seconds(Cost(flops=500, bytes=10)) == 5.0
    assert ceilings.floor_seconds(Cost(flops=500, bytes=90)) == 9.0


def test_median_of_a_cpu_loop():
    calls = []
    assert median_seconds(lambda: calls.append(1), torch.device("cpu"), 5) > 0
    assert len(calls) == 8  # three to warm up


@pytest.mark.gpu
def test_ceilings_of_this_gpu():
    ceilings = measure_ceilings("cuda")
    assert ceilings.bytes_per_second > 1e11
    assert ceilings.flops_per_second > 1e12
