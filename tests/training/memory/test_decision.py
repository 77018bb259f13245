"""auto keeps h where it fits with nothing recomputed, else runs the fewest blocks again."""

import pytest

from fastrepa.config import config_from_dict, load_config
from fastrepa.training.memory import decision
from fastrepa.training.memory.decision import memory_peak, resolve_memory, sharding
from fastrepa.training.memory.workload import measure_workload
from tests.runs import ROOT


def config_of(**training):
    return config_from_dict(
        {
            "run": "run",
            "kernels": training.pop("kernels", "fused"),
            "data": {"path": "data", "resolution": 16, "codec": {"name": "pixel"}},
            "model": {"width": 64, "depth": 4, "heads": 2, "patch": 2},
            "alignment": {"projector_width": 48, "block": 2},
            "training": {"global_batch": 64, "sample_every": 0} | training,
        }
    )


def chosen(world, **training):
    t = resolve_memory(config_of(**training), world).training
    return t.recompute, t.keep


def peak_gb(**training):
    config = config_of(**training)
    work = measure_workload(config)
    memory, _ = memory_peak(work, sharding(config, 1, work.parameters), 0.0)
    return sum(memory.values()) / 1e9


@pytest.mark.parametrize(("gib", "keep"), [(139, "h"), (78, "none")], ids=["H200", "80 GB"])
def test_xl_at_batch_256(world, gib, keep):
    """Nothing is recomputed on either card, by what torch says it has, less the reserve."""
    recipe = ROOT / "configs/imagenet256_sit_xl2_dinov2b.yaml"
    budget = (gib * 2**30 - decision.RESERVE) / 1e9
    overrides = ["data.path=nowhere", "data.latents=cached", "vision.targets=cached",
                 f"training.memory_budget_gb={budget}"]  # fmt: skip
    t = resolve_memory(load_config(recipe, overrides), world).training
    assert t.global_batch == 256
    assert (t.recompute, t.keep) == ("none", keep)


def test_recompute_and_keep_are_decided_together(world):
    kept, plain = (peak_gb(keep=k) for k in ("h", "none"))
    some, every = (peak_gb(recompute=n) for n in (2, 1))
    assert kept > plain > some > every
    auto = {"recompute": "auto", "keep": "auto"}
    for budget, answer in (
        (kept, ("none", "h")),
        (plain, ("none", "none")),
        (some, (2, "none")),
        (every / 2, (1, "none")),
    ):
        assert chosen(world, **auto, memory_budget_gb=1.001 * budget) == answer
    # One of them is set: the other follows.
    assert chosen(world, recompute="auto", keep="none", memory_budget_gb=2 * kept) == (
        "none", "none",
    )  # fmt: skip
    recompute, keep = chosen(world, recompute="auto", keep="h", memory_budget_gb=1.001 * plain)
    assert keep == "h" and recompute in range(1, 4)  # room for h, made by recomputing
    assert chosen(world, memory_budget_gb=1.001 * plain) == ("none", "none")


def test_nothing_is_measured_where_nothing_can_be_decided(world, monkeypatch):
    monkeypatch.setattr(decision, "measure_workload", None)
    assert chosen(world) == ("none", "none")  # a CPU, and no budget
    assert chosen(world, recompute="auto") == ("none", "none")
    rich = {"memory_budget_gb": 1e3}
    assert chosen(world, recompute=2, **rich) == (2, "none")
    assert chosen(world, kernels="eager", **rich) == ("none", "none")
    assert chosen(world, keep="h") == ("none", "h")


def test_the_core_does_not_need_insight():
    """The decision is made on the way into every run: what it reads is no command's."""
    folder = ROOT / "engine/fastrepa"
    files = [*(folder / "training/memory").glob("*.py"), *(folder / "model").glob("*.py")]
    assert len(files) > 8
    assert [f.name for f in files if "fastrepa.commands" in f.read_text()] == []
