"""Several averages: their power functions, skipped steps, and what a checkpoint says of them."""

from pathlib import Path

import pytest
import torch

from fastrepa.checkpoint.averages import choose_ema, recorded, resumed_emas, stored_emas
from fastrepa.checkpoint.kinds import ema_keys
from fastrepa.config import EmaConfig, OptimizerConfig
from fastrepa.errors import CheckpointError
from fastrepa.training.optimizer import AdamWEMA, power_gamma
from tests.runs import said_by, tensors

pytestmark = pytest.mark.ranks

FIXED, OTHER, POWER = EmaConfig(decay=0.9), EmaConfig(decay=0.5), EmaConfig(sigma_rel=0.1)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.28, 0.2)])
def test_gamma_is_that_of_the_paper(sigma_rel, gamma):
    """The first two are in Karras et al. 2024; all have the deviation that was asked for."""
    found = power_gamma(sigma_rel)
    assert found == pytest.approx(gamma, abs=0.05)
    variance = (found + 1) / ((found + 2) ** 2 * (found + 3))
    assert variance**0.5 == pytest.approx(sigma_rel, rel=1e-9)


def test_every_stage_and_every_resume_against_float64(tmp_path):
    """Two ranks, ZeRO 0-3, fused and eager; averages added, dropped and reordered on resume."""
    assert said_by("tests.programs.ema_stages", tmp_path).count("EVERY LEG AGREES") == 2
    stored = {name.split("/")[0] for name in tensors(tmp_path, 6)}
    assert {"ema", "ema_sigma_rel_0.1", "ema_decay_0.5"} <= stored
    assert "ema_decay_0.5" not in {name.split("/")[0] for name in tensors(tmp_path, 9)}


@pytest.mark.parametrize("kernels", ["fused", "eager"])
def test_a_flag_on_the_device_moves_none_of_them(kernels, monkeypatch):
    """The flag is read by the operations, from the first step on, as in a GPU's step."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(50))
    optimizer = AdamWEMA([param], OptimizerConfig(), emas=(FIXED, POWER), kernels=kernels)
    optimizer.set_rate(0.1)
    optimizer.prepare(param)
    state = optimizer.state[param]
    expected = [param.detach().double()] * 2
    monkeypatch.setattr(optimizer, "_on_host", lambda param: False)
    for t, skip in enumerate((True, False, True, False)):
        optimizer.bad_loss = torch.tensor(skip)
        optimizer.update([param], [torch.randn(50)])
        if not skip:
            updates = (t + 1) // 2
            decays = (0.9, (1 - 1 / updates) ** (power_gamma(0.1) + 1))
            weight = param.detach().double()
            expected = [d * e + (1 - d) * weight for d, e in zip(decays, expected, strict=True)]
        for key, e in zip(optimizer.ema_keys, expected, strict=True):
            assert torch.allclose(state[key].double(), e, rtol=0, atol=1e-6), (t, key)
    assert state["step"] == 2


@pytest.mark.parametrize("kernels", ["fused", "eager"])
def test_a_step_leaves_gradients_where_they_were(kernels):
    """DeepSpeed keeps the gradients of offloaded states in buffers, and writes into them again."""
    param = torch.nn.Parameter(torch.randn(50))
    optimizer = AdamWEMA([param], OptimizerConfig(), emas=(FIXED,), kernels=kernels)
    param.grad = buffer = torch.randn(50)
    optimizer.step()
    assert param.grad is buffer
    param.grad = None
    optimizer.update([param], [torch.randn(50)])
    assert param.grad is None
    assert optimizer.state[param]["step"] == 2


def test_names_of_the_states():
    assert ema_keys((POWER, FIXED, EmaConfig(sigma_rel=0.05))) == (
        "ema", "ema_decay_0.9", "ema_sigma_rel_0.05",
    )  # fmt: skip


def test_an_average_is_chosen_by_its_value_or_its_state():
    stored = stored_emas(recorded((FIXED, POWER)), OTHER)
    assert stored == {"ema": FIXED, "ema_sigma_rel_0.1": POWER}
    for name, key in (
        (None, "ema"), ("0.9", "ema"), ("0.90", "ema"), ("ema", "ema"),
        ("sigma_rel=0.1", "ema_sigma_rel_0.1"), ("ema_sigma_rel_0.1", "ema_sigma_rel_0.1"),
    ):  # fmt: skip
        assert choose_ema(stored, name, source=Path("step_7")) == key
    with pytest.raises(CheckpointError, match=r"'0\.1' is not .*step_7, .* 0\.9, sigma_rel=0\.1"):
        choose_ema(stored, "0.1", source=Path("step_7"))


@pytest.mark.parametrize(
    ("wanted", "record", "sources", "words"),
    [
        ((FIXED,), {}, {"ema": "ema"}, []),  # a checkpoint of before there were several
        ((FIXED, POWER), {}, {"ema": "ema", "ema_sigma_rel_0.1": "weight"}, ["sigma_rel=0.1 is"]),
        ((OTHER,), recorded((FIXED,)), {"ema": "ema"}, ["0.5 goes on from the average of 0.9"]),
        ((POWER,), recorded((FIXED,)), {"ema": "weight"}, ["sigma_rel=0.1 is new", "0.9 is kept"]),
        ((OTHER, FIXED), recorded((FIXED,)), {"ema": "weight", "ema_decay_0.9": "ema"},
         ["0.5 is new: it starts from the weights of step 7"]),
    ],
)  # fmt: skip
def test_what_a_resumed_average_starts_from(wanted, record, sources, words):
    found, said = resumed_emas(wanted, stored_emas(record, wanted[0]), 7)
    assert found == sources
    assert len(said) == len(words)
    assert all(line.startswith(f"EMA {start}") for line, start in zip(said, words, strict=True))
