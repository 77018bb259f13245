"""The counter itself: what it counts, and what it rightly does not."""

import torch

from fastrepa_kernels import adamw_ema_, launch, layernorm_modulate
from tests.launches import SYNC, counted, interpreted


def test_torch_is_counted_where_it_computes_or_copies():
    x = torch.rand(4, 6, requires_grad=True)
    with counted() as launches:
        y = x.view(2, 12).t()[1:].detach().reshape(-1)  # its last step copies
        torch.empty_like(y).zero_()
        y.split(3)
        (x * 2).sum().backward()
        y.sum().item()
    assert launches == [
        "aten.clone.default", "aten.zero_.default", "aten.mul.Tensor", "aten.sum.default",
        "aten.ones_like.default", "aten.mul.Tensor", "aten.sum.default", SYNC,
    ]  # fmt: skip


@interpreted
def test_our_operations_are_looked_into():
    p, g, m, v, e = (torch.rand(100) for _ in range(5))
    with counted() as launches, launch.backend("triton"):
        adamw_ema_([p, p], [g, g], [m, m], [v, v], [e, e], step=1, lr=1e-3)
    assert launches == ["_adamw_ema_kernel"] * 2
    with counted() as launches:
        adamw_ema_(p, g, m, v, e, step=1, lr=1e-3)
    assert "aten._fused_adamw_.default" in launches


@interpreted
def test_a_backward_is_counted_and_the_numbers_stay():
    x, shift, scale = (torch.rand(s, requires_grad=True) for s in ((2, 4, 16), (2, 16), (2, 16)))
    with launch.backend("triton"):
        expected = torch.autograd.grad(layernorm_modulate(x, shift, scale).sum(), x)[0]
        with counted() as launches:
            y = layernorm_modulate(x, shift, scale)
            assert launches == ["_norm_fwd_kernel"]
            got = torch.autograd.grad(y.sum(), x)[0]
    assert "_norm_bwd_kernel" in launches
    assert torch.equal(got, expected)
