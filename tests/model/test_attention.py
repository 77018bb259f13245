"""The configuration's wish for attention: errors name its keys, the record says what ran."""

import json

import pytest
import torch

from fastrepa.config import load_config
from fastrepa.errors import ConfigError
from fastrepa.model.attention import attention_record, choose_attention, slow_attention
from fastrepa.model.sit import SiT
from fastrepa_kernels.attention import BACKENDS, Choice
from tests.runs import ROOT, SMALL

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def config(*overrides):
    return load_config(ROOT / "configs/quickstart.yaml", ["run=x", *SMALL, *overrides])


def chosen(config, device, dtype):
    return choose_attention(
        config.attention, config.model, device, dtype, deterministic=config.deterministic
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_can_be_configured(backend):
    assert config(f"attention.backend={backend}").attention.backend == backend


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["attention.backend=sdpa-cudnn"],
            "^attention.backend: 'sdpa-cudnn' cannot run here: needs",
        ),
        (["attention.backend=math", "attention.require=flash"], "^attention.require: 'flash' does"),
        (["attention.backend=fast"], "attention.backend: 'fast' is not allowed"),
        (["attention.require=fast"], "attention.require: 'fast' is not allowed"),
        (["attention.backend=sdpa-cudnn", "deterministic=true"], "has no deterministic backward"),
    ],
)
def test_errors_name_the_key(overrides, words):
    with pytest.raises(ConfigError, match=words):
        chosen(config(*overrides), CPU, torch.float32)


def test_what_runs_is_recorded_and_a_slow_gpu_is_told():
    choice = chosen(config("attention.require=flash"), CPU, torch.bfloat16)
    assert choice.backend == "sdpa-flash"
    assert chosen(config(), CPU, torch.bfloat16).backend == "math-chunked"
    fallen = Choice("math", (("sdpa-flash", "does not take float32"), ("xformers", "absent")))
    record = json.loads(json.dumps(attention_record(config().attention, fallen)))["attention"]
    assert record == {
        "backend": "math", "configured": "auto", "require": "any",
        "passed_over": {"sdpa-flash": "does not take float32", "xformers": "absent"},
    }  # fmt: skip
    said = slow_attention(fallen, CUDA)
    assert said == "attention runs on math, which is slow (sdpa-flash: does not take float32)"
    assert slow_attention(fallen, CPU) == slow_attention(choice, CUDA) == ""
    assert slow_attention(Choice("sdpa"), CUDA) == ""


def test_a_model_computes_with_the_backend_it_is_given(monkeypatch):
    import fastrepa.model.sit as module

    seen, real = set(), module.attention

    def seeing(qkv, **settings):
        seen.add(settings["backend"])
        return real(qkv, **settings)

    monkeypatch.setattr(module, "attention", seeing)
    for given in ({}, {"attention": "math"}):
        wish = config("attention.backend=flash-attn-2")  # of training, not of a model elsewhere
        model = SiT.from_config(wish, side=32, channels=3, encoder_widths=[], **given)
        model(torch.randn(1, 3, 32, 32), torch.rand(1), torch.tensor([0]))
    assert seen == {"auto", "math"}
