"""adaln: T0 gradcheck of the hand-derived backward, T1 kernels in the interpreter, T3 on a GPU.
(T2, compilation for every device generation, is test_aot.py.)
"""

import pytest
import torch

from fastrepa_kernels import adaln, adaln_kernels, launch
from fastrepa_kernels.adaln import (
    gated_residual,
    gated_residual_cost,
    gated_residual_layernorm_modulate,
    gated_residual_layernorm_modulate_cost,
    gated_residual_layernorm_modulate_reference,
    gated_residual_reference,
    layernorm_modulate,
    layernorm_modulate_cost,
    layernorm_modulate_reference,
)
from tests.kernels.accuracy import assert_as_good_as_eager, check, distance
from tests.kernels.conftest import unpoisoned
from tests.launches import counted

SHAPES = [(1, 1, 2), (3, 19, 72), (2, 9, 112), (1, 3, 768), (1, 2, 1023), (2, 2, 1152)]
NAMES = ["x", "branch", "gate", "shift", "scale"]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def doubles(*shapes):
    return tuple(torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)


def operands(place, shape, residual_dtype):
    """Make x, branch, gate, shift, scale: the last three are chunks of one [B, 3D]."""
    b, t, d = shape
    x = place.randn(b, t, d, dtype=residual_dtype)
    x[0, 0] = 0  # a row that eps alone keeps finite
    branch = place.randn(b, t, d)
    branch[0, 0] = 0
    if t > 1:
        x[0, 1], branch[0, 1] = x[0, 1] * 1e-4, branch[0, 1] * 1e-4
    return x, branch, *place.randn(b, 3 * d).chunk(3, dim=1)


def test_formula_gradcheck():
    b, t, d = 2, 3, 5
    x, branch, gate, shift, scale = doubles((b, t, d), (b, t, d), (b, d), (b, d), (b, d))
    everything = (x, branch, gate, shift, scale)
    assert torch.autograd.gradcheck(gated_residual_layernorm_modulate, everything)
    assert torch.autograd.gradcheck(layernorm_modulate, (x, shift, scale))
    assert torch.autograd.gradcheck(gated_residual, (x, branch, gate))
    for index in (0, 1):  # only one of the two outputs is used
        assert torch.autograd.gradcheck(
            lambda *a, i=index: gated_residual_layernorm_modulate(*a)[i], everything
        )


@pytest.mark.parametrize("residual", ["fp32 residual", "residual in the same dtype"])
@shapes
def test_gated_residual_layernorm_modulate_is_as_good_as_eager(place, shape, residual):
    inputs = operands(place, shape, torch.float32 if residual.startswith("fp32") else place.dtype)
    upstream = torch.randn_like(inputs[0]), place.randn(*shape)
    check(
        NAMES, gated_residual_layernorm_modulate, gated_residual_layernorm_modulate_reference,
        inputs, upstream,
    )  # fmt: skip


@shapes
def test_layernorm_modulate_is_as_good_as_eager(place, shape):
    x, _, _, shift, scale = operands(place, shape, torch.float32)
    check(
        ["x", "shift", "scale"], layernorm_modulate, layernorm_modulate_reference,
        (x, shift, scale), (place.randn(*shape),),
    )  # fmt: skip


@shapes
def test_gated_residual_is_as_good_as_eager(place, shape):
    x, branch, gate, _, _ = operands(place, shape, torch.float32)
    check(
        NAMES[:3], gated_residual, gated_residual_reference, (x, branch, gate),
        (torch.randn_like(x),),
    )  # fmt: skip


def test_out_dtype(place):
    x, _, _, shift, scale = operands(place, (2, 3, 72), torch.float32)
    assert layernorm_modulate(x, shift, scale).dtype == shift.dtype
    y = layernorm_modulate(x, shift, scale, out_dtype=torch.float32)
    eager = layernorm_modulate_reference(x, shift, scale, out_dtype=torch.float32)
    exact = layernorm_modulate_reference(x.double(), shift.double(), scale.double())
    assert_as_good_as_eager("y", y, eager, exact)


def test_zero_stride_and_transposed_gradients_and_inputs(place_fp32):
    b, t, d = 2, 6, 72
    x, branch, gate, shift, scale = operands(place_fp32, (b, t, d), torch.float32)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    shift = shift.t().contiguous().t()  # last stride is not 1
    skew = place_fp32.randn(t, b, d).transpose(0, 1)

    def loss(function, *a):
        x_new, y = function(*a)
        return x_new.sum() + (y.transpose(1, 2) * skew.transpose(1, 2).to(y)).sum()

    for leaf in (x, branch, gate, shift, scale):
        leaf.requires_grad_()
    leaves = [x, branch, gate, shift, scale]
    ours = torch.autograd.grad(loss(gated_residual_layernorm_modulate, *leaves), leaves)
    reference = gated_residual_layernorm_modulate_reference
    eager = torch.autograd.grad(loss(reference, *leaves), leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(loss(reference, *wide), wide)
    for name, *values in zip(NAMES, ours, eager, exact, strict=True):
        assert_as_good_as_eager(name, *values)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (0, 1), (1, 4), (2, 3)])
def test_only_the_gradients_asked_for(place_fp32, needed):
    inputs = operands(place_fp32, (2, 5, 72), torch.float32)
    upstream = [place_fp32.randn(2, 5, 72) for _ in range(2)]
    inputs = [x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs)]
    outputs = gated_residual_layernorm_modulate(*inputs)
    torch.autograd.backward(outputs, upstream)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(
        gated_residual_layernorm_modulate_reference(*wide), wide, [g.double() for g in upstream]
    )
    for i, x in enumerate(inputs):
        assert (x.grad is not None) == (i in needed)
        if i in needed:
            assert distance(x.grad, exact[i]) < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("gated", [False, True], ids=["norm", "residual and norm"])
@pytest.mark.parametrize("shape", [(2, 9, 112), (2, 2, 1152)], ids=["2x9x112", "2x2x1152"])
def test_backward_makes_the_same_y_again(place, shape, gated):
    """The very bits that the forward's product read, whatever else is asked for."""
    x, branch, gate, shift, scale = operands(place, shape, torch.float32)
    if not gated:
        branch = gate = None
    x_new, y, mean, rstd = adaln._norm_modulate(x, branch, gate, shift, scale, 1e-6, place.dtype)
    dy, kept = torch.randn_like(y), x_new if gated else x
    given = (dy, x if gated else None, kept, branch, gate, shift, scale, mean, rstd)
    grads, none = adaln._norm_gradients(*given, True)
    assert not none.numel()
    for sums in (False, True):
        others, again = adaln._norm_gradients(*given, sums, place.dtype)
        assert torch.equal(again, y)
        assert all(map(torch.equal, grads[: 5 if sums else 2], others))


def test_launches_of_a_backward():
    """One for the gradients and one for the sums, in the dtypes that are wanted."""
    b, t, d = 2, 9, 72
    x, branch = (torch.randn(b, t, d, requires_grad=True) for _ in range(2))
    gate, shift, scale = torch.randn(b, 3 * d).half().requires_grad_().chunk(3, dim=1)
    leaves = [x, branch, gate, shift, scale]
    with launch.backend("triton"):
        outputs = gated_residual_layernorm_modulate(*leaves)
        upstream = [torch.randn_like(y) for y in outputs]
        with counted() as launches:
            grads = torch.autograd.grad(outputs, leaves, upstream)
        assert unpoisoned(launches) == ["_norm_bwd_kernel", "_sums_kernel"]
        assert [g.dtype for g in grads] == [v.dtype for v in leaves]
        out = gated_residual(x, branch, gate)
        upstream = torch.randn_like(out)
        with counted() as launches:
            torch.autograd.grad(out, [branch, gate], upstream)
        assert unpoisoned(launches) == ["_residual_bwd_kernel", "_sums_kernel"]


def test_two_runs_agree_bitwise(place):
    inputs = operands(place, (2, 40, 96), torch.float32)
    upstream = [torch.randn(2, 40, 96, device=place.device), place.randn(2, 40, 96)]

    def run():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = gated_residual_layernorm_modulate(*leaves)
        return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_cpu_takes_some_samples_at_a_time(monkeypatch, residual_dtype, branch_dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (5, 7, 24)
    dtypes = [residual_dtype, *[branch_dtype] * 4, residual_dtype, branch_dtype]
    *inputs, dx_new, dy = (
        torch.randn(s, generator=generator).to(dtype)
        for s, dtype in zip([shape, shape, *[(5, 24)] * 3, shape, shape], dtypes, strict=True)
    )

    def run():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = gated_residual_layernorm_modulate(*leaves)
        return (*outputs, *torch.autograd.grad(outputs, leaves, [dx_new, dy]))

    whole = run()
    monkeypatch.setattr(adaln_kernels, "_CPU_BLOCK", 2 * 7 * 24)
    for one, parts in zip(whole, run(), strict=True):
        torch.testing.assert_close(parts, one)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty_input(place_fp32, shape):
    inputs = [torch.zeros(shape), torch.zeros(shape)]
    inputs += [torch.ones(shape[0], shape[2]) for _ in range(3)]
    inputs = [x.to(place_fp32.device).requires_grad_() for x in inputs]
    x_new, y = gated_residual_layernorm_modulate(*inputs)
    assert x_new.shape == y.shape == shape
    (x_new.sum() + y.sum() + gated_residual(*inputs[:3]).sum()).backward()
    assert all(torch.equal(v.grad, torch.zeros_like(v)) for v in inputs)


def test_a_row_too_wide_for_registers_takes_the_torch_path(place_fp32):
    d = launch.WIDEST_ROW + 8
    x, shift = place_fp32.randn(1, 2, d), place_fp32.randn(1, d)
    exact = layernorm_modulate_reference(x.double(), shift.double(), shift.double())
    assert distance(layernorm_modulate(x, shift, shift), exact) < 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 8)}, "x must be a floating-point"),
        ({"x": torch.zeros(2, 4, 8, dtype=torch.int64)}, "x must be a floating-point"),
        ({"branch": torch.zeros(2, 4, 7)}, "branch must have x's shape"),
        ({"branch": torch.zeros(2, 4, 8, dtype=torch.int32)}, "branch must be floating point"),
        ({"gate": torch.zeros(2, 1, 8)}, "gate must be"),
        ({"shift": torch.zeros(3, 8)}, "shift must be"),
        ({"scale": torch.zeros(2, 8, device="meta")}, "scale must be"),
        ({"scale": torch.zeros(2, 8, dtype=torch.int8)}, "scale must be floating point"),
    ],
)
def test_errors_name_the_argument(change, words):
    given = {"x": torch.zeros(2, 4, 8), "branch": torch.zeros(2, 4, 8)}
    given |= {name: torch.zeros(2, 8) for name in ("gate", "shift", "scale")} | change
    with pytest.raises(ValueError, match=f"gated_residual_layernorm_modulate: {words}"):
        gated_residual_layernorm_modulate(**given)


def test_registration():
    x, branch, gate, shift, scale = (
        torch.randn(s, requires_grad=True) for s in ((2, 3, 8), (2, 3, 8), (2, 8), (2, 8), (2, 8))
    )
    ops = torch.ops.fastrepa
    out = torch.bfloat16
    torch.library.opcheck(ops.norm_modulate, (x, branch, gate, shift, scale, 1e-6, out))
    torch.library.opcheck(ops.norm_modulate, (x, None, None, shift, scale, 1e-6, torch.float32))
    torch.library.opcheck(ops.gated_residual, (x, branch, gate))
    grad, saved = torch.randn(2, 3, 8), torch.rand(2, 3)
    leaves = [v.detach() for v in (x, branch, gate, shift, scale)]
    for sums in (False, True):
        backward = (grad, grad, *leaves, saved, saved, sums)
        torch.library.opcheck(ops.norm_modulate_backward, backward)
        torch.library.opcheck(ops.gated_residual_backward, (grad, *leaves[1:3], sums))


def test_compiled_graph_is_whole_and_agrees(place_fp32):
    inputs = operands(place_fp32, (2, 5, 72), torch.float32)
    upstream = [torch.randn(2, 5, 72, device=place_fp32.device) for _ in range(2)]
    backend = "inductor" if place_fp32.device == "cuda" else "aot_eager"
    compiled = torch.compile(gated_residual_layernorm_modulate, fullgraph=True, backend=backend)

    def run(function):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))

    assert all(map(torch.equal, run(compiled), run(gated_residual_layernorm_modulate)))


def test_torch_func_grad_and_fake_tensors(place_fp32):
    inputs = operands(place_fp32, (2, 3, 72), torch.float32)

    def loss(*a):
        x_new, y = gated_residual_layernorm_modulate(*a)
        return (gated_residual(x_new, y, a[2]) ** 2).sum()

    functional = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*inputs)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    assert all(map(torch.equal, functional, torch.autograd.grad(loss(*leaves), leaves)))
    with torch._subclasses.FakeTensorMode() as mode:
        x_new, y = gated_residual_layernorm_modulate(*[mode.from_tensor(x) for x in inputs])
    assert x_new.shape == y.shape == inputs[0].shape


def test_cost():
    """SiT-XL/2, 256 images: fp32 residual, bf16 branch; the arithmetic of the docstring."""
    n, d = 256 * 256, 1152
    forward = gated_residual_layernorm_modulate_cost(256, 256, d, 4, 2)
    assert forward.bytes == n * d * (4 + 2 + 4 + 2) + 3 * 256 * d * 2 + 8 * n
    backward = gated_residual_layernorm_modulate_cost(256, 256, d, 4, 2, backward=True)
    assert backward.bytes == n * d * (2 + 4 + 4 + 2 + 4 + 2) + 5 * 256 * d * 2 + 8 * n
    assert layernorm_modulate_cost(1, 1, 8, 4, 2).bytes == 8 * 6 + 2 * 8 * 2 + 8
    assert gated_residual_cost(1, 1, 8, 4, 2).bytes == 8 * 10 + 8 * 2
