"""Recomputation, h kept and offload across ZeRO stages; what `auto` becomes in a config.yaml."""

import json
import os
import re

import pytest
from torch.nn import functional

from fastrepa.config import config_from_dict, load_config
from fastrepa.errors import ConfigError
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.training.trainer import Trainer
from fastrepa.training.zero.offload import check_offload
from fastrepa.training.zero.settings import (
    MOST_BUCKET,
    NVME_SUB_GROUP,
    auto_settings,
    deepspeed_config,
    resolve_zero,
)
from tests.runs import ROOT, SMALL, metrics, said_by, train

pytestmark = pytest.mark.ranks


def config_of(name="SiT-XL/2", **zero):
    return config_from_dict(
        {"run": "some/run", "data": {"path": "x"}, "model": {"name": name}, "zero": zero}
    )


@pytest.fixture(scope="module")
def compared():
    """Every comparison of memory_steps, by kind, stage and precision: one launch of two processes,
    11 pairs of engines of two to five steps each.
    """
    said = said_by("tests.programs.memory_steps").splitlines()
    lines = [json.loads(line[9:]) for line in said if line.startswith("COMPARED ")]
    return {(r["kind"], r["stage"], r["precision"]): r for r in lines}


def test_stage_3_leaves_torch_as_it_was(world):
    """DeepSpeed replaces F.linear in the whole process and for good, unless told otherwise."""
    before = functional.linear
    overrides = ["run=nowhere", *SMALL, "zero.stage=3", "kernels=eager", "training.recompute=1"]
    trainer = Trainer(load_config(ROOT / "configs/quickstart.yaml", overrides), world)
    seen = []
    trainer.engine.module.final_layer.register_forward_hook(
        lambda *_: seen.append(functional.linear)
    )
    trainer.train_step(RandomBatches(trainer, world.device, trainer.micro))
    assert seen and before not in seen
    assert functional.linear is before


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]
)
def test_recomputation_changes_no_bit(compared, stage, precision):
    r = compared["recompute", stage, precision]
    plain, again = r["losses"]
    assert plain == again
    assert plain[0] != plain[-2]
    assert r["different"] == 0 < r["tensors"]
    assert r["recomputed"] == (2 if stage == 2 else 3)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (3, "bf16")])
def test_h_kept_changes_no_bit(compared, stage, precision):
    r = compared["keep", stage, precision]
    plain, kept = r["losses"]
    assert plain == kept
    assert plain[0] != plain[-2]
    assert r["different"] == 0 < r["tensors"]
    assert r["kept"] == 4 and r["recomputed"] == 0


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")]
)
def test_offload_trains_alike_and_its_state_moves_to_other_stages(compared, stage, precision):
    r = compared["offload", stage, precision]
    assert r["device"] == "cpu"
    for plain, there in zip(*r["losses"], strict=True):
        # bf16 weights round differently where a norm's last bit did.
        assert there == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 1e-3)
    assert r["moved"] > 1e-3  # or equal would mean little
    for kind, difference in r["difference"].items():
        assert difference < (1e-4 if precision == "fp32" else 0.02), kind
    assert r["there"] == r["back"] == 0
    there, plain = r["goes_on"]
    assert there == pytest.approx(plain, rel=1e-4 if precision == "fp32" else 1e-2)


def autos(config, trained, ranks):
    itemsize = config.training.dtype.itemsize
    return auto_settings(config.zero, config.model, itemsize, trained, ranks)


def in_deepspeeds_words(config):
    return deepspeed_config(config.zero, config.training, config.run, 8)


def test_auto_is_numbers_from_size_and_world():
    config = config_of()
    n, block = 675_000_000, 18 * 1152**2
    on_8, on_1024 = autos(config, n, 8), autos(config, n, 1024)
    assert on_8["reduce_bucket_size"] == block
    assert on_8["prefetch_bucket_size"] == block
    assert 6 * 1152 < on_8["param_persistence_threshold"] < 16 * 1152  # biases, no matrix
    assert on_8["overlap_comm"] and not autos(config, n, 1)["overlap_comm"]
    assert not autos(config_of(stage=0), n, 8)["overlap_comm"]
    # 128 KiB for each of 1,024 ranks, in bf16.
    assert on_1024["reduce_bucket_size"] == 1024 * 64 * 1024
    assert autos(config, n, 100_000)["reduce_bucket_size"] == MOST_BUCKET
    # A small model is one bucket, of an even number.
    small = autos(config_of("SiT-S/2"), 1_000_001, 8)
    assert small["reduce_bucket_size"] == small["allgather_bucket_size"] == 1_000_002
    nvme = config_of(stage=3, offload="nvme", nvme_path="/n")
    assert autos(nvme, n, 8)["sub_group_size"] == NVME_SUB_GROUP
    # What is given stays; nothing is auto any more.
    resolved = resolve_zero(config_of(stage=2, reduce_bucket_size=1234), n, 8)
    zero = in_deepspeeds_words(resolved)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 1234
    assert "auto" not in zero.values()
    with pytest.raises(ValueError, match=r"zero\.overlap_comm: still auto"):
        in_deepspeeds_words(config)


def test_offload_in_deepspeeds_words():
    nvme = resolve_zero(config_of(stage=3, offload="nvme", nvme_path="/n"), 10**6, 8)
    there = in_deepspeeds_words(nvme)["zero_optimization"]["offload_optimizer"]
    assert there["device"] == "nvme"
    # Two runs on one disk do not meet, nor two processes of one.
    assert re.fullmatch(rf"/n/run\.[0-9a-f]{{8}}\.{os.getpid()}@.+\.swap", there["nvme_path"])
    assert there["buffer_count"] == 5  # weight, gradient, two moments, one average


def test_a_run_offloads_recomputes_and_goes_on_without(tmp_path):
    common = ("training.checkpoint_every=2", "zero.param_persistence_threshold=100")
    train(
        tmp_path / "run", *common, "training.steps=2", "zero.stage=3", "zero.offload=cpu",
        "zero.offload_parameters=true", "training.recompute=auto",
        "training.memory_budget_gb=0.0001", ranks=2,
    )  # fmt: skip
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert saved.training.recompute == 1  # nothing fits into so little
    assert "auto" not in saved.zero.model_dump().values()
    assert saved.zero.overlap_comm is True
    more = ("training.steps=4", "zero.stage=1")
    train(tmp_path / "run", *common, *more)
    train(tmp_path / "plain", *common, *more)
    ours, plain = metrics(tmp_path / "run"), metrics(tmp_path / "plain")
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    for line, expected in zip(ours, plain, strict=True):
        for key in ("loss", "alignment_loss", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), (line["step"], key)


def test_nvme_works_or_says_what_is_missing(tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    path = f"zero.nvme_path={tmp_path / 'nvme'}"
    config = config_of(stage=3, offload="nvme", nvme_path=str(tmp_path / "nvme"))
    if not AsyncIOBuilder().is_compatible(verbose=False):
        with pytest.raises(ConfigError, match=r"zero\.offload: 'nvme' .*libaio-dev") as caught:
            check_offload(config.zero, config.run)
        assert "\n" not in str(caught.value)
        return
    common = ("training.steps=4", "zero.stage=3", "model.width=96")
    train(tmp_path / "run", *common, "zero.offload=nvme", path)
    assert list((tmp_path / "nvme").rglob("*ema*.swp"))
    train(tmp_path / "plain", *common)
    for ours, plain in zip(metrics(tmp_path / "run"), metrics(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_nvme_path_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    config = config_of(stage=3, offload="nvme", nvme_path=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"zero\.nvme_path: .*is not writable"):
        check_offload(config.zero, config.run)
