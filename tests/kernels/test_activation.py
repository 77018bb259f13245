"""activation: SiLU and tanh-GELU passes against float64, and the column sums beside them."""

import pytest
import torch
import torch.nn.functional as F

from fastrepa_kernels import activation
from fastrepa_kernels.activation import (
    activate,
    activate_backward,
    activation_cost,
    column_sums,
)
from tests.kernels.accuracy import assert_as_good_as_eager

# The interpreter's exp overflows to inf in the far tail, where the logistic function is 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def reference(a, gelu):
    return F.gelu(a, approximate="tanh") if gelu else F.silu(a)


@pytest.mark.parametrize("gelu", [False, True], ids=["silu", "gelu"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 72), (130, 112), (3, 1023), (2, 1152)])
def test_as_good_as_eager(place, shape, gelu):
    a, dh = place.randn(*shape) * 3, place.randn(*shape)
    a[0] = 0

    def eager(dtype):
        leaf = a.to(dtype).requires_grad_()
        h = reference(leaf, gelu)
        (da,) = torch.autograd.grad(h, leaf, dh.to(dtype))
        return h.detach(), da, da.to(torch.promote_types(dtype, torch.float32)).sum(0)

    h, da, again = (torch.empty_like(a) for _ in range(3))
    activate(a, h, gelu=gelu)
    sums = activate_backward(dh, a, da, gelu=gelu, sums=True, again=again)
    names = ("h", "da", "sums")
    for name, *values in zip(
        names, (h, da, sums), eager(a.dtype), eager(torch.double), strict=True
    ):
        assert_as_good_as_eager(name, *values)
    assert torch.equal(again, h)


@pytest.mark.parametrize("gelu", [False, True], ids=["silu", "gelu"])
def test_in_place_and_without_sums(place_fp32, gelu):
    a, dh = place_fp32.randn(9, 70), place_fp32.randn(9, 70)
    h, da = torch.empty_like(a), torch.empty_like(a)
    activate(a, h, gelu=gelu)
    activate_backward(dh, a, da, gelu=gelu, sums=False)
    b = a.clone()
    assert activate_backward(dh, b, b, gelu=gelu, sums=False) is None
    assert torch.equal(b, da)
    activate(a, a, gelu=gelu)
    assert torch.equal(a, h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_cpu_goes_block_by_block(monkeypatch, dtype):
    a, dh = torch.randn(2, 30, 70, generator=torch.Generator().manual_seed(0)).to(dtype)

    def both():
        h, da, again = (torch.empty_like(a) for _ in range(3))
        activate(a, h, gelu=True)
        sums = activate_backward(dh, a, da, gelu=True, sums=True, again=again)
        return h, da, again, sums

    whole = both()
    monkeypatch.setattr(activation, "_BLOCK", 256)
    for one, blocks in zip(whole, both(), strict=True):
        torch.testing.assert_close(
            blocks, one, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-4
        )
    assert torch.allclose(column_sums(a).double(), a.double().sum(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (37, 70), (300, 130)])
def test_column_sums(place, shape):
    t = place.randn(*shape)
    sums = column_sums(t)
    assert sums.dtype == torch.float32
    assert_as_good_as_eager("sums", sums, t.float().sum(0), t.double().sum(0))
    assert torch.equal(column_sums(t), sums)


@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (1030, 5), (0, 4)])
def test_sum_of_parts(place_fp32, shape):
    """It sums in either way, which MOST_PARTS divides."""
    parts = place_fp32.randn(*shape)
    sums = activation.sum_of_parts(parts)
    assert_as_good_as_eager("sums", sums, parts.sum(0), parts.double().sum(0))
    assert torch.equal(activation.sum_of_parts(parts), sums)


def test_far_from_zero(place_fp32):
    """Neither tail overflows: exp(-x) at -80 is within fp32 and the product goes to zero."""
    a = torch.tensor([[-80.0, -20.0, 20.0, 80.0]], device=place_fp32.device)
    for gelu in (False, True):
        h, da = torch.empty_like(a), torch.empty_like(a)
        activate(a, h, gelu=gelu)
        activate_backward(torch.ones_like(a), a, da, gelu=gelu, sums=False)
        assert torch.allclose(h, a.clamp_min(0), atol=1e-7)
        assert torch.allclose(da, (a > 0).float(), atol=1e-6)


def test_empty(place_fp32):
    a = torch.empty(0, 8, device=place_fp32.device)
    activate(a, a, gelu=True)
    assert torch.equal(
        activate_backward(a, a, a, gelu=True, sums=True), torch.zeros(8, device=a.device)
    )


def test_cost():
    assert activation_cost(10, 7, 2).bytes == 10 * 7 * 2 * 2
    assert activation_cost(10, 7, 2, backward=True).bytes == 3 * 10 * 7 * 2
