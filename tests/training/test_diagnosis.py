"""The last words of a run whose steps are bad: said in every setting, whatever else fails."""

import errno
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastrepa.training import diagnosis as diagnosing
from fastrepa.training.diagnosis import diagnosis
from tests.runs import said_by

pytestmark = pytest.mark.ranks

NONE = "vision.encoders=[]"
TWO = (
    "vision.encoders=[{name: test_vit, weights: random, input: 32, grid: bilinear}, "
    "{name: test_vit, weights: random, input: 64, grid: bilinear}]"
)
SETTINGS = [
    f"{NONE}; zero.stage=0",
    f"{NONE}; zero.stage=1; training.micro_batch=2; training.precision=bf16",
    f"{NONE}; zero.stage=3; training.recompute=1",
    f"{NONE}; data.codec={{name: sd-vae}}; data.latents=cached; model.patch=2",
    f"{TWO}; zero.stage=2; zero.offload=cpu",
    f"{TWO}; zero.stage=3; zero.offload=cpu; training.micro_batch=2; kernels=eager",
    "zero.stage=1; training.micro_batch=2; vision.look_ahead=true",
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_said_in_every_setting(tmp_path, ranks):
    said = said_by("tests.programs.diagnosed_steps", tmp_path, *SETTINGS, ranks=ranks)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert len(lines) == len(SETTINGS)
    for settings, told in zip(SETTINGS, lines, strict=True):
        forwards = 8 // ranks // 2 if "micro_batch=2" in settings else 1
        error, report = told["error"], told["ranks"][-1]
        assert "\n" not in error
        assert error.startswith("stopped at step 1: 3 steps in a row had a loss"), settings
        assert f"; rank {ranks - 1}: loss is nan; velocity_loss is nan" in error, settings
        assert "repetition failed" not in error, settings
        assert "the last good checkpoint is " in error and "step_0000007; " in error
        assert told["file"] == "bad_step_0000001.json"
        assert report["samples"] == [f"{f}-1 (its latent)" for f in range(forwards)], settings
        assert [one["velocity_loss"] for one in report["losses"]] == ["nan"] * forwards
        assert ("alignment_loss" in report["losses"][0]) == (NONE not in settings)
        assert len(report["gradients"]) > 30, settings
        assert not any(rank["samples"] for rank in told["ranks"][:-1])


class Small(nn.Module):
    """As a generator is called; the third sample's target decides what comes out."""

    def __init__(self, pair):
        super().__init__()
        self.weight, self.pair = nn.Parameter(torch.ones(())), pair

    def forward(self, x, t, label, targets, drop):
        out = self.weight * x
        if targets:
            out = out + sum(t.sum() for t in targets)
        return (out, out.mean()) if self.pair else out


def of(trainer, run, **how):
    how = {"run": run, "in_row": 3, "good": None, "group": trainer.group, **how}
    return str(diagnosis(trainer, lambda forward: [f"s{i}" for i in range(5)], **how))


@pytest.fixture
def trainer(world):
    """All that a diagnosis asks of a trainer: five samples of three channels, one target of two."""
    model = Small(pair=True)

    def losses(batch, numbers):
        targets = [torch.ones(5, 2, 2), batch]
        out = model(torch.ones(5, 3, 2, 2), torch.ones(5), torch.ones(5), targets, None)
        return {"loss": out[0].sum() / 0 if batch is None else out[0].sum()}

    return SimpleNamespace(
        step=7, world=world, engine=SimpleNamespace(module=model, backward=lambda x: x.backward()),
        last_batches=[torch.ones(5, 4)], sample_numbers=lambda forward: torch.arange(5),
        forward_losses=losses, group=dist.new_group(backend="gloo"),
    )  # fmt: skip


def test_a_target_of_the_second_encoder_is_blamed(trainer, tmp_path):
    trainer.last_batches[0][3, 1] = torch.inf
    said = of(trainer, tmp_path)
    assert "s3 (its targets)" in said and "loss is inf" in said
    assert trainer.step == 6 and "there is no good checkpoint yet" in said
    kept = json.loads((tmp_path / "bad_step_0000007.json").read_text(), parse_constant=pytest.fail)
    assert kept["ranks"][0]["losses"] == [{"loss": "inf"}]


def test_a_full_disk_leaves_the_line(trainer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(diagnosing, "write_whole", full)
    trainer.last_batches[0][:] = torch.nan
    said = of(trainer, tmp_path, good=tmp_path / "step_0000004")
    assert "stopped at step 7: 3 steps in a row" in said and "rank 0: loss is nan" in said
    assert "the last good checkpoint is" in said and "step_0000004; " in said
    assert said.endswith("bad_step_0000007.json: cannot be written (No space left on device)")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["forward_losses", "names"])
def test_a_repetition_that_fails_leaves_the_line(trainer, tmp_path, where):
    def failing(*_):
        raise RuntimeError("out of memory:\n lots")

    if where == "names":
        said = str(diagnosis(trainer, failing, run=tmp_path, in_row=3, good=None,
                             group=trainer.group))  # fmt: skip
    else:
        trainer.forward_losses = failing
        said = of(trainer, tmp_path)
    words = "rank 0: its repetition failed (RuntimeError: out of memory: lots)"
    assert words in said and "\n" not in said
    assert re.search(r"all there is to know: \S+bad_step_0000007\.json$", said)
