"""Every operation of the kernels, on the CPU, where triton cannot be imported."""

import sys

sys.modules["triton"] = None  # what is imported from here on finds none

import torch  # noqa: E402

import fastrepa_kernels as fk  # noqa: E402
from fastrepa_kernels import launch  # noqa: E402

B, T, D, H, P, Z = 2, 3, 8, 2, 12, 6


def drawn(*shape):
    return torch.randn(shape, requires_grad=True)


def differentiated(y):
    (y[0] if isinstance(y, tuple) else y).sum().backward()


def main():
    x, branch = drawn(B, T, D), drawn(B, T, D)
    shift, scale, gate = drawn(3, B, D).unbind(0)
    wide, narrow = (drawn(4 * D, D), drawn(4 * D)), (drawn(D, 4 * D), drawn(D))
    differentiated(fk.layernorm_modulate(x, shift, scale))
    differentiated(fk.gated_residual(x, branch, gate))
    differentiated(fk.gated_residual_layernorm_modulate(x, branch, gate, shift, scale))
    differentiated(fk.adaln_linear(x, shift, scale, *wide))
    differentiated(fk.adaln_mlp(x, shift, scale, (*wide, *narrow), residual=(branch, gate)))
    differentiated(fk.linear_gelu(x, *wide))
    differentiated(fk.attention(drawn(B, T, 3, H, D // H)))
    projector = [drawn(P, D), drawn(P), drawn(P, P), drawn(P), drawn(Z, P), drawn(Z)]
    differentiated(fk.projector_alignment(x, projector, torch.randn(B, T, Z)))
    p, grad, ema = torch.randn(3, D)
    fk.adamw_ema_(p, grad, p.new_zeros(D), p.new_zeros(D), ema, step=1, lr=1e-3, ema_decay=0.9)
    for draw, dtype in (("normal", torch.float32), ("words", torch.int64)):
        fk.keyed_random(draw, 7, 1, 2, torch.arange(B), 5, dtype)
    with launch.backend("triton"):
        try:
            fk.layernorm_modulate(x, shift, scale)
        except RuntimeError as e:
            print(e)


if __name__ == "__main__":
    main()
