"""A backend's trial: how wrong it may be, to a hundredth of the bound on either side."""

import math

import pytest
import torch

from fastrepa_kernels.attention import choice

# Ten units of bf16: what TF32 products may do, and far less than a wrong kernel.
BOUND = 10 * 2.0**-7


def trial(monkeypatch, factor):
    """Try a backend whose output, and its gradient with it, is `factor` times the exact one."""

    def run(name, qkv, *_):
        return factor * choice.attention_reference(qkv)

    monkeypatch.setattr(choice, "run", run)
    return choice._trial("math", torch.device("cpu"), torch.float64, 16, False)


@pytest.mark.parametrize(("share", "passes"), [(0.0, True), (0.99, True), (1.01, False)])
def test_the_error_a_backend_may_have(monkeypatch, share, passes):
    """The gradient of the sum of squares is off by factor^2 - 1, more than the output."""
    why = trial(monkeypatch, math.sqrt(1 + BOUND * share))
    assert why == ("" if passes else f"is wrong on this device by {BOUND * share:.1e}")


def test_a_backend_that_gives_nan_is_wrong(monkeypatch):
    assert trial(monkeypatch, math.nan) == "is wrong on this device by nan"
