"""attention: each backend that runs here against float64, and calls that cannot run."""

import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrepa_kernels import attention
from fastrepa_kernels.attention import (
    BACKENDS,
    MODULES,
    PACKED,
    SDPA,
    attention_cost,
    attention_reference,
    backends,
    choose,
    refusal,
)
from fastrepa_kernels.attention import choice as choices
from tests.kernels.accuracy import assert_as_good_as_eager, check

pytestmark = pytest.mark.usefixtures("another_machine")
CPU = torch.device("cpu")


# Numbers ------------------------------------------------------------------------------------------


def problem(tokens, dim, dtype, norm, device="cpu", batch=2, heads=3):
    def randn(*shape):
        return torch.randn(shape, device=device).to(dtype)

    given = [randn(batch, tokens, 3, heads, dim)]
    if norm:
        given += [1 + 0.1 * randn(dim), 0.1 * randn(dim), 1 + 0.1 * randn(dim), 0.1 * randn(dim)]
    return given, [randn(batch, tokens, heads, dim)]


def agree(backend, tokens, dim, dtype, norm=False, **size):
    given, upstream = problem(tokens, dim, dtype, norm, **size)
    # A bias of k shifts whole rows of scores: its gradient is 0, and no error is relative to that.
    given, fixed = given[:4], given[4:]

    def norms(rest):
        return (rest[:2], (rest[2], fixed[0].to(rest[2].dtype))) if rest else (None, None)

    def ours(qkv, *rest):
        q, k = norms(rest)
        return attention(qkv, q_norm=q, k_norm=k, backend=backend)

    def eager(qkv, *rest):
        return attention_reference(qkv, *norms(rest))

    names = ["qkv", "q weight", "q bias", "k weight"][: len(given)]
    check(names, ours, eager, given, upstream)


SHAPES = [(64, 72), (100, 64), (256, 72), (1024, 64)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa-flash", "math", "math-chunked", "sdpa"])
def test_cpu_backends_are_as_good_as_the_specification(backend, dtype, norm):
    for tokens, dim in SHAPES[: 3 if norm else None]:
        agree(backend, tokens, dim, dtype, norm)


@pytest.mark.parametrize("backend", ["sdpa-flash", "math-chunked"])
def test_a_long_sequence(backend):
    agree(backend, 4096, 72, torch.float32, batch=1, heads=1)


def test_a_chunk_does_not_change_its_samples(monkeypatch):
    monkeypatch.setattr(backends, "_product_dtype", lambda dtype: torch.float32)
    (qkv,), (grad,) = problem(64, 32, torch.bfloat16, norm=False, batch=7)

    def run():
        x = qkv.clone().requires_grad_()
        y = attention(x, backend="math-chunked")
        return y.detach(), torch.autograd.grad(y, x, grad)[0]

    whole = run()
    for matrices in (6, 2):  # two samples, and one at the end; two heads, and one
        monkeypatch.setattr(backends, "CPU_CHUNK", matrices * 64 * 64 * 4)
        for a, b in zip(run(), whole, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chunks_have_float32_products_where_a_cpu_has_no_others(monkeypatch, dtype):
    monkeypatch.setattr(backends, "_product_dtype", lambda dtype: torch.float32)
    agree("math-chunked", 100, 64, dtype)


def test_float64_is_math_to_the_last_digits():
    assert choose(CPU, torch.float64, 72).backend == "math"
    given, _ = problem(100, 72, torch.float64, norm=True)
    qkv, qw, qb, kw, kb = given
    torch.testing.assert_close(
        attention(qkv, q_norm=(qw, qb), k_norm=(kw, kb)),
        attention_reference(qkv, (qw, qb), (kw, kb)), rtol=1e-13, atol=1e-14,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_backends_are_as_good_as_the_specification(backend, dim):
    why = refusal(backend, torch.device("cuda", 0), torch.bfloat16, dim)
    if why:
        pytest.skip(f"{backend}: {why}")
    for tokens, norm in itertools.product((64, 256, 1024), (False, True)):
        agree(backend, tokens, dim, torch.bfloat16, norm, device="cuda")


class LargeResults(TorchDispatchMode):
    """Names of what gives a tensor of `elements` or more."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.names = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        results = out if isinstance(out, tuple | list) else (out,)
        if any(isinstance(t, torch.Tensor) and t.numel() >= self.elements for t in results):
            self.names.append(func._schema.name.removeprefix("aten::"))
        return out


COPIES = {"clone", "copy_", "cat", "stack", "contiguous", "_to_copy", "empty_like"}


def test_nothing_is_copied_on_the_way_in_or_out():
    (qkv,), (grad,) = problem(64, 72, torch.float32, norm=False)
    op, backward_op = (
        backends._packed_attention._init_fn,
        backends._packed_attention_backward._init_fn,
    )
    with LargeResults(grad.numel()) as forward:
        out, sums = op(qkv, None, "sdpa-flash", False)
        out.view(*out.shape[:2], -1)  # [B,T,H d] as it is
    assert any("scaled_dot_product" in name for name in forward.names)
    assert not COPIES & set(forward.names), forward.names
    with LargeResults(grad.numel()) as backward:
        backward_op(grad, qkv, out, sums, "sdpa-flash", False, False)
    assert [name for name in backward.names if name in COPIES] == ["stack"]  # dq, dk, dv in one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa-flash", "math-chunked"])
def test_the_bias_of_qkv_gets_its_gradient_here(backend, dtype):
    """The one that the Linear would have given it."""
    (qkv,), upstream = problem(40, 24, dtype, norm=False)
    bias = torch.randn(qkv.shape[2:].numel()).to(dtype)

    def ours(x, bias):
        return attention(x + bias.detach().view(x.shape[2:]), backend=backend, bias=bias)

    def eager(x, bias):
        return attention_reference(x + bias.view(x.shape[2:]))

    check(["qkv", "bias"], ours, eager, [qkv, bias], upstream)


def test_a_bias_is_refused_where_its_gradient_is_not_made(stand_in):
    name, _ = stand_in
    (qkv, *norm), _ = problem(16, 8, torch.float32, norm=True)
    with pytest.raises(ValueError, match=r"attention: bias needs q and k without norms .*norms$"):
        attention(qkv, q_norm=norm[:2], backend="sdpa-flash", bias=torch.zeros(72))
    if name in PACKED:
        qkv.requires_grad_()
        bias = torch.zeros(72, requires_grad=True)
        attention(qkv, backend=name, bias=bias).square().sum().backward()
        torch.testing.assert_close(bias.grad, qkv.grad.sum((0, 1)).flatten())
        return
    with pytest.raises(ValueError, match=f"bias needs .*xformers.*; got {name}$"):
        attention(qkv, backend=name, bias=torch.zeros(72))


@pytest.mark.parametrize("name", SDPA)
def test_torch_takes_the_calls_for_a_gpu(name):
    """Arguments and results' shapes fit, by torch's own shape functions: nothing is computed."""
    b, t, h, d = 2, 40, 3, 24
    qkv = torch.empty(b, t, 3, h, d, dtype=torch.bfloat16, device="meta")
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    out, sums = backends._aten(name, q, k, v)
    assert out.transpose(1, 2).is_contiguous()  # as the op hands it on, without a copy
    assert (sums.shape, sums.dtype) == (backends._sums_shape(name, b, t, h), torch.float32)
    for x in backends._aten_backward(name, [torch.empty_like(out), q, k, v, out], sums):
        assert x.shape == out.shape
        assert x.transpose(1, 2).is_contiguous()  # read where it lies by the pass that stacks


def test_nothing_is_summed_for_a_bias_that_is_frozen(monkeypatch):
    monkeypatch.setattr(backends, "column_sums", None)
    qkv = problem(16, 8, torch.float32, norm=False)[0][0].requires_grad_()
    attention(qkv, backend="sdpa-flash", bias=torch.zeros(72)).sum().backward()
    assert qkv.grad is not None


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 37, 3, 24), (3, 100, 2, 72)])
def test_one_pass_stacks_and_sums(place, shape, sums):
    """It does so also from strides that no backend gives."""
    b, t, h, d = shape
    grads = [place.randn(b, h, t, d).transpose(1, 2), place.randn(*shape), place.randn(*shape)]
    dqkv, dbias = backends._stacked(grads, sums)
    assert torch.equal(dqkv, torch.stack(grads, 2))
    assert dqkv.is_contiguous()
    if not sums:
        assert not dbias.numel()
        return
    assert dbias.dtype == torch.float32
    rows = dqkv.view(b * t, -1)
    assert_as_good_as_eager("sums", dbias, rows.float().sum(0), rows.double().sum(0))


# Packages that cannot run here: stand-ins with their signatures -----------------------------------


def as_flash_attn(q, k, v):
    """Compute [B,T,H,d] each -> (out [B,T,H,d], log-sums [B,H,T])."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v), scores.logsumexp(-1)


def grads_of(q, k, v, out, grad, sums):
    """Compute them from what the forward saved, as flash does: P from the log-sums."""
    scale = q.shape[-1] ** -0.5
    p = (torch.einsum("bthd,bshd->bhts", q, k) * scale - sums[..., None]).exp()
    dp = torch.einsum("bthd,bshd->bhts", grad, v)
    ds = p * (dp - (grad * out).sum(-1).transpose(1, 2)[..., None]) * scale
    dq, dk = torch.einsum("bhts,bshd->bthd", ds, k), torch.einsum("bhts,bthd->bshd", ds, q)
    return dq, dk, torch.einsum("bhts,bthd->bshd", p, grad)


class Package:
    """The four packages' signatures, as far as they are used; `seen` keeps `deterministic`."""

    def __init__(self):
        self.seen = []

    def flash_attn_qkvpacked_func(self, qkv, softmax_scale=None, causal=False, *,
                                  deterministic=False):  # fmt: skip
        self.seen.append(deterministic)
        return as_flash_attn(*qkv.unbind(2))[0]

    def flash_attn_func(self, q, k, v, *, deterministic=False, return_lse=False):
        self.seen.append(deterministic)
        out, sums = as_flash_attn(q, k, v)
        return (out, sums.float()) if return_lse else out

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, *,
                        deterministic=False, dq=None, dk=None, dv=None):  # fmt: skip
        self.seen.append(deterministic)
        for into, value in zip((dq, dk, dv), grads_of(q, k, v, out, dout, lse), strict=True):
            into.copy_(value)
        return dq, dk, dv

    def memory_efficient_attention_forward_requires_grad(self, query, key, value):
        out, sums = as_flash_attn(query, key, value)
        pad = -query.shape[1] % 32  # as its CUTLASS kernels do
        return out, torch.nn.functional.pad(sums.float(), (0, pad), value=math.inf)

    def memory_efficient_attention_backward(self, grad, output, lse, query, key, value):
        return grads_of(query, key, value, output, grad, lse)


@pytest.fixture(params=MODULES)
def stand_in(request, monkeypatch):
    """A package that computes what it should, on the CPU."""
    name, package = request.param, Package()
    monkeypatch.setattr(choices, "rule", lambda *_: "")
    monkeypatch.setitem(backends._loaded, name, package)
    return name, package


@pytest.mark.parametrize("norm", [False, True])
def test_packages_get_what_they_want_and_gradients_come_back(stand_in, norm):
    name, _ = stand_in
    agree(name, 37, 72, torch.float32, norm)


def test_packages_are_told_to_be_deterministic(stand_in):
    name, package = stand_in
    qkv = problem(16, 8, torch.float32, norm=False)[0][0].requires_grad_()
    attention(qkv, backend=name).sum().backward()
    assert not any(package.seen)
    package.seen.clear()
    torch.use_deterministic_algorithms(True)
    try:
        attention(qkv, backend=name).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert any(package.seen) or name == "xformers"  # which asks torch


def test_a_trial_sees_what_is_wrong_or_fails(stand_in, monkeypatch):
    name, _ = stand_in
    tried = (name, CPU, torch.float32, 72, False)
    before = torch.get_rng_state()
    assert choices._trial(*tried) == ""
    assert torch.equal(torch.get_rng_state(), before)
    sums = backends.column_sums
    with monkeypatch.context() as patch:  # the gradient of the bias is tried too
        patch.setattr(backends, "column_sums", lambda t: sums(t) * 1.2)
        assert choices._trial(*tried).startswith("is wrong on" if name in PACKED else "")
    forward = as_flash_attn
    monkeypatch.setitem(globals(), "as_flash_attn", lambda q, k, v: forward(q, k, v.flip(1)))
    assert choices._trial(*tried).startswith("is wrong on this device by")

    def raises(*_):
        raise RuntimeError("\nno kernel image is available\nmore")

    monkeypatch.setitem(globals(), "as_flash_attn", raises)
    assert (
        choices._trial(*tried)
        == "fails on this device (RuntimeError: no kernel image is available)"
    )


def test_compiled_graph_is_whole_and_agrees_for_packages(stand_in, monkeypatch):
    assert_compiles(stand_in[0], monkeypatch)


@pytest.mark.parametrize("backend", ["auto", "sdpa-flash", "math", "math-chunked", "sdpa"])
def test_compiled_graph_is_whole_and_agrees(backend, monkeypatch):
    assert_compiles(backend, monkeypatch)


def assert_compiles(backend, monkeypatch):
    refusal_of = choices._refusal.__wrapped__

    def untraceable(*args):
        torch._dynamo.graph_break()  # a trial on a GPU could not be traced either
        return refusal_of(*args)

    monkeypatch.setattr(choices, "_refusal", untraceable)
    given, _ = problem(37, 72, torch.float32, norm=True)

    def function(qkv, qw, qb, kw, kb):
        plain = attention(qkv, backend=backend)
        return plain + attention(qkv, q_norm=(qw, qb), k_norm=(kw, kb), backend=backend)

    def run(f):
        leaves = [t.clone().requires_grad_() for t in given]
        y = f(*leaves)
        return (y, *torch.autograd.grad(y.square().sum(), leaves))

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(function), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["flash-attn-4", "xformers", "sdpa-flash", "math-chunked"])
def test_registration(name, monkeypatch):
    monkeypatch.setitem(backends._loaded, name, Package())
    (qkv,), (grad,) = problem(16, 8, torch.float32, norm=False)
    leaf, bias = qkv.clone().requires_grad_(), torch.randn(72, requires_grad=True)
    ops = torch.ops.fastrepa
    for given in (None, bias):
        torch.library.opcheck(ops.packed_attention, (leaf, given, name, False))
    out, sums = ops.packed_attention(qkv, None, name, False)
    for need_bias in (False, True):
        torch.library.opcheck(
            ops.packed_attention_backward, (grad, qkv, out, sums, name, True, need_bias)
        )


def test_the_stand_ins_have_the_packages_names():
    """Whoever has a package installed sees at once that a name or argument is gone."""
    for name, used in {
        "flash-attn-2": {"flash_attn_qkvpacked_func": ("deterministic",),
                         "flash_attn_func": ("deterministic",)},
        "flash-attn-3": {"flash_attn_qkvpacked_func": ("deterministic",),
                         "flash_attn_func": ("deterministic",)},
        "flash-attn-4": {"flash_attn_func": ("return_lse",),
                         "_flash_attn_bwd": ("deterministic", "dq", "dk", "dv")},
        "xformers": {"memory_efficient_attention_forward_requires_grad": (),
                     "memory_efficient_attention_backward": ()},
    }.items():  # fmt: skip
        package = SimpleNamespace() if backends.load(name) else backends._loaded[name]
        for function, arguments in used.items():
            real = getattr(package, function, getattr(Package, function))
            assert set(arguments) <= set(inspect.signature(real).parameters), (name, function)


# The public call ----------------------------------------------------------------------------------


def test_autocast_decides_the_dtype():
    qkv = torch.randn(2, 16, 3, 2, 8, requires_grad=True)
    norm = torch.ones(8), torch.zeros(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(qkv, q_norm=norm, k_norm=norm)
    y.sum().backward()
    assert (y.dtype, qkv.grad.dtype) == (torch.bfloat16, torch.float32)


def test_shapes_without_numbers():
    qkv = torch.empty(2, 16, 3, 2, 8, device="meta", requires_grad=True)
    y = attention(qkv)
    y.sum().backward()
    assert (y.shape, qkv.grad.shape) == ((2, 16, 2, 8), qkv.shape)


def test_packages_see_autocasts_dtype_also_after_a_norm(monkeypatch):
    seen = []

    class Seeing(Package):
        def flash_attn_qkvpacked_func(self, qkv, **_):
            seen.append({qkv.dtype})
            return qkv[:, :, 0]

        def flash_attn_func(self, q, k, v, **_):
            seen.append({q.dtype, k.dtype, v.dtype})
            return q

    monkeypatch.setattr(choices, "rule", lambda *_: "")
    monkeypatch.setitem(backends._loaded, "flash-attn-2", Seeing())
    qkv, norm = torch.randn(2, 16, 3, 2, 8), (torch.ones(8), torch.zeros(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(qkv, backend="flash-attn-2")
        attention(qkv, q_norm=norm, backend="flash-attn-2")
    assert seen == [{torch.bfloat16}, {torch.bfloat16}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": torch.zeros(2, 4, 6, 8)}, r"attention: qkv must be a floating-point \[B, T, 3"),
        ({"qkv": torch.zeros(2, 4, 2, 1, 8)}, r"attention: qkv must be"),
        ({"qkv": torch.zeros(2, 4, 3, 1, 8, dtype=torch.int64)}, "attention: qkv must be"),
        ({"q_norm": (torch.ones(0), torch.zeros(0))}, r"q_norm must be two \[8\] on cpu; got \(0,"),
        ({"k_norm": (torch.ones(8, device="meta"),) * 2}, "k_norm must be two .* on meta"),
        ({"bias": torch.zeros(8)}, r"attention: bias must be \[24\]; got \(8,\)"),
        ({"backend": "flash"}, "backend: 'flash' is not one of auto, flash-attn-2"),
        ({"backend": "sdpa-cudnn"}, "backend: 'sdpa-cudnn' cannot run here: needs a GPU"),
    ],
)
def test_errors_name_the_argument(change, words):
    given = {"qkv": torch.zeros(2, 4, 3, 1, 8)} | change
    with pytest.raises(ValueError, match=words):
        attention(given.pop("qkv"), **given)
    with pytest.raises(ValueError, match="require: 'fast' is not one of any, flash"):
        choose(CPU, torch.float32, 8, require="fast")


def test_cost():
    from torch.utils.flop_counter import FlopCounterMode

    qkv = torch.randn(2, 64, 3, 4, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = attention(qkv)
    assert counter.get_total_flops() == attention_cost(2, 64, 4, 8, 2).flops
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == attention_cost(2, 64, 4, 8, 2, backward=True).flops
    rows = 2 * 64 * 4 * 8
    assert attention_cost(2, 64, 4, 8, 2).bytes == 2 * 4 * rows + 4 * 2 * 4 * 64
