"""One way to make a custom op differentiable, in eager, under torch.compile and under torch.func.

`CustomOpDef.register_autograd` serves eager and torch.compile (the graph stays whole), but torch
refuses it inside torch.func transforms. There, and only there, the same forward and backward run
as an autograd.Function in the form that torch.func understands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def differentiable(op: Any, *, setup_context: Callable, backward: Callable) -> Callable:
    """Register `backward` on `op`; return the callable that public functions use."""
    op.register_autograd(backward, setup_context=setup_context)
    return _callable(op, setup_context, backward)


def first_order(op: Any) -> Callable:
    """Return the callable for an op that only a backward uses: it has no gradient of its own."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{op._qualname}: second derivatives are not implemented")

    return _callable(op, lambda ctx, inputs, output: None, backward)


def _callable(op: Any, setup_context: Callable, backward: Callable) -> Callable:
    def forward(*arguments: Any) -> Any:
        return op(*arguments)

    members = {"forward": forward, "setup_context": setup_context, "backward": backward}
    function: Any = type(
        op._qualname.replace("::", "_"),
        (torch.autograd.Function,),
        {name: staticmethod(member) for name, member in members.items()},
    )

    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return function.apply(*arguments)
        return op(*arguments)

    return call
