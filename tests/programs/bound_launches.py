"""Launches every kernel through Triton's own launcher, up to the compiler, without a GPU.

The interpreter and the ahead-of-time compiler have launchers of their own: a keyword that Triton
keeps for itself, or a parameter that is missing, passes both and fails on a device. Prints the
names of the kernels whose arguments were bound, as a JSON list.
"""

import json
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.cases import CASES, Shape
from fastrepa_kernels import keyed_random, launch
from fastrepa_kernels.activation import column_sums
from fastrepa_kernels.attention.backends import _stacked

bound = set()


def record(kernel, *args) -> None:
    bound.add(kernel.__name__)


device = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
)
triton.runtime.driver.set_active(device)
JITFunction._do_compile = record  # returns no kernel: a launch ends here

cpu, half = torch.device("cpu"), torch.bfloat16
with launch.backend("triton"):
    for name, case in CASES.items():
        if name == "attention":
            continue  # backends of others; our kernel of its backward is below
        problem = case.build(Shape("SiT-S/2", 1, 16), half, cpu)
        outputs = case.providers["ours"](problem.leaves, problem.fixed)
        if problem.leaves and problem.upstream:
            for leaf in problem.leaves:
                leaf.requires_grad_()
            outputs = case.providers["ours"](problem.leaves, problem.fixed)
            torch.autograd.backward(outputs, problem.upstream)
    for step in (1, torch.tensor(1)):
        keyed_random("normal", 1, 2, step, torch.arange(3), 8, torch.float32)
    dq = torch.zeros(1, 16, 6, 64, dtype=half)
    _stacked((dq, dq, dq), sums=True)
    column_sums(torch.zeros(8, 16))
json.dump(sorted(bound), sys.stdout)
