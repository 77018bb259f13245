"""Recomputation, and h kept: the same bits, less or more memory, the work that is said."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastrepa.commands.bench.peak_memory import highest
from fastrepa.config import config_from_dict
from fastrepa.model.sit import SiT, recomputed_blocks
from fastrepa.training.memory.workload import measure_workload

DEPTH, SIDE, BATCH = 5, 16, 8


def config_of(recompute="none", *, keep="none", kernels="fused", dropout=0.5):
    return config_from_dict(
        {
            "run": "run",
            "data": {"path": "data", "resolution": SIDE, "codec": {"name": "pixel"}},
            "model": {"width": 64, "depth": DEPTH, "heads": 2, "patch": 2, "num_classes": 10,
                      "label_dropout": dropout},
            "alignment": {"projector_width": 48, "block": 2},
            "training": {"recompute": recompute, "keep": keep, "precision": "fp32"},
            "kernels": kernels,
        }
    )  # fmt: skip


def model_of(config, dtype):
    torch.manual_seed(0)
    model = SiT.from_config(config, side=SIDE, channels=3, encoder_widths=[40])
    with torch.no_grad():
        for p in model.parameters():  # adaLN-Zero would hide the blocks from the loss
            p.add_(torch.randn_like(p), alpha=0.02)
    return model.to(dtype).train()


def step(model, dtype):
    """Losses and gradients of one step whose label dropout comes from torch's generator."""
    torch.manual_seed(1)
    x, t = torch.randn(BATCH, 3, SIDE, SIDE), torch.rand(BATCH)
    target = torch.randn(BATCH, (SIDE // 2) ** 2, 40).to(dtype)
    model.zero_grad()
    velocity, alignment = model(x, t, torch.arange(BATCH), [target])
    loss = (velocity - x).square().mean() + 0.5 * alignment
    del velocity
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, torch.get_rng_state()


@pytest.mark.parametrize("kernels", ["fused", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_change(kernels, dtype):
    loss, gradients, generator = step(model_of(config_of(kernels=kernels), dtype), dtype)
    ways = [(1, "none"), (2, "none"), (4, "none"), (99, "none"), ("none", "h"), (2, "h")]
    for every, keep in ways:
        again = step(model_of(config_of(every, keep=keep, kernels=kernels), dtype), dtype)
        assert torch.equal(again[0], loss)
        assert again[1].keys() == gradients.keys()
        for name, gradient in again[1].items():
            assert torch.equal(gradient, gradients[name]), (every, keep, name)
        assert torch.equal(again[2], generator)


def test_memory_falls_with_every_block_more():
    peaks = {}
    for every in ("none", 4, 2, 1):
        model = model_of(config_of(every), torch.float32)
        step(model, torch.float32)
        peaks[every] = highest(lambda model=model: step(model, torch.float32), torch.device("cpu"))
    assert peaks["none"] > peaks[4] > peaks[2] > peaks[1]
    assert peaks[1] < 0.6 * peaks["none"]


def test_h_is_kept_by_the_fused_blocks_that_do_not_run_again():
    h = BATCH * (SIDE // 2) ** 2 * 4 * 64

    def held(recompute, **settings):
        """Elements that autograd keeps from the forward."""
        model, seen = model_of(config_of(recompute, **settings), torch.float32), {}

        def keep(t):
            seen[t.untyped_storage().data_ptr()] = t.numel()
            return t

        x, t = torch.randn(BATCH, 3, SIDE, SIDE), torch.rand(BATCH)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(x, t, torch.arange(BATCH))  # which holds on to what was seen
        return out, sum(seen.values())

    def more(recompute, **settings):
        (_, kept), (_, plain) = (held(recompute, keep=k, **settings) for k in ("h", "none"))
        return kept - plain

    assert more("none") == DEPTH * h
    assert more(2) == (DEPTH - recomputed_blocks(DEPTH, 2)) * h
    assert more("none", kernels="eager") == 0


def test_only_some_run_again():
    calls = [0] * DEPTH
    model = model_of(config_of(2), torch.float32)
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    step(model, torch.float32)
    assert calls == [2, 1, 2, 1, 1]  # the last never
    assert [recomputed_blocks(DEPTH, n) for n in (0, 1, 2, 3, 4, 9)] == [0, 4, 2, 2, 1, 1]
    calls[:] = [0] * DEPTH
    with torch.no_grad():
        model(torch.randn(1, 3, SIDE, SIDE), torch.rand(1), torch.zeros(1, dtype=torch.int64))
    assert calls == [1] * DEPTH


def test_the_work_is_what_plan_says():
    config = config_of(kernels="eager")
    work = measure_workload(config)
    flops = {}
    for every in (0, 1):
        model = model_of(config_of(every or "none", kernels="eager"), torch.float32)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(model, torch.float32)
        flops[every] = counter.get_total_flops() / BATCH
    assert work.recomputed_flops(1) == pytest.approx(flops[1] - flops[0], rel=0.01)
