"""One run, whatever computes it: ranks, ZeRO stages, kernels and accumulation agree to rounding."""

import json
from functools import cache
from itertools import product

import pytest

from fastrepa.runtime.regions import NAMES
from tests.runs import metrics, said_by, train

pytestmark = pytest.mark.ranks

STEPS = 10
BATCH = 8
STAGES, KERNELS, FORWARDS = (0, 1, 2, 3), ("fused", "eager"), (1, 2)
# A shallow model and timm's smallest encoder: engines of many kinds are what is tested.
SMALLER = 'model.depth=2 vision.encoders=[{"name":"test_vit","weights":"random","input":128}]'
PLAIN = (0, "eager", 1)  # of one process: unsharded, torch's own operations, one forward a step


def combinations(ranks):
    """All of them with two ranks; with four, half of them, in which every pair of values meets."""
    chosen = product(STAGES if ranks > 1 else STAGES[:1], KERNELS, FORWARDS)
    if ranks < 4:
        return list(chosen)
    return [(s, k, f) for s, k, f in chosen if (s + KERNELS.index(k) + f) % 2]


def settings(ranks, stage, kernels, forwards, *more):
    micro = BATCH // ranks // forwards
    each = f"zero.stage={stage} kernels={kernels} training.micro_batch={micro}"
    return " ".join((SMALLER, each, *more))


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Return {(stage, kernels, forwards) or a name: the steps of that run} of ranks.

    A launch for each number of ranks, of so many processes: 4, 18 and 8 runs of 10 steps on 1, 2
    and 4.
    """

    @cache
    def launch(ranks):
        folder = tmp_path_factory.mktemp(f"ranks_{ranks}")
        runs = {chosen: settings(ranks, *chosen) for chosen in combinations(ranks)}
        if ranks == 2:
            same = settings(2, 2, "fused", 2, "deterministic=true", "training.precision=bf16")
            runs |= {"first": same, "second": same}
        said_by("tests.programs.combinations", folder, STEPS, *runs.values(), ranks=ranks)
        return {c: json.loads((folder / f"{n}.json").read_text()) for n, c in enumerate(runs)}

    return launch


@pytest.mark.parametrize(
    ("ranks", "stage", "kernels", "forwards"),
    [(ranks, *c) for ranks in (1, 2, 4) for c in combinations(ranks)],
)
def test_losses_and_samples_are_those_of_one_process(curves, ranks, stage, kernels, forwards):
    ours, plain = curves(ranks)[stage, kernels, forwards], curves(1)[PLAIN]
    assert len(ours) == len(plain) == STEPS
    for step, (line, expected) in enumerate(zip(ours, plain, strict=True)):
        # The images, and the noise, time and dropped label of each, to the last bit.
        assert len(line["samples"]) == BATCH
        assert line["samples"] == expected["samples"], step
        for key in ("loss", "velocity_loss", "alignment_loss", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), (step, key)
    assert plain[0]["loss"] != plain[-1]["loss"]
    assert len({digest for line in plain for digest in line["samples"]}) == STEPS * BATCH


def test_deterministic_runs_are_alike_to_the_last_bit(curves):
    assert curves(2)["first"] == curves(2)["second"]


def test_shares_of_a_step_add_up_on_several_ranks(tmp_path):
    settings = ("training.steps=3", "zero.stage=2", "training.micro_batch=2")
    train(tmp_path / "run", *settings, "training.checkpoint_every=0", ranks=2)
    lines = metrics(tmp_path / "run")
    assert len(lines) == 3
    for line in lines:
        assert sum(line[name] for name in NAMES) == pytest.approx(1, abs=1e-5)
        assert line["communication"] > 0
