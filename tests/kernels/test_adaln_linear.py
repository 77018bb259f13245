"""adaln_linear, adaln_mlp: T0 gradcheck, T1 on every path, T3 on a GPU (their kernels' T2 is in
test_aot.py).
"""

import itertools
from dataclasses import dataclass

import pytest
import torch

from fastrepa_kernels import launch
from fastrepa_kernels.adaln_linear import (
    adaln_linear,
    adaln_linear_cost,
    adaln_linear_reference,
    adaln_mlp,
    adaln_mlp_cost,
    adaln_mlp_reference,
)
from tests.kernels.accuracy import check, distance
from tests.kernels.conftest import unpoisoned
from tests.launches import counted

SIZES = [(1, 1, 8, 3, 5), (2, 37, 72, 112, 40), (3, 5, 1152, 24, 16)]  # B, T, D, F, M
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s)))
residuals = pytest.mark.parametrize("residual", [False, True], ids=["norm", "residual and norm"])
mlps = pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])


@dataclass
class Cpu:
    """A place where no path of the kernels is forced."""

    dtype: torch.dtype

    def randn(self, *shape):
        return torch.randn(shape, dtype=self.dtype)


def operands(place, size, mlp):
    """Make x, shift, scale, branch, gate, then weights and biases."""
    b, t, d, f, m = size
    x, branch = place.randn(b, t, d), place.randn(b, t, d)
    shift, scale, gate = (place.randn(b, d) for _ in range(3))
    dims = [d, f, m] if mlp else [d, m]
    products = []
    for i, o in itertools.pairwise(dims):
        products += [place.randn(o, i) * i**-0.5, place.randn(o)]
    return [x, shift, scale, branch, gate, *products]


def functions(mlp, residual, **options):
    """Return (ours, with `options`, and reference) of flat arguments in the order of `operands`."""

    def flat(function, **options):
        def call(x, shift, scale, branch, gate, *products):
            weights = (products,) if mlp else products
            pair = (branch, gate) if residual else None
            out = function(x, shift, scale, *weights, residual=pair, **options)
            # Unused arguments still want a gradient.
            return out if residual else out + 0 * (branch.sum() + gate.sum()).to(out.dtype)

        return call

    pair = (adaln_mlp, adaln_mlp_reference) if mlp else (adaln_linear, adaln_linear_reference)
    return [flat(pair[0], **options), flat(pair[1])]


@mlps
@residuals
def test_formula_gradcheck(mlp, residual):
    given = [t.requires_grad_() for t in operands(Cpu(torch.float64), (2, 3, 4, 5, 3), mlp)]
    ours, reference = functions(mlp, residual)
    assert torch.autograd.gradcheck(ours, given)
    assert torch.autograd.gradcheck(reference, given)


@mlps
@residuals
@sizes
def test_as_good_as_eager(place, size, residual, mlp):
    given = operands(place, size, mlp)
    upstream = [place.randn(*size[:2], size[4])]
    if residual:
        upstream.insert(0, place.randn(*size[:3]))
    names = [f"argument {i}" for i in range(len(given))]
    check(names, *functions(mlp, residual), given, upstream)


@mlps
@pytest.mark.parametrize("x_dtype", [torch.float32, None], ids=["fp32 stream", "one dtype"])
def test_half_products_around_a_stream(place, mlp, x_dtype):
    """The generator's dtypes: the residual stream in fp32, everything else in half."""
    given = operands(place, SIZES[1], mlp)
    given[0] = given[0].to(x_dtype or place.dtype)
    x_new, out = functions(mlp, True)[0](*given)
    assert x_new.dtype == given[0].dtype and out.dtype == place.dtype
    upstream = [place.randn(*x_new.shape, dtype=x_new.dtype), place.randn(*out.shape)]
    names = [f"argument {i}" for i in range(len(given))]
    check(names, *functions(mlp, True), given, upstream)


@mlps
def test_launches_of_a_backward(mlp):
    """y comes with the norm's gradients: between the two products, and no launch of its own."""
    given = [v.half().requires_grad_() for v in operands(Cpu(torch.float32), SIZES[1], mlp)]
    with launch.backend("triton"):
        outputs = functions(mlp, True)[0](*given)
        upstream = [torch.randn_like(y) for y in outputs]
        with counted() as launches:
            torch.autograd.grad(outputs, given, upstream)
    product = "aten.mm.default"
    norm = [product, "_norm_bwd_kernel", "_sums_kernel", product]
    sums = "_column_sums_kernel"  # of rows, then of what those gave
    bias = [sums, sums, "aten._to_copy.default"]
    first = [product, "_activation_bwd_kernel", sums, product] if mlp else []
    assert unpoisoned(launches) == first + norm + (bias[-1:] if mlp else []) + bias


@mlps
@residuals
def test_what_is_saved(place_fp32, residual, mlp):
    """Neither y nor h: the stream, its branch, the per-sample vectors, statistics, weights, a."""
    given = operands(place_fp32, SIZES[1], mlp)
    given = given[:5] + [torch.nn.Parameter(t) for t in given[5:]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functions(mlp, residual)[0](*given)
    b, t, d, f, _ = SIZES[1]
    shapes = [tuple(s.shape) for s in saved if s.numel()]
    assert shapes.count((b, t, d)) == 1 + residual
    assert shapes.count((b * t, f)) == (1 if mlp else 0)
    large = [s for s in shapes if s[0] == b * t or (s[:2] == (b, t) and len(s) == 3)]
    assert len(large) == 1 + residual + mlp
    # As nn.Linear: the Parameter itself, which ZeRO-3 can gather again.
    assert all(any(s is w for s in saved) for w in given[5::2])


def test_h_kept_or_made_again_is_the_same_bits(place):
    given = operands(place, SIZES[1], True)
    b, t, _, f, m = SIZES[1]
    upstream = place.randn(b, t, m)
    h_bytes = b * t * f * given[5].element_size()

    def run(needed, **options):
        leaves = [v.detach().requires_grad_(i in needed) for i, v in enumerate(given)]
        x, shift, scale, branch, gate, *weights = leaves
        held: dict[int, int] = {}

        def keep(v):
            held[v.untyped_storage().data_ptr()] = v.nbytes
            return v

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
            out = adaln_mlp(x, shift, scale, weights, residual=(branch, gate), **options)
        wanted = [leaves[i] for i in needed]
        grads = torch.autograd.grad(out[1], wanted, upstream, materialize_grads=True)
        return [*out, *grads], sum(held.values())

    for needed, more in ((range(len(given)), h_bytes), ((0, 5, 6), 0)):  # without w2, h is no use
        (again, least), (kept, most) = run(needed), run(needed, keep_h=True)
        assert most - least == more
        assert all(map(torch.equal, again, kept))


@mlps
@pytest.mark.parametrize("needed", [(0,), (3,), (4,), (1, 2), (5,), (6,), (0, 5, 6)])
def test_only_the_gradients_asked_for(place_fp32, needed, mlp):
    given = operands(place_fp32, SIZES[1], mlp)
    ours, reference = functions(mlp, True)
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(given)]
    ours(*leaves)[1].sum().backward()  # a gradient of stride 0, and none for x_new
    wide = [t.double().requires_grad_() for t in given]
    exact = torch.autograd.grad(reference(*wide)[1].sum(), wide)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in needed)
        if i in needed:
            assert distance(leaf.grad, exact[i]) < 1e-5


@mlps
def test_only_the_stream_used(place_fp32, mlp):
    given = [t.requires_grad_() for t in operands(place_fp32, SIZES[1], mlp)]
    x_new, _ = functions(mlp, True)[0](*given)
    dx, dbranch, dweight = torch.autograd.grad(x_new.sum(), (given[0], given[3], given[5]))
    assert torch.equal(dx, torch.ones_like(dx)) and not dweight.any()
    assert distance(dbranch, given[4].double()[:, None].expand_as(dbranch)) < 1e-6


@mlps
def test_views_and_empty_input(place_fp32, mlp):
    x, shift, scale, branch, gate, *products = operands(place_fp32, SIZES[1], mlp)
    ours, reference = functions(mlp, True)
    chunks = torch.cat([shift, scale, gate], dim=1).chunk(3, dim=1)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    given = (turned, chunks[0], chunks[1], branch, chunks[2], *products)
    for a, b in zip(ours(*given), reference(*(t.double() for t in given)), strict=True):
        assert distance(a, b) < 1e-5
    none = [t[:0].requires_grad_() for t in (x, shift, scale, branch, gate)]
    products = [p.requires_grad_() for p in products]
    x_new, out = ours(*none, *products)
    assert x_new.shape == (0, *x.shape[1:]) and out.shape == (0, x.shape[1], SIZES[1][4])
    out.sum().backward()
    assert all(not p.grad.any() for p in products)


@mlps
@residuals
def test_compiles_to_one_graph(place_fp32, residual, mlp):
    given = [t.requires_grad_() for t in operands(place_fp32, SIZES[1], mlp)]
    ours = functions(mlp, residual, **({"keep_h": residual} if mlp else {}))[0]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

    def run(function):
        out = function(*given)
        out = out if residual else (out,)
        grads = torch.autograd.grad(sum(o.square().sum() for o in out), given)
        return [o.detach() for o in out], grads

    for a, b in zip(run(compiled), run(ours), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@mlps
def test_autocast(mlp):
    torch.manual_seed(5)
    given = operands(Cpu(torch.float32), SIZES[1], mlp)
    ours = functions(mlp, True)[0]
    low = [t.to(torch.bfloat16) if i > 4 else t for i, t in enumerate(given)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_new, out = ours(*given)
    assert x_new.dtype == torch.float32 and out.dtype == torch.bfloat16
    assert torch.equal(out, ours(*low)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({5: (9, 7)}, r"adaln_mlp: w1 must be \[\*, 72\]; got \(9, 7\)"),
        ({6: (9,)}, r"adaln_mlp: b1 must be \[112\]; got \(9,\)"),
        ({7: (40, 9)}, r"adaln_mlp: w2 must be \[\*, 112\]"),
        ({3: (2, 3, 72)}, r"adaln_mlp: branch must have x's shape"),
        ({2: (2, 9)}, r"adaln_mlp: scale must be \[B, D\] = \(2, 72\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = operands(Cpu(torch.float32), SIZES[1], True)
    for i, shape in change.items():
        given[i] = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        functions(True, True)[0](*given)


def test_wrong_dtype_is_named():
    x, v, w, b = torch.randn(1, 2, 4), torch.randn(1, 4), torch.randn(3, 4), torch.randn(3)
    with pytest.raises(ValueError, match=r"adaln_linear: bias must be torch.float32"):
        adaln_linear(x, v, v, w, b.double())


def test_cost():
    b, t, d, m = 2, 5, 8, 6
    forward = adaln_linear_cost(b, t, d, m, 4, 2)
    backward = adaln_linear_cost(b, t, d, m, 4, 2, backward=True)
    assert 2 * b * t * d * m < forward.flops < backward.flops
    mlp = adaln_mlp_cost(b, t, d, 4 * d, 4, 2, residual=True)
    assert mlp.flops > 16 * b * t * d * d
    again, kept = (
        adaln_mlp_cost(b, t, d, 4 * d, 4, 2, residual=True, backward=True, keep_h=keep_h)
        for keep_h in (False, True)
    )
    assert again.bytes - kept.bytes == b * t * 4 * d * 2 and kept.bytes > mlp.bytes
