"""One line that puts these operations under a stock SiT + REPA training script.

    loss_fn = patch_reference(model, loss_fn)

`model` is any module tree with the reference's names: blocks[i].{norm1, attn, norm2, mlp,
adaLN_modulation}, final_layer.{norm_final, linear, adaLN_modulation} and, optionally, projectors
(each Linear, SiLU, Linear, SiLU, Linear), returning (output, projections) from its forward.
`loss_fn(model, images, model_kwargs, zs=targets)` returns (denoising loss, alignment loss).

Only forwards are replaced, on the instances: no parameter, buffer, name or state dict changes, and
`copy.deepcopy` (an EMA) gives an independent patched model. What changes:
- a block's norms, modulations and gated residuals become two fused operations and a residual;
- `attn` that is timm's self-attention (qkv, num_heads, optional LayerNorms q_norm and k_norm, proj,
  no dropout, no mask) runs on the backend that `fastrepa_kernels.attention.choose` finds;
- `mlp` with a tanh-GELU and no dropout becomes linear_gelu and fc2;
- while the returned loss function runs, every projector computes the alignment loss itself, inside
  the model's forward (so DDP and ZeRO see every weight where they expect it), and the per-sample
  loop of the original loss runs over one element. Anywhere else projectors return projections.

A patched block cannot reach into the next: fusing its last residual with the next block's first
norm is for models that call gated_residual_layernorm_modulate across blocks themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastrepa_kernels.adaln import (
    gated_residual,
    gated_residual_layernorm_modulate,
    layernorm_modulate,
)
from fastrepa_kernels.attention import attention
from fastrepa_kernels.mlp import linear_gelu
from fastrepa_kernels.projector_alignment import projector_alignment

_BLOCK = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
_FINAL = ("norm_final", "linear", "adaLN_modulation")
_PROJECTOR = (nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear)


def _block_forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
    attended = self.attn(layernorm_modulate(x, shift1, scale1, eps=self.norm1.eps))  # [B,T,D]
    x, y = gated_residual_layernorm_modulate(x, attended, gate1, shift2, scale2, eps=self.norm2.eps)
    return gated_residual(x, self.mlp(y), gate2)


def _final_forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)  # [B,D]
    return self.linear(layernorm_modulate(x, shift, scale, eps=self.norm_final.eps))


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))


def _attention_forward(self: Any, x: Tensor) -> Tensor:
    qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B,T,3,H,d]
    q_norm, k_norm = (
        (norm.weight, norm.bias) if isinstance(norm, nn.LayerNorm) else None
        for norm in (getattr(self, "q_norm", None), getattr(self, "k_norm", None))
    )
    eps = self.q_norm.eps if q_norm else 1e-5
    return self.proj(attention(qkv, q_norm=q_norm, k_norm=k_norm, eps=eps).flatten(2))


def _projector_forward(self: Any, x: Tensor) -> Tensor:
    target = self.__dict__.get("alignment_target")
    if target is None:
        return type(self).forward(self, x)
    weights = [p for layer in (self[0], self[2], self[4]) for p in (layer.weight, layer.bias)]
    rows = x.reshape(-1, x.shape[-1])  # [N,D]
    loss = projector_alignment(rows, weights, target.reshape(-1, target.shape[-1]))
    return loss.expand(*x.shape[:-1], 1)  # the caller reshapes it: any element is the loss


class AlignmentInForward:
    """The original loss function, with the alignment loss taken from inside the model's forward."""

    def __init__(self, loss_fn: Callable, projectors: Sequence[nn.Module]):
        self.loss_fn = loss_fn
        self.projectors = list(projectors)

    def __call__(
        self, model: Callable, images: Tensor, model_kwargs: dict | None = None, zs: Any = None
    ) -> tuple[Tensor, Tensor]:
        if not zs:
            return self.loss_fn(model, images, model_kwargs, zs=zs)
        if len(zs) != len(self.projectors):
            raise ValueError(
                f"patch_reference: the model has {len(self.projectors)} projectors; "
                f"got {len(zs)} targets in zs"
            )
        alignment: list[Tensor] = []
        # One element per encoder stands in for targets and projections in the original loop.
        stand_ins = [torch.ones(1, 1, 1, device=z.device) for z in zs]

        def run_model(*args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
            output, losses = model(*args, **kwargs)
            alignment.append(torch.stack([loss.reshape(-1)[0] for loss in losses]).mean())
            return output, stand_ins

        for projector, target in zip(self.projectors, zs, strict=True):
            projector.__dict__["alignment_target"] = target.detach()
        try:
            denoising, _ = self.loss_fn(run_model, images, model_kwargs, zs=stand_ins)
        finally:
            for projector in self.projectors:
                projector.__dict__.pop("alignment_target", None)
        return denoising, alignment[-1]


def _check_norm(name: str, norm: nn.Module) -> None:
    if not isinstance(norm, nn.LayerNorm) or norm.elementwise_affine:
        raise ValueError(f"patch_reference: {name} must be a LayerNorm without affine; got {norm}")


def _check_children(name: str, module: nn.Module, children: Sequence[str]) -> None:
    missing = [child for child in children if not hasattr(module, child)]
    if missing:
        raise ValueError(f"patch_reference: {name} has no {', '.join(missing)}")


def _plain_gelu_mlp(mlp: nn.Module) -> bool:
    """Tell whether `mlp` is fc1, tanh-GELU, fc2 and nothing that does anything between them."""
    act, fc1 = getattr(mlp, "act", None), getattr(mlp, "fc1", None)
    between = [m for n, m in mlp.named_children() if n not in ("fc1", "act", "fc2")]
    return (
        isinstance(act, nn.GELU)
        and act.approximate == "tanh"
        and isinstance(fc1, nn.Linear)
        and fc1.bias is not None
        and isinstance(getattr(mlp, "fc2", None), nn.Linear)
        and all(isinstance(m, nn.Identity) or getattr(m, "p", None) == 0 for m in between)
    )


def _plain_attention(attn: nn.Module) -> bool:
    """Tell whether `attn` is timm's as DiT and SiT use it: only norms between qkv and proj."""
    parts = dict(attn.named_children())
    norms: list[Any] = [parts.pop(name, nn.Identity()) for name in ("q_norm", "k_norm")]
    qkv, proj = parts.pop("qkv", None), parts.pop("proj", None)
    width = getattr(qkv, "out_features", 0) // 3
    heads = getattr(attn, "num_heads", 0)
    return (
        isinstance(qkv, nn.Linear)
        and isinstance(proj, nn.Linear)
        and isinstance(heads, int)
        and heads > 0
        and width == qkv.in_features == proj.in_features
        and width % heads == 0
        and (
            all(isinstance(n, nn.Identity) for n in norms)
            or (
                all(isinstance(n, nn.LayerNorm) and n.bias is not None for n in norms)
                and all(tuple(n.normalized_shape) == (width // heads,) for n in norms)
                and len({n.eps for n in norms}) == 1
            )
        )
        # Whatever else is there does nothing: dropouts of 0 and Identity.
        and all(isinstance(m, nn.Identity) or getattr(m, "p", None) == 0 for m in parts.values())
    )


def _forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """Yield every module to patch and its new forward; raise before anything has been changed."""
    _check_children("model", model, ("blocks", "final_layer"))
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        _check_children(f"blocks.{i}", block, _BLOCK)
        _check_norm(f"blocks.{i}.norm1", block.norm1)
        _check_norm(f"blocks.{i}.norm2", block.norm2)
        yield block, _block_forward
        if _plain_attention(block.attn):
            yield block.attn, _attention_forward
        if _plain_gelu_mlp(block.mlp):
            yield block.mlp, _mlp_forward
    final: Any = model.final_layer
    _check_children("final_layer", final, _FINAL)
    _check_norm("final_layer.norm_final", final.norm_final)
    yield final, _final_forward
    projectors: Any = getattr(model, "projectors", ())
    for k, projector in enumerate(projectors):
        layers = [type(layer) for layer in projector.children()]
        if layers != list(_PROJECTOR) or any(projector[i].bias is None for i in (0, 2, 4)):
            raise ValueError(
                f"patch_reference: projectors.{k} must be Linear, SiLU, Linear, SiLU, Linear "
                f"with biases; got {projector}"
            )
        yield projector, _projector_forward


def patch_reference(model: nn.Module, loss_fn: Callable | None = None) -> Callable | None:
    """Run a stock SiT + REPA `model` on these operations; returns the loss function to use.

    Patches `model` in place (see the module's text for the names it expects). loss_fn: the stock
    loss, `loss_fn(model, images, model_kwargs, zs=targets) -> (denoising, alignment)`; the returned
    callable has the same signature and may be given the model wrapped in DDP. None stays None.
    Raises ValueError, before changing anything, where the tree is not what it expects.
    """
    for module, forward in list(_forwards(model)):
        module.__dict__["forward"] = MethodType(forward, module)
    projectors: Any = getattr(model, "projectors", ())
    return None if loss_fn is None else AlignmentInForward(loss_fn, projectors)
