"""linear_gelu: T0 gradcheck, T1 in the interpreter, T3 on a GPU (T2: test_aot.py)."""

import pytest
import torch

from fastrepa_kernels import launch
from fastrepa_kernels.mlp import linear_gelu, linear_gelu_cost, linear_gelu_reference
from tests.kernels.accuracy import check, distance

SIZES = [(1, 3, 5), (37, 72, 112), (5, 1152, 48), (130, 40, 300)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s)))
NAMES = ("x", "weight", "bias")


def operands(place, size):
    n, d, f = size
    return place.randn(n, d), place.randn(f, d) * d**-0.5, place.randn(f)


def test_formula_gradcheck():
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4), 5))
    assert torch.autograd.gradcheck(linear_gelu, (x, w, b))


@sizes
def test_as_good_as_eager(place, size):
    upstream = (place.randn(size[0], size[2]),)
    check(NAMES, linear_gelu, linear_gelu_reference, operands(place, size), upstream)


@sizes
def test_without_gradients(place, size):
    given = operands(place, size)
    exact = linear_gelu_reference(*(t.double() for t in given))
    eager = linear_gelu_reference(*given)
    unit = torch.finfo(place.dtype).eps
    assert distance(linear_gelu(*given), exact) <= 2 * distance(eager, exact) + unit


def test_what_is_saved(place_fp32):
    """Backward keeps x, weight and the pre-activation: by identity."""
    x, weight, bias = operands(place_fp32, SIZES[1])
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_gelu(x, weight, bias)
    filled = [t for t in saved if t.numel()]
    assert len(filled) == 3
    # As nn.Linear: the Parameter itself, which ZeRO-3 can gather again.
    assert any(t is weight for t in filled)
    assert any(t.shape == (x.shape[0], weight.shape[0]) for t in filled)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_asked_for(place_fp32, needed):
    given = operands(place_fp32, SIZES[1])
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(given)]
    linear_gelu(*leaves).sum().backward()  # a gradient of stride 0
    wide = [t.double().requires_grad_() for t in given]
    exact = torch.autograd.grad(linear_gelu_reference(*wide).sum(), wide)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in needed)
        if i in needed:
            assert distance(leaf.grad, exact[i]) < 1e-6


def test_leading_dimensions_and_transposed_views(place_fp32):
    x, weight, bias = operands(place_fp32, (12, 40, 56))
    exact = linear_gelu_reference(x.double(), weight.double(), bias.double())
    turned = x.view(3, 4, 40).transpose(0, 1).contiguous().transpose(0, 1)
    y = linear_gelu(turned, weight.t().contiguous().t(), bias)
    assert y.shape == (3, 4, 56)
    assert distance(y.view(12, 56), exact) < 1e-6
    assert linear_gelu(x[0], weight, bias).shape == (56,)


def test_empty_input(place):
    x, weight, bias = (t.requires_grad_() for t in operands(place, (0, 40, 56)))
    y = linear_gelu(x, weight, bias)
    assert y.shape == (0, 56)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_two_runs_agree_bitwise(place):
    given = operands(place, SIZES[1])
    upstream = place.randn(37, 112)

    def run():
        leaves = [t.clone().requires_grad_() for t in given]
        y = linear_gelu(*leaves)
        return (y, *torch.autograd.grad(y, leaves, upstream))

    assert all(map(torch.equal, run(), run()))


def test_autocast(place_fp32):
    x, weight, bias = (t.requires_grad_() for t in operands(place_fp32, SIZES[1]))
    with torch.autocast(x.device.type, dtype=torch.bfloat16), launch.backend("auto"):
        y = linear_gelu(x, weight, bias)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "x must be"),
        ({"weight": torch.zeros(0)}, r"weight must be \[F, D\]"),
        ({"weight": torch.zeros(6, 5)}, r"weight must be \[F, D\]"),
        ({"bias": torch.zeros(5)}, r"bias must be \[6\]"),
        ({"weight": torch.zeros(6, 4).half()}, "weight must be torch.float32"),
        ({"bias": torch.zeros(6, device="meta")}, "bias must be torch.float32 on cpu"),
    ],
)
def test_errors_name_the_argument(change, words):
    given = {"x": torch.zeros(2, 4), "weight": torch.zeros(6, 4), "bias": torch.zeros(6)} | change
    with pytest.raises(ValueError, match=f"linear_gelu: {words}"):
        linear_gelu(**given)


def test_registration():
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((3, 4), (5, 4), (5,)))
    ops = torch.ops.fastrepa
    torch.library.opcheck(ops.linear_gelu, (x, w, b, True))
    torch.library.opcheck(ops.linear_gelu, (x.detach(), w.detach(), b.detach(), False))
    dy, a = torch.randn(3, 5), torch.randn(3, 5)
    x, w = x.detach(), w.detach()
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(ops.linear_gelu_backward, (dy, x, w, a, needs))


def test_compiled_graph_is_whole_and_agrees(place_fp32):
    given = operands(place_fp32, SIZES[1])
    backend = "inductor" if given[0].is_cuda else "aot_eager"
    compiled = torch.compile(linear_gelu, fullgraph=True, backend=backend)

    def run(function):
        leaves = [t.clone().requires_grad_() for t in given]
        y = function(*leaves)
        return (y, *torch.autograd.grad(y.square().sum(), leaves))

    assert all(map(torch.equal, run(compiled), run(linear_gelu)))


def test_torch_func_grad_and_fake_tensors(place_fp32):
    given = operands(place_fp32, SIZES[1])

    def loss(*a):
        return linear_gelu(*a).square().sum()

    leaves = [t.clone().requires_grad_() for t in given]
    functional = torch.func.grad(loss, argnums=(0, 1, 2))(*given)
    assert all(map(torch.equal, functional, torch.autograd.grad(loss(*leaves), leaves)))
    with torch._subclasses.FakeTensorMode() as mode:
        assert linear_gelu(*[mode.from_tensor(t) for t in given]).shape == (37, 112)


def test_cost():
    forward = linear_gelu_cost(8, 3, 5, 2)
    assert forward.flops == 2 * 8 * 3 * 5 + 8 * 40
    assert forward.bytes == 2 * (24 + 15 + 5 + 80)
    assert linear_gelu_cost(8, 3, 5, 2, backward=True).bytes == 2 * (80 + 48 + 15 + 5 + 15)
