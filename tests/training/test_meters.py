"""meters: shares, rates and memory of real steps, what they cost; and no host sync in a step."""

import time
from collections import Counter

import pytest
import torch
from deepspeed.comm.torch import TorchBackend

from fastrepa.commands.profile.host_syncs import IN_HOST_MEMORY, HostSyncs
from fastrepa.config import load_config
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.runtime.hardware import GPUS, peak_flops
from fastrepa.runtime.regions import NAMES, SAMPLING
from fastrepa.runtime.world import World
from fastrepa.training.messages import slow_precision
from fastrepa.training.meters import ImageFlops, Meter
from fastrepa.training.trainer import Trainer
from fastrepa.training.zero import engine as zero
from fastrepa.training.zero import settings
from fastrepa_kernels import launch
from tests.runs import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 8
CPU = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def trainer(world):
    """The quickstart's, on noise, with two micro-batches a step."""
    trainer = built(world)
    step(trainer)
    return trainer


def built(world, *overrides):
    sizes = (f"training.global_batch={BATCH}", f"training.micro_batch={BATCH // 2}")
    overrides = ("run=nowhere", "training.precision=fp32", *sizes, *overrides)
    config = load_config(ROOT / "configs/quickstart.yaml", overrides)
    return Trainer(config, world)


def batches_of(trainer):
    return RandomBatches(trainer, trainer.world.device, trainer.micro)


def step(trainer, batches=None, steps=1):
    """The log line of real steps."""
    batches = batches or batches_of(trainer)
    trainer.meter.reset()
    for _ in range(steps):
        trainer.meter.add(trainer.train_step(batches))
    return trainer.meter.read(trainer.step, 1e-3, 1.0)


def test_bf16_without_instructions_for_it_is_warned_of(monkeypatch):
    def said(precision, device="cpu"):
        config = load_config(ROOT / "configs/quickstart.yaml", [f"training.precision={precision}"])
        return slow_precision(config.training, World(0, 1, 0, torch.device(device)))

    for fast in (True, False):
        monkeypatch.setattr(launch, "cpu_multiplies", lambda dtype: fast)  # noqa: B023
        assert bool(said("bf16")) is not fast
        assert said("fp32") == said("bf16", "cuda") == ""


def test_a_steps_time_is_shared_out(trainer):
    began = time.perf_counter()
    line = step(trainer, steps=2)
    passed = time.perf_counter() - began
    assert sum(line[name] for name in NAMES) == pytest.approx(1, abs=1e-5)
    for name in ("encoder", "codec", "forward", "backward", "communication", "optimiser"):
        assert line[name] > 0, name
    assert line["backward"] > line["codec"]
    assert line["step_seconds"] * 2 <= passed
    assert line["images_per_s"] * line["step_seconds"] == pytest.approx(BATCH)
    assert line["peak_memory_bytes"] > 1e8  # torch alone is more


class Stalled:
    def __init__(self, batches):
        self.batches = batches

    def __next__(self):
        time.sleep(0.1)
        return next(self.batches)


def test_a_stall_of_the_data_is_named(trainer):
    fast, slow = step(trainer), step(trainer, Stalled(batches_of(trainer)))
    stalled = slow["data_wait"] * slow["step_seconds"]
    assert stalled >= 0.2  # two micro-batches
    assert stalled - fast["data_wait"] * fast["step_seconds"] > 0.18


def test_a_slow_collective_is_named_and_taken_off_the_region_around_it(world, monkeypatch):
    for module in (zero, settings):  # or one rank would send none
        monkeypatch.setattr(module, "as_run", lambda zero, training, ranks: zero)
    trainer = built(world)
    step(trainer)
    whole = TorchBackend.all_gather_into_tensor
    calls = []

    def slow(*args, **kwargs):
        calls.append(time.sleep(0.3))
        return whole(*args, **kwargs)

    for name in ("all_gather_into_tensor", "all_gather", "all_reduce"):
        monkeypatch.setattr(TorchBackend, name, slow if name == whole.__name__ else late(name))
    line = step(trainer)
    seconds = {name: line[name] * line["step_seconds"] for name in NAMES}
    assert seconds["communication"] >= 0.3
    assert seconds["optimiser"] + seconds["backward"] < line["step_seconds"] - 0.3


def late(name):
    whole = getattr(TorchBackend, name)

    def run(*args, **kwargs):
        time.sleep(0.3)
        return whole(*args, **kwargs)

    return run


def test_inner_regions_are_taken_off_outer_ones_and_sampling_counts_nowhere():
    meter = Meter(CPU, 4, ImageFlops(training=1000, frozen=10, peak=1e6))
    with meter.region("optimiser"):
        time.sleep(0.02)
        with meter.region("communication"):
            time.sleep(0.04)
        time.sleep(0.02)
    with meter.region(SAMPLING):
        time.sleep(0.5)
    one = torch.ones(())
    for loss, skipped in ((3 * one, 0 * one), (torch.nan * one, one)):
        meter.add({"loss": loss, "skipped": skipped})
    line = meter.read(2, 0.1, 1.0)
    assert line["loss"] == 3  # what was skipped is no loss
    assert line["communication"] == pytest.approx(0.5, abs=0.1)
    assert line["optimiser"] == pytest.approx(0.5, abs=0.1)
    assert 2 * line["step_seconds"] < 0.4
    assert line["model_flops_per_s"] == pytest.approx(1000 * line["images_per_s"])
    assert line["frozen_flops_per_s"] == pytest.approx(10 * line["images_per_s"])
    assert line["mfu"] == pytest.approx(line["model_flops_per_s"] / 1e6)
    meter.flops = ImageFlops(training=1000, frozen=0, peak=None)
    meter.add({"loss": one, "skipped": 0 * one})
    assert not {"mfu", "frozen_flops_per_s"} & meter.read(3, 0.1, 1.0).keys()


def test_what_the_meters_cost(trainer, monkeypatch):
    marks = Counter()
    mark = Meter._mark
    monkeypatch.setattr(
        Meter, "_mark", lambda meter, name: (marks.update([name]), mark(meter, name))
    )
    seconds = step(trainer)["step_seconds"]
    monkeypatch.undo()
    assert 12 <= marks.total() < 200
    meter = Meter(CPU, BATCH)
    metrics = {n: torch.ones(()) for n in ("loss", "velocity_loss", "alignment_loss")}
    metrics["skipped"] = torch.zeros(())
    repeats = 100
    began = time.perf_counter()
    for _ in range(repeats):
        for _ in range(marks.total() // 2):
            with meter.region("forward"):
                pass
        meter.add(metrics)
    cost = (time.perf_counter() - began) / repeats
    assert cost < 0.005 * seconds


def test_peaks_by_torchs_names():
    assert peak_flops("NVIDIA H100 80GB HBM3", bf16=True) == GPUS["h100"].bf16 == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", bf16=False) == 19.5e12
    assert peak_flops("NVIDIA H200", bf16=True) == GPUS["h200"].bf16
    assert peak_flops("NVIDIA B200", bf16=True) == GPUS["b200"].bf16
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GB200",
                  "NVIDIA GeForce RTX 4090", "x86_64"):  # fmt: skip
        assert peak_flops(other, bf16=True) is None


def traced(trainer):
    batches = batches_of(trainer)
    with HostSyncs(trainer.world.device) as syncs:
        trainer.train_step(batches)
    return syncs


def places(syncs, *, of_deepspeed):
    """Return where a GPU would be waited for, as (file, function)."""
    found = {(s.file, s.function) for s, _ in syncs.waiting}
    return {p for p in found if p[0].startswith("deepspeed/") == of_deepspeed}


def test_no_host_sync_in_a_step(trainer):
    syncs = traced(trainer)
    assert places(syncs, of_deepspeed=False) == set()
    # Each excuse is used: none outlives the code it was made for.
    used = {(s.file, s.function) for s in syncs.found if s.reason}
    assert used == {place for place in IN_HOST_MEMORY if "/training/" in place[0]}


NORM = ("deepspeed/runtime/utils.py", "is_invalid_grad_norm")
LISTS = {("deepspeed/runtime/zero/utils.py", function)
         for function in ("assert_lst_len_same_as_other_ranks", "get_lst_from_rank0",
                          "<listcomp>")}  # fmt: skip
DEEPSPEED = {
    **{(stage, precision): set() for stage in (0, 1, 2) for precision in ("fp32", "bf16")},
    (3, "bf16"): {NORM, *LISTS},  # it compares lists between ranks while its trace is young
}


@pytest.mark.parametrize(("stage", "precision"), DEEPSPEED)
def test_deepspeeds_own_syncs_are_known(world, stage, precision):
    """Each waits for the GPU once or more a step: none may join them unseen."""
    tiny = ("model={width: 48, depth: 2, heads: 3, patch: 4, num_classes: 8}",
            "vision.encoders=[]", "data.resolution=32", "training.global_batch=2",
            "training.micro_batch=null")  # fmt: skip
    trainer = built(world, *tiny, f"zero.stage={stage}", f"training.precision={precision}")
    step(trainer)
    syncs = traced(trainer)
    assert places(syncs, of_deepspeed=False) == set()
    assert places(syncs, of_deepspeed=True) == DEEPSPEED[stage, precision]


@pytest.mark.parametrize("read", [float, bool, Ellipsis, "tolist", "cpu"])
def test_a_planted_sync_is_named(trainer, monkeypatch, read):
    latents = trainer.codec.latents

    def planted(*args):
        z = latents(*args)
        if read is Ellipsis:
            z[z > 2].sum()
        elif isinstance(read, str):
            getattr(z.sum(), read)()
        else:
            read(z.sum())
        return z

    monkeypatch.setattr(trainer.codec, "latents", planted)
    (found,) = [s for s, _ in traced(trainer).waiting if not s.file.startswith("deepspeed/")]
    assert found.function == "planted" and found.file.endswith("test_meters.py")
    assert "trainer.py" in found.through and "forward_losses" in found.through


@pytest.mark.gpu
def test_shares_on_a_gpu(trainer):
    line = step(trainer, Stalled(batches_of(trainer)), steps=3)
    assert sum(line[name] for name in NAMES) == pytest.approx(1, abs=1e-5)
    assert line["data_wait"] * line["step_seconds"] > 0.15
    assert line["forward"] > 0 and line["backward"] > 0


@pytest.mark.gpu
def test_no_host_sync_in_a_step_on_a_gpu(world):
    """The unsharded float32 engine, whose optimiser is ours alone: every sync would be ours."""
    trainer = built(world, "zero.stage=0")
    batches = batches_of(trainer)
    ready = iter([next(batches) for _ in range(2 * trainer.forwards)])
    trainer.train_step(ready)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.meter.add(trainer.train_step(ready))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_other_engines_wait_in_deepspeed_alone(trainer, recwarn):
    batches = batches_of(trainer)
    ready = iter([next(batches) for _ in range(2 * trainer.forwards)])
    trainer.train_step(ready)
    torch.cuda.synchronize()
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        trainer.meter.add(trainer.train_step(ready))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    said = [w for w in recwarn if "synchronizing" in str(w.message)]
    assert [w for w in said if "deepspeed" not in w.filename] == []
