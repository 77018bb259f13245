"""DeepSpeed's ZeRO as the trainer uses it."""

import logging
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is first imported
    # It would warn that no CUDA runtime is there, which the run's first line says better.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
