"""`deterministic: true`: what is set, what is refused, and that a refusal is named."""

import os

import pytest
import torch

from fastrepa.config import load_config
from fastrepa.errors import ConfigError, TrainingError
from fastrepa.runtime import determinism
from fastrepa.runtime.determinism import CUBLAS, INDUCTOR, make_deterministic, refusals_by_name
from tests.runs import ROOT, SMALL


def config(*overrides):
    return load_config(ROOT / "configs/quickstart.yaml", ["run=x", *SMALL, *overrides])


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    for name in (CUBLAS, INDUCTOR):
        monkeypatch.delenv(name, raising=False)
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    yield
    for name in (CUBLAS, INDUCTOR):
        os.environ.pop(name, None)
    cudnn.deterministic, cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)


def test_every_library_is_told():
    torch.backends.cudnn.benchmark = True
    make_deterministic(config().deterministic)
    assert CUBLAS not in os.environ
    assert not torch.are_deterministic_algorithms_enabled()
    make_deterministic(config("deterministic=true").deterministic)
    assert os.environ[CUBLAS] == ":4096:8"
    assert os.environ[INDUCTOR] == "1"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    make_deterministic(config("deterministic=true").deterministic)  # once more is no error


@pytest.mark.parametrize("value", [":4096:8", ":16:8"])
def test_what_the_user_exported_is_kept(monkeypatch, value):
    monkeypatch.setenv(CUBLAS, value)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    make_deterministic(config("deterministic=true").deterministic)
    assert os.environ[CUBLAS] == value


def test_a_workspace_that_promises_nothing_or_comes_late_is_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(ConfigError, match=f"CUDA has started without {CUBLAS}"):
            make_deterministic(config("deterministic=true").deterministic)
    monkeypatch.setenv(CUBLAS, ":0:0")
    with pytest.raises(ConfigError, match=f"{CUBLAS} is ':0:0'; export :4096:8 or :16:8"):
        make_deterministic(config("deterministic=true").deterministic)
    assert not torch.are_deterministic_algorithms_enabled()


def test_decoding_goes_to_the_cpu():
    assert config("deterministic=true").data.decode == "cpu"
    assert config("deterministic=false").data.decode == "auto"
    with pytest.raises(ConfigError, match=r"data\.decode: 'mixed' .*deterministic: true needs"):
        config("deterministic=true", "data.decode=mixed")


def test_an_operation_without_a_deterministic_implementation_is_named():
    make_deterministic(config("deterministic=true").deterministic)
    target = torch.zeros(3)
    words = "deterministic: put_ has no deterministic implementation"
    with pytest.raises(TrainingError, match=words), refusals_by_name():
        target.put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match="another"), refusals_by_name():
        raise RuntimeError("another")
    assert "NCCL" in determinism.NOT_ON_A_GPU


def test_our_kernels_add_in_a_fixed_order():
    sources = sorted((ROOT / "kernels/fastrepa_kernels").glob("*.py"))
    assert len(sources) > 5
    assert [p.name for p in sources if "tl.atomic" in p.read_text()] == []
