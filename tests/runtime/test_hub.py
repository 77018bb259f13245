"""Where the hub does not answer, that is said at once."""

import logging
import socket
import time

import pytest
import timm
from huggingface_hub import constants

from fastrepa.config import CodecConfig
from fastrepa.errors import WeightsError
from fastrepa.runtime.hub import asking_the_hub, unreachable
from fastrepa.vision.codec import build_codec
from fastrepa.vision.registry import find_recipe
from fastrepa.vision.weights import from_hub


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """An endpoint at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return endpoint


def test_one_line_and_no_attempts(nobody, caplog):
    caplog.set_level(logging.WARNING)
    began = time.monotonic()
    words = rf"\({nobody} does not answer: Connection refused\); download https://hugging"
    with pytest.raises(WeightsError, match=f"^here: the hub's weights could not be had {words}"):
        from_hub(find_recipe("dinov2-vit-s"), {}, "here")
    words = rf"could not be loaded \({nobody} does not answer: Connection refused\); give a folder"
    with pytest.raises(WeightsError, match=words):
        build_codec(CodecConfig(), resolution=64)
    assert time.monotonic() - began < 10  # six attempts of one alone wait for 23 s
    assert "Retrying" not in caplog.text
    assert not constants.HF_HUB_OFFLINE


def test_what_is_in_the_cache_needs_nobody(nobody, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: constants.HF_HUB_OFFLINE)
    assert from_hub(find_recipe("dinov2-vit-s"), {}, "here") is True


def test_whoever_answers_is_asked(nobody, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with asking_the_hub() as problem:
            assert (problem, constants.HF_HUB_OFFLINE) == ("", False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert unreachable(nobody) == ""  # the proxy knows
