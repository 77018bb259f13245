"""Kernels, gaps and host calls of profiled steps, in a trace made by hand and in a real one."""

import json

import pytest
import torch

from fastrepa.profiling.activity import PROFILED, WAIT, profile_steps, summary
from fastrepa.profiling.trace import REGION, STEP
from tests.profiling.trace_events import Events


def test_two_steps_of_a_gpu():
    t = Events()
    both = t.add(STEP, 0, 2000)
    t.add("cudaLaunchKernel", -20, -10)  # the step before
    t.add(REGION + "forward", 10, 400, both)
    t.add("cudaLaunchKernel", 20, 30)
    t.add("cudaLaunchKernel", 30, 36)
    optimiser = t.add(REGION + "optimiser", 400, 1500, both)
    t.add("cudaMemcpyAsync", 500, 700, optimiser)
    end = t.add(REGION + WAIT, 1600, 2000, both)
    t.add("cudaDeviceSynchronize", 1601, 1990, end)
    t.add(REGION + "forward", 40, 390, on_gpu=True).is_user_annotation = False
    kernels = [("gemm", 100, 500), ("norm", 400, 600), ("gemm", 1000, 1990), ("norm", 2100, 2200)]
    for name, start, stop in kernels:  # the second beside the first, the last after the steps
        t.add(name, start, stop, on_gpu=True)
    found = summary(t.all, 2, on_gpu=True)
    assert json.loads(json.dumps(found)) == found
    assert (found["of"], found["seconds"], found["launches"]) == ("kernels", 1e-3, 1.5)
    gemm, norm = found["names"]
    assert (gemm["name"], gemm["count"], gemm["us"]) == ("gemm", 1, 695)
    assert (norm["name"], norm["us"]) == ("norm", 100) and norm["share"] == pytest.approx(100 / 795)
    assert found["busy_seconds"] == pytest.approx(745e-6)
    assert found["idle_us"] == pytest.approx(255)
    longest = found["gaps"][0]
    assert (longest["region"], longest["after"], longest["before"]) == ("optimiser", "norm", "gemm")
    assert longest["us"] == pytest.approx(200) and longest["count"] == 0.5
    # Neither the step before nor the wait at the end is a step's own.
    assert found["host_calls"] == [
        {"name": "cudaMemcpyAsync", "count": 0.5, "us": 100},
        {"name": "cudaLaunchKernel", "count": 1, "us": 8},
    ]


def test_steps_on_a_cpu():
    taken, x = [], torch.randn(64, 64)

    def step():
        taken.append(x.mm(x).mm(x) + 1)

    found = profile_steps(step, torch.device("cpu"))
    assert len(taken) == PROFILED + 1 == found["steps"] + 1
    counts = {n["name"]: n["count"] for n in found["names"]}
    assert counts == {"aten::mm": 2, "aten::add": 1}
    assert found["of"] == "operations" and found["launches"] == 3
    assert 0 < found["busy_seconds"] < found["seconds"]
    assert found["host_calls"] == []
