"""The optimiser's phase, counted: launches, reads by the host, bytes that its pass moves."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from fastrepa.config import load_config
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.training import optimizer as ema
from fastrepa.training.trainer import Trainer
from fastrepa.training.zero import engine as zero
from fastrepa.training.zero import settings
from fastrepa.training.zero.step import order_streams
from fastrepa_kernels import launch
from fastrepa_kernels.adamw_ema import adamw_ema_cost
from tests.launches import SYNC, counted
from tests.runs import ROOT, SMALL

MOST = 40  # launches, of a model of 73 tensors
CACHED = ("vision.targets=cached", "training.precision=bf16", "model.depth=4")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Flags stay where they are, the norm is one reduction, and kernels are Triton's."""
    monkeypatch.setattr(ema.AdamWEMA, "_on_host", staticmethod(lambda param: False))
    monkeypatch.setattr(ema, "NORM_PIECE", 1 << 62)
    with launch.backend("triton"):
        yield


def trainer_of(world, *overrides):
    config = load_config(ROOT / "configs/quickstart.yaml", ["run=none", *SMALL, *overrides])
    return Trainer(config, world)


@pytest.mark.parametrize(("stage", "divided"), [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)])
def test_launches_reads_and_bytes_of_the_optimisers_phase(
    world, as_on_a_gpu, monkeypatch, stage, divided
):
    """divided: it runs as several ranks would run that stage, DeepSpeed's partitions and all."""
    if divided:
        for module in (zero, settings):
            monkeypatch.setattr(module, "as_run", lambda zero, training, ranks: zero)
    trainer = trainer_of(world, *CACHED, "model.qk_norm=true", f"zero.stage={stage}")
    assert trainer.engine.zero_optimization_stage() == (stage if divided else 0)
    tensors = [p for p in trainer.engine.module.parameters() if p.requires_grad]
    assert len(tensors) == 73
    with launch.backend("torch"):
        batch = next(RandomBatches(trainer, world.device, trainer.micro))
        losses = trainer.forward_losses(batch, trainer.sample_numbers(0))
        trainer.engine.backward(losses["loss"])
    last = trainer.engine.module.final_layer.linear.weight
    before = last.detach().clone()
    trainer.optimizer.set_rate(0.1)
    trainer.optimizer.bad_loss = torch.tensor(False)
    passes = []
    kept = ema.adamw_ema_
    monkeypatch.setattr(
        ema, "adamw_ema_", lambda *args, **kw: passes.append((args, kw)) or kept(*args, **kw)
    )
    with counted() as launches:
        trainer.engine.step()
    assert len(launches) <= MOST, Counter(launches)
    assert SYNC not in launches
    assert launches.count("_adamw_ema_kernel") == 1
    assert launches.count("aten.linalg_vector_norm.default") == 1  # 2 bytes a parameter more
    assert all(p.grad is None for p in tensors)
    assert not torch.equal(last, before)
    ((((p,), (g,), (m,), (v,), ((e,),)), kw),) = passes
    (low,) = kw["low_precision"]
    assert last.data_ptr() in range(low.data_ptr(), low.data_ptr() + low.nbytes)  # not copied again
    moved = 2 * sum(t.nbytes for t in (p, m, v, e)) + g.nbytes + low.nbytes
    cost = adamw_ema_cost(p.numel(), grad_itemsize=2, low_itemsize=2)
    assert moved == cost.bytes == 36 * p.numel()
    assert p.numel() < 1.01 * sum(t.numel() for t in tensors) + 1000


def test_the_end_of_backward_orders_streams(monkeypatch):
    """DeepSpeed's epilogue, as on several GPUs, waits for the device no more."""
    accelerator, waits = get_accelerator(), []
    compute = SimpleNamespace(wait_stream=waits.append)
    monkeypatch.setattr(accelerator, "current_stream", lambda: compute)
    monkeypatch.setattr(type(accelerator), "synchronize", lambda self: waits.append("host"))
    for stream, expected in (("reduction", ["reduction"]), (None, ["host"])):
        own = SimpleNamespace(overlap_comm=True, reduction_stream=stream)
        own.independent_gradient_partition_epilogue = lambda: get_accelerator().synchronize()
        order_streams(own)
        own.independent_gradient_partition_epilogue()
        assert waits == expected
        waits.clear()
        accelerator.synchronize()
        assert waits.pop() == "host"
