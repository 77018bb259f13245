"""The cost of every operation of a step, counted while it runs: FLOPs and least bytes.

fastrepa_kernels' operations have the costs that they declare (`*_cost`); matrix products,
convolutions and attention the FLOPs of torch's counter; the rest none. Bytes are each distinct
input read once and each output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastrepa.model.projector import Projector
from fastrepa.model.sit import (
    Attention,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    SiT,
    SiTBlock,
    TimestepEmbedder,
)
from fastrepa_kernels.adaln import (
    gated_residual_cost,
    gated_residual_layernorm_modulate_cost,
    layernorm_modulate_cost,
)
from fastrepa_kernels.adaln_linear import adaln_linear_cost, adaln_mlp_cost
from fastrepa_kernels.adamw_ema import adamw_ema_cost
from fastrepa_kernels.attention import attention_cost
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.keyed_random import keyed_random_cost
from fastrepa_kernels.mlp import linear_gelu_cost
from fastrepa_kernels.projector_alignment import projector_alignment_cost

PARTS = ("attention", "MLP", "modulation", "alignment", "ends")
"""Of the generator. Attention and MLP begin with the gated branch before them and their norm; ends:
embeddings, final layer and what lies between patches and tokens.
"""

NOTHING = Cost(0, 0)
OVERWRITTEN = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_")
NO_WORK = ("aten::empty", "aten::new_empty", "aten::detach", "aten::lift_fresh", "aten::resize_",
           "aten::_local_scalar_dense")  # fmt: skip


@dataclass
class Counted:
    """Calls of an operation and their cost together."""

    calls: int = 0
    cost: Cost = NOTHING


class Parts:
    """Follows which part of the generator is at work, in forward and, by autograd's sequence
    numbers, in backward. annotate(part): a context that is open while a part is.
    """

    def __init__(self, annotate: Callable[[str], Any]) -> None:
        self.annotate = annotate
        self.of_sequence: dict[int, str] = {}
        self._open: list[tuple[str, Any, int]] = []

    @property
    def current(self) -> str:
        """The innermost open part; in backward that of the node at work; otherwise ''."""
        if self._open:
            return self._open[-1][0]
        node = torch._C._current_autograd_node()
        return "" if node is None else self.of_sequence.get(node._sequence_nr(), "")

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on the modules of `model` while inside."""
        hooks = []
        for module, part in _parts_of(model):
            hooks.append(module.register_forward_pre_hook(self._enter(part), prepend=True))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, part: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._note()
            context = self.annotate(part)
            context.__enter__()
            self._open.append((part, context, torch.autograd._get_sequence_nr()))

        return enter

    def _leave(self, *_: Any) -> None:
        self._note()
        self._open.pop()[1].__exit__(None, None, None)
        if self._open:
            outer, context, _since = self._open[-1]
            self._open[-1] = outer, context, torch.autograd._get_sequence_nr()

    def _note(self) -> None:
        """Book what was recorded since the last change to the part that was open."""
        if self._open:
            part, _, since = self._open[-1]
            for number in range(since, torch.autograd._get_sequence_nr()):
                self.of_sequence[number] = part


def _parts_of(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    kinds: list[tuple[Any, str]] = [
        (Attention, "attention"), (Mlp, "MLP"), (Projector, "alignment"),
        ((SiT, PatchEmbed, TimestepEmbedder, LabelEmbedder, FinalLayer), "ends"),
    ]  # fmt: skip
    for module in model.modules():
        for kind, part in kinds:
            if isinstance(module, kind):
                yield module, part
                break
        modulation = getattr(module, "adaLN_modulation", None)
        if isinstance(module, SiTBlock) and modulation is not None:
            yield modulation, "modulation"


class OperationCosts(TorchDispatchMode):
    """Counts what is done below autograd, by (operation, region, part), while entered."""

    def __init__(self, region: Callable[[], str], parts: Parts) -> None:
        super().__init__()
        self.region, self.parts = region, parts
        self.counted: dict[tuple[str, str, str], Counted] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if not func.is_view and not name.startswith((*NO_WORK, "prim::")):
            key = name, self.region(), self.parts.current
            entry = self.counted.setdefault(key, Counted())
            entry.calls += 1
            entry.cost = entry.cost + operation_cost(func, args, kwargs, out)
        return out


def operation_cost(func: Any, args: Any, kwargs: Any, out: Any) -> Cost:
    """Count one call."""
    name = func._schema.name
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    if name in OURS:
        return OURS[name](given)
    packet = func._overloadpacket
    flops = 0
    if packet in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
    read = [v for k, v in given.items() if not (k == "self" and name in OVERWRITTEN)]
    if name == "aten::embedding":  # reads the rows that it returns
        read = [given["indices"], out]
    return Cost(flops, _bytes(read) + _bytes(out))


def _bytes(values: Any) -> int:
    """Count the distinct memory under the tensors: an expanded one is small."""
    seen: dict[tuple[int, ...], int] = {}
    for t in tree_leaves(values):
        if isinstance(t, Tensor) and t.layout == torch.strided:
            distinct = 1
            for size, stride in zip(t.shape, t.stride(), strict=True):
                distinct *= size if stride else min(size, 1)
            seen[t.data_ptr(), *t.shape, *t.stride()] = distinct * t.element_size()
    return sum(seen.values())


def _norm_modulate(a: dict[str, Any], backward: bool = False) -> Cost:
    x: Tensor = a["x"]
    b, t, d = x.shape
    low = a["dy"].element_size() if backward else a["out_dtype"].itemsize
    gated = a.get("branch") is not None
    cost = gated_residual_layernorm_modulate_cost if gated else layernorm_modulate_cost
    return cost(b, t, d, x.element_size(), low, backward=backward)


def _adaln(cost: Callable[..., Cost], weight: str, *, backward: bool) -> Callable[..., Cost]:
    """Count adaln_linear and adaln_mlp; `weight` names the first one, whose rows are the width."""

    def of_call(a: dict[str, Any]) -> Cost:
        x, w = a["x"], a[weight]
        b, t, d = x.shape
        return cost(
            b, t, d, w.shape[0], x.element_size(), w.element_size(),
            residual=a["branch"] is not None, backward=backward,
        )  # fmt: skip

    return of_call


def _gated_residual(a: dict[str, Any], backward: bool = False) -> Cost:
    branch, x = a["branch"], a["dx" if backward else "x"]
    b, t, d = branch.shape
    return gated_residual_cost(b, t, d, x.element_size(), branch.element_size(), backward=backward)


def _linear_gelu(a: dict[str, Any], backward: bool = False) -> Cost:
    x, weight = a["x"], a["weight"]
    n = x.numel() // x.shape[-1] if x.numel() else 0
    return linear_gelu_cost(
        n, weight.shape[1], weight.shape[0], x.element_size(), backward=backward
    )


def _projector_alignment(a: dict[str, Any]) -> Cost:
    x, w1, w3 = a["x"], a["w1"], a["w3"]
    needs = a["needs"]
    return projector_alignment_cost(
        x.shape[0], x.shape[1], w1.shape[0], w3.shape[0], w1.element_size(),
        x_itemsize=x.element_size(), x_grad=needs[0], weight_grad=any(needs[1:]),
    )  # fmt: skip


def _adamw_ema(a: dict[str, Any]) -> Cost:
    low, grads = a["low_precision"], a["grads"]
    return adamw_ema_cost(
        sum(p.numel() for p in a["params"]),
        grad_itemsize=grads[0].element_size() if grads else 4,
        low_itemsize=low[0].element_size() if low else 0,
        emas=len(a["emas"]) // max(1, len(a["params"])),
    )


def _attention(a: dict[str, Any], backward: bool = False) -> Cost:
    b, t, _, h, d = a["qkv"].shape
    return attention_cost(b, t, h, d, a["qkv"].element_size(), backward=backward)


OURS: dict[str, Callable[[dict[str, Any]], Cost]] = {
    "fastrepa::norm_modulate": _norm_modulate,
    "fastrepa::norm_modulate_backward": lambda a: _norm_modulate(a, backward=True),
    "fastrepa::adaln_linear": _adaln(adaln_linear_cost, "weight", backward=False),
    "fastrepa::adaln_linear_backward": _adaln(adaln_linear_cost, "weight", backward=True),
    "fastrepa::adaln_mlp": _adaln(adaln_mlp_cost, "w1", backward=False),
    "fastrepa::adaln_mlp_backward": _adaln(adaln_mlp_cost, "w1", backward=True),
    "fastrepa::gated_residual": _gated_residual,
    "fastrepa::gated_residual_backward": lambda a: _gated_residual(a, backward=True),
    "fastrepa::linear_gelu": _linear_gelu,
    "fastrepa::linear_gelu_backward": lambda a: _linear_gelu(a, backward=True),
    "fastrepa::projector_alignment": _projector_alignment,
    "fastrepa::packed_attention": _attention,
    "fastrepa::packed_attention_backward": lambda a: _attention(a, backward=True),
    "fastrepa::adamw_ema_": _adamw_ema,
    "fastrepa::keyed_random": lambda a: keyed_random_cost(
        len(a["samples"]) * a["count"], a["dtype"].itemsize
    ),
}
"""fastrepa_kernels' operations by the functions that declare their costs."""
