"""ZeRO in every stage, one process and two, gives one and the same run."""

import pytest

from fastrepa.training.meters import NAMES
from tests.engine.training.runs import metrics, train

STEPS = 5


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    train(run, f"training.steps={STEPS}", "zero.stage=0", "training.checkpoint_every=0")
    return metrics(run)


@pytest.mark.parametrize(
    ("ranks", "stage", "micro"), [(1, 1, 8), (1, 3, 8), (2, 1, 4), (2, 2, 2), (2, 3, 4)]
)
def test_losses_are_those_of_one_unsharded_process(tmp_path, one_process, ranks, stage, micro):
    train(
        tmp_path / "run", f"training.steps={STEPS}", f"zero.stage={stage}",
        f"training.micro_batch={micro}", "training.checkpoint_every=0", ranks=ranks,
    )  # fmt: skip
    ours = metrics(tmp_path / "run")
    assert len(ours) == len(one_process) == STEPS
    for line, expected in zip(ours, one_process, strict=True):
        assert sum(line[name] for name in NAMES) == pytest.approx(1, abs=1e-5)
        assert line["communication"] > 0
        for key in ("loss", "velocity_loss", "alignment_loss", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), (line["step"], key)
    assert ours[0]["loss"] != ours[-1]["loss"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fused_and_eager_kernels_train_alike(tmp_path, stage):
    common = ("training.steps=20", f"zero.stage={stage}", "training.checkpoint_every=0")
    for kernels in ("fused", "eager"):
        train(tmp_path / kernels, *common, f"kernels={kernels}")
    fused, eager = metrics(tmp_path / "fused"), metrics(tmp_path / "eager")
    assert len(fused) == len(eager) == 20
    for a, b in zip(fused, eager, strict=True):
        for key in ("loss", "velocity_loss", "alignment_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)
