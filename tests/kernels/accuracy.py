"""The one rule of accuracy: ours is at most twice as wrong as eager, plus one rounding unit."""

import math

import torch


def distance(a, exact):
    return (a.double() - exact).norm().item() / max(exact.norm().item(), 1e-30)


def assert_as_good_as_eager(name, ours, eager, exact):
    """error(ours, float64) <= 2 x error(eager in the same dtypes, float64) + one rounding unit."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, not {eager.dtype}"
    error = distance(eager, exact)
    # NaN where eager overflows: then only the rounding unit is allowed.
    allowed = (2 * error if math.isfinite(error) else 0.0) + torch.finfo(ours.dtype).eps
    measured = distance(ours, exact)
    assert measured <= allowed, f"{name}: {measured:.2e} > {allowed:.2e} (eager {error:.2e})"


def gradients(function, inputs, upstream):
    """Outputs of `function` and the gradients of every input, given gradients of every output."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pulled = torch.autograd.grad(outputs, inputs, upstream)
    return [y.detach() for y in outputs], list(pulled)


def check(names, ours, eager, inputs, upstream):
    """The rule for every output and every gradient, with `eager` in float64 as the truth."""
    exact = gradients(eager, [x.double() for x in inputs], [g.double() for g in upstream])
    mine = gradients(ours, inputs, upstream)
    theirs = gradients(eager, inputs, upstream)
    for kind, a, b, c in zip(("output", "gradient of"), mine, theirs, exact, strict=True):
        labels = names if kind == "gradient of" else [str(i) for i in range(len(a))]
        for label, *values in zip(labels, a, b, c, strict=True):
            assert_as_good_as_eager(f"{kind} {label}", *values)
