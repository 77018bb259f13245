"""projector_alignment: T0 gradcheck, T1 kernels in the interpreter, T3 on a GPU (T2: test_aot)."""

import pytest
import torch
import torch.nn.functional as F

from fastrepa_kernels import launch
from fastrepa_kernels.projector_alignment import (
    NAMES,
    projector_alignment,
    projector_alignment_cost,
    projector_alignment_reference,
)
from tests.kernels.accuracy import assert_as_good_as_eager, distance
from tests.kernels.conftest import PLACES
from tests.launches import counted

LABELS = ("x", *NAMES)
# N, D, P, Z, chunk: never a multiple of a block, widths with and without a factor of 16.
SIZES = [(1, 3, 5, 2, 4), (37, 72, 48, 112, 16), (9, 40, 72, 768, 100), (4, 1152, 33, 1023, 3)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s)))


def operands(place, size, x_dtype=None):
    n, d, p, z, _ = size
    x = place.randn(n, d, dtype=x_dtype or place.dtype)
    shapes = ((p, d), (p,), (p, p), (p,), (z, p), (z,))
    weights = [place.randn(*s) * (s[-1] ** -0.5 if len(s) == 2 else 0.1) for s in shapes]
    # Targets near the projections, as in training: cosines that cancel would leave a loss whose
    # relative error is about nothing.
    h = F.silu(F.linear(x.double(), *[w.double() for w in weights[:2]]))
    near = F.linear(F.silu(F.linear(h, *[w.double() for w in weights[2:4]])), weights[4].double())
    target = place.randn(n, z) + (near * (z / near.square().sum(-1, keepdim=True)) ** 0.5).to(x)
    target = target.to(place.dtype)
    if n > 2:
        x[0], target[1], target[2] = 0, 0, target[2] * 1e-4  # a zero row, a tiny row
    return x, weights, target


def run(function, x, weights, target, upstream=1.7, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    loss = function(leaves[0], leaves[1:], target, **options)
    pulled = torch.autograd.grad(loss, leaves, torch.tensor(upstream).to(loss))
    return (loss.detach(), *pulled)


def losses(function, x, weights, target, row_weight=None, **options):
    """Losses under four draws of row weights: one scalar may be right to many digits by luck."""
    draws = torch.rand(4, x.shape[0], generator=torch.Generator().manual_seed(3)) + 0.1
    draws = (draws if row_weight is None else draws * row_weight.cpu()).to(x)
    return torch.stack([function(x, weights, target, row_weight=v, **options) for v in draws])


def check(x, weights, target, chunk, **options):
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    exact_inputs = (x.double(), [w.double() for w in weights], target.double())
    exact = run(projector_alignment_reference, *exact_inputs, **wide)
    eager = run(projector_alignment_reference, x, weights, target, **options)
    ours = run(projector_alignment, x, weights, target, chunk_rows=chunk, **options)
    for name, *values in zip(LABELS, ours[1:], eager[1:], exact[1:], strict=True):
        assert_as_good_as_eager(name, *values)
    leaves = [w.detach().requires_grad_() for w in weights]  # so that the training road runs
    check_losses(x, leaves, target, chunk, **options)


def check_losses(x, weights, target, chunk, **options):
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    exact_inputs = (x.double(), [w.double() for w in weights], target.double())
    exact = losses(projector_alignment_reference, *exact_inputs, **wide).detach()
    eager = losses(projector_alignment_reference, x, weights, target, **options).detach()
    ours = losses(projector_alignment, x, weights, target, chunk_rows=chunk, **options)
    assert ours.requires_grad == weights[0].requires_grad
    assert_as_good_as_eager("loss", ours.detach(), eager, exact)


def test_formula_gradcheck():
    n, d, p, z = 5, 3, 4, 6
    shapes = ((n, d), (p, d), (p,), (p, p), (p,), (z, p), (z,))
    x, *weights = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    target, rows = torch.randn(n, z, dtype=torch.float64), torch.rand(n, dtype=torch.float64)

    def loss(x, *w):
        return projector_alignment(x, w, target, chunk_rows=2, row_weight=rows)

    assert torch.autograd.gradcheck(loss, (x, *weights))
    # A large eps: every row is below the clamp, where the gradient loses its second term.
    assert torch.autograd.gradcheck(
        lambda x, *w: projector_alignment(x, w, target, chunk_rows=2, eps=50.0), (x, *weights)
    )


@sizes
def test_as_good_as_eager(place, size):
    check(*operands(place, size), size[-1])


def test_residual_stream_in_fp32(place):
    size = SIZES[1]
    check(*operands(place, size, torch.float32), size[-1])


@sizes
def test_row_weights_and_masks(place_fp32, size):
    x, weights, target = operands(place_fp32, size)
    rows = torch.rand(size[0], device=x.device) + 0.1
    check(x, weights, target, size[-1], row_weight=rows)
    mask = rows > rows.median() * 0.9
    ours = projector_alignment(x, weights, target, chunk_rows=size[-1], row_weight=mask)
    kept = projector_alignment_reference(
        x[mask].double(), [w.double() for w in weights], target[mask]
    )
    assert distance(ours, kept) < 1e-5


def test_a_mask_that_keeps_nothing(place_fp32):
    x, weights, target = operands(place_fp32, SIZES[1])
    nothing = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for value in run(projector_alignment, x, weights, target, row_weight=nothing):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
def test_int8_targets(place, grad):
    size = (23, 40, 48, 136, 9)
    x, weights, target = operands(place, size)  # with a zero row
    peak = target.float().abs().amax(-1).clamp_min(1e-3)
    target = (target.float() * (127 / peak[:, None])).round().to(torch.int8)
    scale = torch.rand(size[0], device=x.device) + 0.01
    if grad:
        check(x, weights, target, size[-1])
        check(x, weights, target, size[-1], target_scale=scale)
    # Below eps the clamp can tell the scale: the row's cosine shrinks with it.
    scale[5] = 1e-6
    leaves = [w.detach().requires_grad_(grad) for w in weights]
    check_losses(x, leaves, target, 9, target_scale=scale, eps=1e-2)


def test_projections_below_eps(place_fp32):
    """z = 0 in some rows (their ReLU-like path is cut by zero weights): dz is y ry / eps."""
    x, weights, target = operands(place_fp32, SIZES[1])
    weights[4], weights[5] = weights[4] * 1e-9, torch.zeros_like(weights[5])
    check(x, weights, target, 16, eps=1e-8)
    weights[4] = torch.zeros_like(weights[4])
    loss, *grads = run(projector_alignment, x, weights, target, chunk_rows=16)
    exact = run(projector_alignment_reference, x.double(), [w.double() for w in weights], target)
    assert loss == 0
    assert distance(grads[5], exact[6]) < 1e-5  # dw3 sees y / eps: large, finite, right
    assert distance(grads[6], exact[7]) < 1e-5
    assert torch.isfinite(torch.cat([g.flatten() for g in grads])).all()


@pytest.mark.parametrize("size", SIZES[1:], ids=lambda s: "-".join(map(str, s)))
def test_without_gradients(place, size):
    """The forward-only road: no z is written, no gradient is computed."""
    check_losses(*operands(place, size), size[-1])


@pytest.mark.parametrize(
    "needed", [(0,), (1,), (2,), (3,), (4,), (5,), (6,), (5, 6), (1, 2, 3, 4, 5, 6), (0, 4)]
)
def test_only_the_gradients_asked_for(place_fp32, needed):
    x, weights, target = operands(place_fp32, SIZES[1])
    leaves = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate((x, *weights))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = projector_alignment(leaves[0], leaves[1:], target, chunk_rows=16)
    assert sum(t.numel() for t in saved) == sum(leaves[i].numel() for i in needed) + 1
    loss.backward()
    full = run(
        projector_alignment_reference, x.double(), [w.double() for w in weights], target, 1.0
    )
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in needed)
        if i in needed:
            assert distance(leaf.grad, full[i + 1]) < 1e-5


def test_against_the_per_sample_loop(place_fp32):
    """The loss as the reference computes it: sample by sample, mean over tokens, then samples."""
    b, t, d, p, z = 3, 7, 40, 48, 24
    x, weights, target = operands(place_fp32, (b * t, d, p, z, 0))
    h = F.silu(F.linear(F.silu(F.linear(x, *weights[:2])), *weights[2:4]))
    projected = F.linear(h, *weights[4:]).view(b, t, z)
    loss = 0
    for ours, theirs in zip(projected, target.view(b, t, z), strict=True):
        loss = loss - (F.normalize(ours, dim=-1) * F.normalize(theirs, dim=-1)).sum(-1).mean()
    batched = projector_alignment(x.view(b, t, d), weights, target.view(b, t, z), chunk_rows=4)
    assert distance(batched, (loss / b).double()) < 1e-6


def test_chunking_does_not_change_the_result(place_fp32):
    x, weights, target = operands(place_fp32, SIZES[1])
    whole = run(projector_alignment, x, weights, target, chunk_rows=1000)
    for chunk in (5, 36, 37):
        parts = run(projector_alignment, x, weights, target, chunk_rows=chunk)
        for a, b in zip(parts, whole, strict=True):
            assert distance(a, b.double()) < 2e-6


def test_two_runs_agree_bitwise(place):
    given = operands(place, SIZES[1])
    first, second = (run(projector_alignment, *given, chunk_rows=16) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("kinds", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_scale_of_backward_is_never_rounded_to_half(place, kinds):
    """1/N of 65,536 rows and more is nothing in fp16: the product is taken in fp32."""
    source, result = ((place.dtype, torch.float32)[k] for k in kinds)
    x = (place.randn(70, 33) * 1000).to(source)
    factor = torch.tensor(1.2345e-6, device=place.device)
    exact = x.double() * factor.double()
    ours = torch.ops.fastrepa.scaled(x, factor, result)
    assert ours.dtype == result
    # fp16 results near 1e-3 have their unit, those near 1e-6 are subnormal: 2^-25 at most.
    unit = torch.finfo(result).eps
    assert ((ours.double() - exact).abs() <= unit * exact.abs() + 2.0**-24).all()


def test_views_and_leading_dimensions(place_fp32):
    x, weights, target = operands(place_fp32, (12, 40, 48, 24, 5))
    exact = projector_alignment_reference(x.double(), [w.double() for w in weights], target)
    strided = target.t().contiguous().t()
    assert distance(projector_alignment(x, weights, strided, chunk_rows=5), exact) < 1e-6
    turned = [w.t().contiguous().t() if w.ndim == 2 else w for w in weights]
    wide = x.view(3, 4, 40).transpose(0, 1).contiguous().transpose(0, 1)
    loss = projector_alignment(wide, turned, target.view(3, 4, 24), chunk_rows=5)
    assert distance(loss, exact) < 1e-6


def test_launches_of_a_chunk():
    """15 each; once: x in the weights' dtype, three bias gradients, the factor and the loss."""
    x, weights, target = operands(PLACES["interpreter-fp32"], (48, 24, 32, 16, 16), torch.float16)
    leaves = [w.requires_grad_() for w in weights]

    def launches(rows):
        with launch.backend("triton"), counted() as names:
            projector_alignment(x[:rows].requires_grad_(), leaves, target[:rows], chunk_rows=16)
        return [name for name in names if name not in ("aten.fill_.Scalar", "aten.view.default")]

    one, three = launches(16), launches(48)
    # SiLU twice, cosine, SiLU' twice; once the sums of three bias gradients.
    assert sum(name.startswith("_") for name in three) == 3 * 5 + 3
    assert len(three) - len(one) == 2 * 15
    assert len(one) == 15 + 6, one


def test_empty_input(place_fp32):
    _, weights, _ = operands(place_fp32, (4, 40, 48, 24, 5))
    x, target = place_fp32.randn(0, 40), place_fp32.randn(0, 24)
    for value in run(projector_alignment, x, weights, target):
        assert torch.equal(value, torch.zeros_like(value))


def test_autocast(place_fp32):
    x, weights, target = operands(place_fp32, SIZES[1])
    with torch.autocast(x.device.type, dtype=torch.bfloat16), launch.backend("auto"):
        ours = run(projector_alignment, x, weights, target, chunk_rows=16)
        eager = run(projector_alignment_reference, x, weights, target)
    exact = run(projector_alignment_reference, x.double(), [w.double() for w in weights], target)
    unit = torch.finfo(torch.bfloat16).eps
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert a.dtype == torch.float32
        assert distance(a, c) <= 2 * distance(b, c) + unit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": 5}, "weights must be"),
        ({"x": torch.zeros(4)}, "x must be"),
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, "x must be"),
        ({"w1": torch.zeros(0)}, "w1 and w3 must be matrices"),
        ({"w2": torch.zeros(5, 6)}, "w2 must be"),
        ({"b3": torch.zeros(5)}, "b3 must be"),
        ({"b1": torch.zeros(6, dtype=torch.float16)}, "b1 must have w1's floating dtype"),
        ({"b1": torch.zeros(6, device="meta")}, "b1 must be on"),
        ({"target": torch.zeros(4, 6)}, "target must be"),
        ({"target": torch.zeros(4, 7, dtype=torch.int32)}, "target must be floating point or int8"),
        ({"target": torch.zeros(4, 7, requires_grad=True)}, "target must not require"),
        ({"row_weight": torch.zeros(3)}, "row_weight must be"),
        ({"target_scale": torch.zeros(4, 1)}, "target_scale must be"),
        ({"chunk_rows": 0}, "chunk_rows must be positive"),
    ],
)
def test_errors_name_the_argument(change, words):
    shapes = {"w1": (6, 8), "b1": (6,), "w2": (6, 6), "b2": (6,), "w3": (7, 6), "b3": (7,)}
    weights = [change.get(name, torch.zeros(shape)) for name, shape in shapes.items()]
    options = {k: v for k, v in change.items() if k in ("row_weight", "target_scale", "chunk_rows")}
    with pytest.raises(ValueError, match=f"projector_alignment: {words}"):
        projector_alignment(
            change.get("x", torch.zeros(4, 8)),
            weights[: change.get("weights", 6)],
            change.get("target", torch.zeros(4, 7)),
            **options,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration(dtype):
    shapes = ((4, 8), (6, 8), (6,), (6, 6), (6,), (7, 6), (7,))
    leaves = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    target, rows = torch.randn(4, 7), torch.rand(4)
    ops = torch.ops.fastrepa
    for needs in ([True] * 7, [True] + [False] * 6):
        inputs = [v.detach().requires_grad_(need) for v, need in zip(leaves, needs, strict=True)]
        # The gradients are outputs of the forward: only the loss is differentiable.
        torch.library.opcheck(
            ops.projector_alignment, (*inputs, target, None, rows, 1e-12, 3, needs)
        )
    torch.library.opcheck(ops.scaled, (torch.randn(5, 3).to(dtype), torch.tensor(2.0), dtype))


def test_compiled_graph_is_whole_and_agrees(place_fp32):
    x, weights, target = operands(place_fp32, SIZES[1])
    backend = "inductor" if x.is_cuda else "aot_eager"

    def loss(x, weights, target):
        return projector_alignment(x * 2, weights, target, chunk_rows=16) * 3

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for a, b in zip(run(compiled, x, weights, target), run(loss, x, weights, target), strict=True):
        assert distance(a, b.double()) < 1e-6


def test_torch_func_grad_and_fake_tensors(place_fp32):
    x, weights, target = operands(place_fp32, SIZES[1])

    def loss(x, w1):
        return projector_alignment(x, [w1, *weights[1:]], target, chunk_rows=16)

    functional = torch.func.grad(loss, argnums=(0, 1))(x, weights[0])
    full = run(projector_alignment, x, weights, target, 1.0, chunk_rows=16)
    assert distance(functional[0], full[1].double()) < 1e-6
    assert distance(functional[1], full[2].double()) < 1e-6
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, *weights, target)]
        assert projector_alignment(fake[0], fake[1:7], fake[7]).shape == ()


def test_cost():
    """SiT-XL/2 with DINOv2-B targets, 256 images: six products of 65,536 rows, 3.2 TFLOP."""
    n, d, p, z = 65536, 1152, 2048, 768
    products = d * p + p * p + p * z
    full = projector_alignment_cost(n, d, p, z, 2)
    assert full.flops == 6 * n * products
    weights = products + 2 * p + z
    assert full.bytes == n * (2 * d + z) * 2 + weights * 6
    forward = projector_alignment_cost(n, d, p, z, 2, x_grad=False, weight_grad=False)
    assert forward.flops == 2 * n * products
    assert forward.bytes == n * (d + z) * 2 + weights * 2
    frozen = projector_alignment_cost(n, d, p, z, 2, weight_grad=False)
    assert frozen.flops == 4 * n * products


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    """SiT-XL/2's shape takes dx, weight gradients, the chunk's buffers, partial sums, no more."""
    n, d, p, z = 65536, 1152, 2048, 768
    place_cuda = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(n, d, **place_cuda).requires_grad_()
    shapes = ((p, d), (p,), (p, p), (p,), (z, p), (z,))
    weights = [(torch.randn(s, **place_cuda) * 0.02).requires_grad_() for s in shapes]
    target = torch.randn(n, z, **place_cuda)
    projector_alignment(x, weights, target).backward()  # cuBLAS workspaces are not counted
    for leaf in (x, *weights):
        leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = projector_alignment(x, weights, target)
    forward = torch.cuda.max_memory_allocated() - before
    loss.backward()
    both = torch.cuda.max_memory_allocated() - before
    row = 2 * (4 * p + z)
    allowed = n * d * 2 + launch.chunk_rows(x.device, row) * row + (64 + 32) * 2**20
    assert forward <= allowed
    assert both <= allowed
