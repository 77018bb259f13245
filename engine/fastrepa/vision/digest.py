"""The identity of frozen weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def digest(network: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor: the encoder's identity."""
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        sha.update(memoryview(flat.view(torch.uint8).numpy()))
    return sha.hexdigest()
