"""adamw_ema_: against float64, against torch.optim.AdamW, T1 in the interpreter, T3 on a GPU."""

import pytest
import torch

from fastrepa_kernels.adamw_ema import (
    CPU_GROUP,
    adamw_ema_,
    adamw_ema_cost,
    adamw_ema_reference,
    power_decay,
)
from tests.kernels.accuracy import assert_as_good_as_eager

NAMES = ("param", "exp_avg", "exp_avg_sq", "ema")
RATES = {
    "lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.99,
}  # fmt: skip


def state(place, size, dtype=torch.float32):
    p, m, e = (place.randn(size, dtype=dtype) for _ in range(3))
    v = place.randn(size, dtype=dtype).square()
    g = place.randn(size)
    if size > 3:
        g[0], m[0], v[0] = 0, 0, 0  # eps alone keeps this one finite
        g[1], m[1], v[1] = 1e-8, 2e-8, 1e-16  # and counts as much as the root in this one
    return p, g, m, v, e


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize("size", [1, 5, 1023, 3000])
def test_as_good_as_eager(place, size, step):
    p, g, m, v, e = state(place, size)
    options = {**RATES, "step": step, "grad_scale": 0.37}
    exact = adamw_ema_reference(*(t.double() for t in (p, g, m, v, e)), **options)
    eager = adamw_ema_reference(p, g, m, v, e, **options)
    low = torch.full_like(p, float("nan"), dtype=torch.float16)
    adamw_ema_(p, g, m, v, e, **options, low_precision=low)
    for name, *values in zip(NAMES, (p, m, v, e), eager, exact, strict=True):
        assert_as_good_as_eager(name, *values)
    # The interpreter truncates where hardware rounds: within one unit either way.
    assert torch.allclose(low.float(), p, rtol=torch.finfo(torch.float16).eps, atol=1e-7)


DECAYS = (0.99, 0.5, 0.9999, 0.0)


def with_averages(place, size, count):
    """Make params, grads and moments as `state` makes them, and `count` averages."""
    p, g, m, v, _ = state(place, size)
    return p, g, m, v, [place.randn(size, dtype=p.dtype) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("size", [5, 3000])
def test_several_averages_in_one_pass(place, size, count):
    p, g, m, v, emas = with_averages(place, size, count)
    options = {**RATES, "ema_decay": DECAYS[:count], "step": 7, "grad_scale": 0.37}
    double = [t.double() for t in (p, g, m, v)]
    exact = adamw_ema_reference(*double, [e.double() for e in emas], **options)
    eager = adamw_ema_reference(p, g, m, v, emas, **options)
    adamw_ema_(p, g, m, v, emas, **options)
    names = [*NAMES[:3], *(f"ema {i}" for i in range(count))]
    for name, *values in zip(names, (p, m, v, *emas), eager, exact, strict=True):
        assert_as_good_as_eager(name, *values)


@pytest.mark.parametrize("flag", [False, True])
def test_decays_on_the_device_and_a_bad_step_moves_none(place_fp32, flag):
    before = with_averages(place_fp32, 700, 3)
    device = before[0].device
    p, g, m, v = (t.clone() for t in before[:4])
    emas = [e.clone() for e in before[4]]
    step = torch.tensor(5.0, dtype=torch.float64, device=device)
    if flag:
        g[:] = float("nan")
    options = {**RATES, "ema_decay": [0.99, power_decay(step, 6.9), power_decay(step, 16.0)]}
    skip = torch.tensor(flag, device=device)
    adamw_ema_([p], [g], [m], [v], [[e] for e in emas], **options, step=step, skip=skip)
    if flag:
        assert all(map(torch.equal, (p, m, v, *emas), (before[0], *before[2:4], *before[4])))
        return
    options["ema_decay"] = [0.99, 0.8**7.9, 0.8**17]
    double = [t.double() for t in before[:4]]
    exact = adamw_ema_reference(*double, [e.double() for e in before[4]], step=5, **options)
    eager = adamw_ema_reference(*before, step=5, **options)
    for i, values in enumerate(zip((p, m, v, *emas), eager, exact, strict=True)):
        assert_as_good_as_eager(str(i), *values)


def test_one_of_several_averages_is_the_one_alone(place_fp32):
    """They agree to the bit, so a second average changes no run."""
    alone, several = state(place_fp32, 900), with_averages(place_fp32, 900, 2)
    for t, source in zip((*several[:4], several[4][0]), alone, strict=True):
        t.copy_(source)
    adamw_ema_(*alone, step=4, **RATES)
    adamw_ema_(*several, step=4, **RATES | {"ema_decay": [RATES["ema_decay"], 0.5]})
    assert all(map(torch.equal, alone, (*several[:4], several[4][0])))


@pytest.mark.parametrize("gamma", [0.2, 6.94])
def test_power_decay_averages_with_a_power_function(gamma):
    """The average of update T is the sum of w_t p_t, and w_t the integral of the profile
    (gamma + 1) tau^gamma / T^(gamma + 1) from t - 1 to t: the first update takes the weights whole.
    """
    count = 400
    weights = torch.zeros(count, dtype=torch.float64)
    for t in range(1, count + 1):
        decay = power_decay(t, gamma)
        weights *= decay
        weights[t - 1] = 1 - decay
    assert power_decay(1, gamma) == 0.0
    integral = (torch.arange(count + 1, dtype=torch.float64) / count) ** (gamma + 1)
    assert torch.allclose(weights, integral.diff(), rtol=1e-9, atol=0)


def test_many_steps_against_torch_adamw(place_fp32):
    """The update is torch.optim.AdamW's, in float64 on its side, over ten steps."""
    p = place_fp32.randn(300)
    theirs = p.double().clone().requires_grad_()
    rates = {k: RATES[k] for k in ("lr", "betas", "eps", "weight_decay")}
    optimiser = torch.optim.AdamW([theirs], **rates)
    m, v, e = torch.zeros_like(p), torch.zeros_like(p), p.clone()
    average = p.double().clone()
    for step in range(1, 11):
        g = place_fp32.randn(300)
        theirs.grad = g.double()
        optimiser.step()
        average.lerp_(theirs.detach(), 1 - RATES["ema_decay"])
        adamw_ema_(p, g, m, v, e, step=step, **RATES)
    assert torch.allclose(p.double(), theirs.detach(), rtol=0, atol=1e-6)
    assert torch.allclose(e.double(), average, rtol=0, atol=1e-6)


def test_float64_is_the_formula():
    p, g, m, v, e = (torch.rand(50, dtype=torch.float64) for _ in range(5))
    expected = adamw_ema_reference(p, g, m, v, e, step=3, **RATES)
    adamw_ema_(p, g, m, v, e, step=3, **RATES)
    for ours, theirs in zip((p, m, v, e), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("flag", [False, True])
def test_scalars_on_the_device(place_fp32, flag):
    """step, lr, grad_scale and skip as tensors give what numbers give; a bad step, nothing."""
    before = state(place_fp32, 700)
    device = before[0].device
    p, g, m, v, e = (t.clone() for t in before)
    low = torch.zeros_like(p)
    options = {**RATES, "lr": torch.tensor(RATES["lr"], dtype=torch.float64, device=device)}
    adamw_ema_(
        p, g, m, v, e, **options, step=torch.tensor(5, device=device),
        grad_scale=torch.tensor(0.5, device=device), skip=torch.tensor(flag, device=device),
        low_precision=low,
    )  # fmt: skip
    if flag:
        assert all(map(torch.equal, (p, g, m, v, e), before))
        assert not low.any()
        return
    exact = adamw_ema_reference(*(t.double() for t in before), step=5, grad_scale=0.5, **RATES)
    eager = adamw_ema_reference(*before, step=5, grad_scale=0.5, **RATES)
    for name, *values in zip(NAMES, (p, m, v, e), eager, exact, strict=True):
        assert_as_good_as_eager(name, *values)


def test_a_bad_step_with_nan_gradients_changes_nothing(place_fp32):
    p, g, m, v, e = state(place_fp32, 100)
    before = [t.clone() for t in (p, m, v, e)]
    g[:] = float("nan")
    skip = torch.ones(1, device=p.device)
    scale = torch.full((), float("nan"), device=p.device)
    adamw_ema_(p, g, m, v, e, step=1, **RATES, skip=skip, grad_scale=scale)
    assert all(map(torch.equal, (p, m, v, e), before))


@pytest.mark.parametrize("cuts", [(1,), (7, 500), (333, 334, 1000), (64, 128)])
def test_the_result_does_not_depend_on_how_the_tensor_is_cut(place_fp32, cuts):
    *whole, second = (*state(place_fp32, 2000), place_fp32.randn(2000))
    *parts, others = [
        [t[a:b].clone() for a, b in zip((0, *cuts), (*cuts, 2000), strict=True)]
        for t in (*whole, second)
    ]
    rates = {**RATES, "ema_decay": [0.99, 0.9]}
    adamw_ema_(*whole[:4], [whole[4], second], step=3, **rates)
    adamw_ema_(*parts[:4], [parts[4], others], step=3, **rates)
    for t, pieces in zip((*whole, second), (*parts, others), strict=True):
        assert torch.equal(t, torch.cat(pieces))


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
def test_cutting_across_blocks_of_the_torch_path(threads):
    """Nor on how many threads share the work."""
    a, b = 1001, 1001 + 49_999
    size = 2 * CPU_GROUP + 77
    whole = [torch.rand(size) for _ in range(5)]
    parts = [[t[:a].clone(), t[a:b].clone(), t[b:].clone()] for t in whole]
    adamw_ema_(*whole, step=3, **RATES)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        adamw_ema_(*parts, step=3, **RATES)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(t, torch.cat(pieces)) for t, pieces in zip(whole, parts, strict=True))


def test_lists_of_shaped_tensors_and_no_ema(place_fp32):
    shapes = [(3, 5), (7,), (0,), ()]
    params, grads, m, v = ([place_fp32.randn(*s).abs() for s in shapes] for _ in range(4))
    expected = [
        adamw_ema_reference(*entry, entry[0], step=2, **RATES)
        for entry in zip(params, grads, m, v, strict=True)
    ]
    adamw_ema_(params, grads, m, v, None, step=2, **RATES)
    for p, truth in zip(params, expected, strict=True):
        assert torch.allclose(p, truth[0], rtol=1e-6)
    adamw_ema_([], [], [], [], [], step=1, **RATES)


def test_parameters_that_require_gradients(place_fp32):
    p = torch.nn.Parameter(place_fp32.randn(9))
    version = p._version
    g, m, v, e = (place_fp32.randn(9).abs() for _ in range(4))
    adamw_ema_([p], [g], [m], [v], [e], step=1, **RATES)
    assert p._version > version  # autograd notices the change
    assert p.requires_grad
    assert p.grad_fn is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grads": [torch.zeros(3)] * 2}, "grads must have 1 tensors"),
        ({"ema": [torch.zeros(3)] * 2}, "ema must have 1 tensors"),
        ({"exp_avg": torch.zeros(4)}, r"exp_avg\[0\] must be \(3,\)"),
        ({"exp_avg_sq": torch.zeros(3, device="meta")}, r"exp_avg_sq\[0\] must be"),
        ({"grads": torch.zeros(6)[::2]}, r"grads\[0\] must be contiguous"),
        ({"params": torch.zeros(3, dtype=torch.bfloat16)}, r"params\[0\] must be float32"),
        ({"ema": torch.zeros(3, dtype=torch.bfloat16)}, r"ema\[0\] must be torch.float32"),
        ({"grads": torch.zeros(3, dtype=torch.int32)}, r"grads\[0\] must be floating"),
        ({"ema_decay": [0.9]}, r"ema must have an entry for each of at most 4 decays; got 3 for 1"),
        ({"ema": [torch.zeros(3)] * 5, "ema_decay": [0.9] * 5}, "ema must have an entry .* 5 for"),
        ({"ema": [torch.zeros(3), torch.zeros(2)], "ema_decay": [0.9] * 2}, r"ema\[1\]\[0\] must"),
        ({"step": 0}, "step counts from 1"),
        ({"skip": torch.zeros(2)}, "skip must have one element"),
    ],
)
def test_errors_name_the_argument(change, words):
    names = ("params", "grads", "exp_avg", "exp_avg_sq", "ema")
    given = {name: torch.zeros(3) for name in names} | {"step": 1, "lr": 1e-3} | change
    with pytest.raises(ValueError, match=f"adamw_ema_: {words}"):
        adamw_ema_(**given)


def test_registration():
    *lists, emas, more, low = [[torch.rand(4), torch.rand(2, 3)] for _ in range(7)]
    for control in (None, torch.tensor([1.0, 1.0, 0.9, 0.1, 1.1, 0.1, 0.2])):
        torch.library.opcheck(
            torch.ops.fastrepa.adamw_ema_,
            (*lists, emas + more, low, control, [1.0, 0.9, 0.1, 1.1, 0.1, 0.2], [0.9, 0.99], 1e-8),
        )


def test_compiled_graph_is_whole_and_agrees(place_fp32):
    backend = "inductor" if place_fp32.device == "cuda" else "aot_eager"

    def step(p, g, m, v, e, skip):
        adamw_ema_(p, g * 2, m, v, e, step=3, skip=skip, **RATES)

    plain = state(place_fp32, 200)
    compiled = [t.clone() for t in plain]
    skip = torch.zeros((), device=plain[0].device)
    step(*plain, skip)
    torch.compile(step, fullgraph=True, backend=backend)(*compiled, skip)
    assert all(map(torch.equal, plain, compiled))


def test_two_runs_agree_bitwise(place):
    first = state(place, 500)
    second = [t.clone() for t in first]
    adamw_ema_(*first, step=3, **RATES)
    adamw_ema_(*second, step=3, **RATES)
    assert all(map(torch.equal, first, second))


def test_cost():
    """675M parameters with bf16 gradients and weights: 36 bytes each."""
    assert adamw_ema_cost(10, grad_itemsize=2, low_itemsize=2).bytes == 360
    assert adamw_ema_cost(10, emas=0).bytes == 280
    assert adamw_ema_cost(10, emas=3).bytes - adamw_ema_cost(10, emas=1).bytes == 2 * 80
