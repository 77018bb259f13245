"""The norm's mean and rstd are those of the residual as it is stored, which backward will see.

A residual of half precision is rounded when it is stored; statistics of what it was before are off
by that rounding, thousands of times what float32 leaves. Outputs and gradients do not show it: in
half precision eager's own error is as large.
"""

import pytest

from fastrepa_kernels.adaln import EPS, _norm_modulate
from tests.kernels.accuracy import assert_as_good_as_eager


def statistics(x):
    mean = x.mean(-1)
    return mean, ((x - mean[..., None]).square().mean(-1) + EPS).rsqrt()


@pytest.mark.parametrize("shape", [(2, 7, 72), (1, 3, 1023), (2, 2, 1152)])
def test_statistics_are_of_the_stored_residual(place, shape):
    b, t, d = shape
    x, branch = place.randn(b, t, d) + 1, place.randn(b, t, d)
    gate, shift, scale = place.randn(b, 3 * d).chunk(3, dim=1)
    stored, _, *found = _norm_modulate(x, branch, gate, shift, scale, EPS, place.dtype)
    assert stored.dtype == place.dtype
    eager, exact = statistics(stored.float()), statistics(stored.double())
    for name, ours, theirs, true in zip(("mean", "rstd"), found, eager, exact, strict=True):
        assert_as_good_as_eager(name, ours, theirs, true)
