"""Triton decides when it is first imported whether kernels are interpreted: so this comes first."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
