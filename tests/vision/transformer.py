"""A random vision transformer of a few channels."""

from __future__ import annotations

import torch

WIDTH, HEADS = 32, 4


def transformer(seed, patch, table, *, depth=2, prefix=1, layer_scale=False, ln_pre=False):
    """A random vision transformer under timm's names, with a `table` x `table` position table."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=0.2):
        return torch.randn(*shape, generator=g) * scale

    def norm(name):
        return {f"{name}.weight": 1 + normal(WIDTH), f"{name}.bias": normal(WIDTH)}

    def linear(name, inputs, outputs):
        return {f"{name}.weight": normal(outputs, inputs), f"{name}.bias": normal(outputs)}

    state = {
        "pos_embed": normal(1, prefix + table**2, WIDTH, scale=1.0),
        "patch_embed.proj.weight": normal(WIDTH, 3, patch, patch),
        **norm("norm"),
    }
    if prefix:
        state["cls_token"] = normal(1, 1, WIDTH, scale=1.0)
    if ln_pre:
        state |= norm("norm_pre")
    else:
        state["patch_embed.proj.bias"] = normal(WIDTH)
    for i in range(depth):
        state |= norm(f"blocks.{i}.norm1") | linear(f"blocks.{i}.attn.qkv", WIDTH, 3 * WIDTH)
        state |= linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH) | norm(f"blocks.{i}.norm2")
        state |= linear(f"blocks.{i}.mlp.fc1", WIDTH, 4 * WIDTH)
        state |= linear(f"blocks.{i}.mlp.fc2", 4 * WIDTH, WIDTH)
        if layer_scale:
            state |= {f"blocks.{i}.ls{k}.gamma": 1 + normal(WIDTH) for k in (1, 2)}
    return state
