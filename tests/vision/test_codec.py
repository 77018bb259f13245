"""Codecs: pixels and Stable Diffusion's autoencoder, with the numbers of REPA."""

from __future__ import annotations

import json
import sys

import diffusers
import pytest
import safetensors.torch
import torch
from torch import nn

from fastrepa.config import CodecConfig
from fastrepa.errors import ConfigError, WeightsError
from fastrepa.vision import codec as codec_module
from fastrepa.vision.codec import SdVaeCodec, build_codec, codec_shape

PIXEL = CodecConfig(name="pixel")
SD_VAE = CodecConfig(name="sd-vae")


def distance(a, exact):
    return ((a.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_as_good_as(ours, eager, exact):
    """error(ours, float64) <= 2 x error(eager, float64) + one rounding unit."""
    assert ours.shape == eager.shape == exact.shape
    assert ours.dtype == eager.dtype
    allowed = 2 * distance(eager, exact) + torch.finfo(ours.dtype).eps
    assert distance(ours, exact) <= allowed, (distance(ours, exact), allowed)


def random_images(count, side, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=g).to(torch.uint8)


def small_vae(dtype=torch.float32):
    """Four levels like the real one, a few channels wide; weights from a seed."""
    torch.manual_seed(5)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
    )
    return nn.Module.to(vae, dtype)


def small_codec(dtype=torch.float32):
    return SdVaeCodec(lambda: (small_vae(dtype), ""), channels=4, side=8)


@pytest.fixture
def small():
    return small_codec()


# Pixels.


def test_pixel_scales_to_minus_one_and_one():
    codec = build_codec(PIXEL, resolution=2)
    image = torch.tensor([0, 51, 204, 255], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    z = codec.latents(image, None, None)
    assert z.dtype == torch.float32
    assert torch.allclose(z[0, 1], torch.tensor([[-1.0, -0.6], [0.6, 1.0]]), atol=1e-7, rtol=0)
    assert (codec.name, codec.channels, codec.side, codec.stochastic) == ("pixel", 3, 2, False)
    assert codec.encode(image) is None


def test_pixel_round_trips_every_value():
    codec = build_codec(PIXEL, resolution=16)
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(codec.decode(codec.latents(image, None, None)), image)


def test_pixel_ignores_noise():
    codec = build_codec(PIXEL, resolution=8)
    image = random_images(2, 8)
    noise = torch.randn(2, 3, 8, 8)
    assert torch.equal(codec.latents(image, None, noise), codec.latents(image, None, None))


def test_pixel_side_averages_whole_blocks():
    codec = build_codec(CodecConfig(name="pixel", side=8), resolution=32)
    image = random_images(3, 32)

    def naive(dtype):
        out = torch.empty(3, 3, 8, 8, dtype=dtype)
        for row in range(8):
            for column in range(8):
                block = image[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                out[:, :, row, column] = (block.to(dtype) / 127.5 - 1).mean((2, 3))
        return out

    assert_as_good_as(codec.latents(image, None, None), naive(torch.float32), naive(torch.float64))
    assert codec.decode(codec.latents(image, None, None)).shape == (3, 3, 8, 8)


def test_decode_rounds_and_clamps():
    codec = build_codec(PIXEL, resolution=2)
    z = torch.tensor([-3.0, (100.4 / 127.5) - 1, (100.6 / 127.5) - 1, 2.0]).view(1, 1, 2, 2)
    out = codec.decode(z.expand(1, 3, 2, 2))
    assert out.dtype == torch.uint8
    assert out[0, 0].flatten().tolist() == [0, 100, 101, 255]


def test_pixel_wants_the_image_as_configured():
    codec = build_codec(CodecConfig(name="pixel", side=8), resolution=32)
    with pytest.raises(ValueError, match="not moments"):
        codec.latents(None, torch.zeros(1, 6, 8, 8), None)
    with pytest.raises(TypeError, match="uint8"):
        codec.latents(torch.zeros(1, 3, 32, 32), None, None)
    with pytest.raises(ValueError, match=r"32 px square, got \[1, 3, 64, 64\]"):
        codec.latents(random_images(1, 64), None, None)


# Shapes.


@pytest.mark.parametrize(
    ("config", "resolution", "shape"),
    [
        (PIXEL, 64, (3, 64)),
        (CodecConfig(name="pixel", side=32), 64, (3, 32)),
        (CodecConfig(name="pixel", side=32), 256, (3, 32)),
        (SD_VAE, 256, (4, 32)),
        (SD_VAE, 512, (4, 64)),
    ],
)
def test_shape_without_building(config, resolution, shape, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it would fail
    assert codec_shape(config, resolution) == shape


@pytest.mark.parametrize(
    ("config", "resolution", "message"),
    [
        (CodecConfig(name="pixel", side=24), 64, "data.codec.side: 24 does not divide .* 64"),
        (CodecConfig(name="pixel", side=128), 64, "data.codec.side: 128 does not divide"),
        (SD_VAE, 100, "data.resolution: sd-vae needs a multiple of 8, got 100"),
        (CodecConfig(name="sd-vae", side=32), 256, "only the pixel codec has a side"),
    ],
)
def test_shapes_that_do_not_work(config, resolution, message):
    for call in (codec_shape, lambda c, r: build_codec(c, resolution=r, random_weights=True)):
        with pytest.raises(ConfigError, match=message):
            call(config, resolution)


# The autoencoder.


def test_moments_are_mean_and_standard_deviation(small):
    """Against diffusers called by hand, in float64 as the truth."""
    image = random_images(2, 64)

    def by_hand(dtype):
        with torch.no_grad():
            posterior = small_vae(dtype).eval().encode(image.to(dtype) / 127.5 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], 1)

    moments = small.encode(image)
    assert moments.shape == (2, 8, 8, 8)
    assert_as_good_as(moments, by_hand(torch.float32), by_hand(torch.float64))
    assert (moments[:, 4:] > 0).all()
    assert (small.name, small.channels, small.side, small.stochastic) == ("sd-vae", 4, 8, True)


def test_a_batch_is_encoded_as_one_image_at_a_time(small):
    image = random_images(5, 64)
    single = torch.cat([small.encode(image[i : i + 1]) for i in range(5)])
    exact = small_codec(torch.float64)
    exact_moments = []
    with torch.no_grad():
        for i in range(5):
            x = image[i : i + 1].double() / 127.5 - 1
            posterior = exact.vae.encode(x).latent_dist
            exact_moments.append(torch.cat([posterior.mean, posterior.std], 1))
    assert_as_good_as(small.encode(image), single, torch.cat(exact_moments))


def test_latents_scale_mean_and_noise(small):
    moments = torch.cat([torch.full((1, 4, 8, 8), 2.0), torch.full((1, 4, 8, 8), 0.5)], 1)
    noise = torch.randn(1, 4, 8, 8)
    assert torch.equal(small.latents(None, moments, noise), (2.0 + 0.5 * noise) * 0.18215)
    assert small.scale == 0.18215
    halves = small.latents(None, moments.half(), noise)
    assert halves.dtype == torch.float32


def test_latents_from_the_image_or_from_its_moments(small):
    image, noise = random_images(2, 64), torch.randn(2, 4, 8, 8)
    from_moments = small.latents(None, small.encode(image), noise)
    assert torch.equal(small.latents(image, None, noise), from_moments)


def test_decode_undoes_the_scale(small):
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        pixels = small.vae.decode(z / 0.18215).sample
    expected = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(small.decode(z), expected)
    assert expected.float().std() > 1


def test_it_is_frozen(small):
    assert not small.vae.training
    assert not any(p.requires_grad for p in small.vae.parameters())
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    assert not small.decode(z).requires_grad
    assert not small.encode(random_images(1, 64)).is_inference()


def test_bf16_autoencoder_gives_fp32_moments():
    codec = small_codec(torch.bfloat16)
    moments = codec.encode(random_images(1, 64))
    assert moments.dtype == torch.float32
    assert codec.decode(torch.randn(1, 4, 8, 8)).dtype == torch.uint8


def test_wrong_inputs_are_named(small):
    with pytest.raises(ValueError, match=r"\[B,3,64,64\], got \[1, 3, 32, 32\]"):
        small.encode(random_images(1, 32))
    with pytest.raises(ValueError, match=r"\[B,8,8,8\], got \[1, 4, 8, 8\]"):
        small.latents(None, torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="noise must be given"):
        small.latents(random_images(1, 64), None, None)
    with pytest.raises(ValueError, match="moments or an image"):
        small.latents(None, None, torch.zeros(1, 4, 8, 8))


# Weights.


def save_folder(vae, folder, rename=None, config=None, drop=None):
    """A folder as diffusers writes it; `rename` maps tensor names, `config` overrides keys."""
    folder.mkdir()
    settings = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    settings |= {"_class_name": "AutoencoderKL", **(config or {})}
    (folder / "config.json").write_text(json.dumps(settings))
    state = {k: v.contiguous() for k, v in vae.state_dict().items() if k != drop}
    for old, new in (rename or {}).items():
        state = {k.replace(old, new): v for k, v in state.items()}
    safetensors.torch.save_file(
        state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"}
    )
    return CodecConfig(name="sd-vae", weights=str(folder))


def test_local_folder(tmp_path, small):
    config = save_folder(small_vae(), tmp_path / "vae")
    codec = build_codec(config, resolution=64)
    image = random_images(1, 64)
    assert torch.equal(codec.encode(image), small.encode(image))


def test_the_published_files_older_attention_names(tmp_path, small):
    """sd-vae-ft-mse was saved when diffusers said query, key, value and proj_attn."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    codec = build_codec(save_folder(small_vae(), tmp_path / "vae", rename=old), resolution=64)
    image = random_images(1, 64)
    assert torch.equal(codec.encode(image), small.encode(image))


def test_the_names_of_a_compiled_autoencoder(tmp_path, small):
    state = {f"module._orig_mod.{k}": v.contiguous() for k, v in small_vae().state_dict().items()}
    config = save_folder(small_vae(), tmp_path / "vae")
    safetensors.torch.save_file(state, tmp_path / "vae/diffusion_pytorch_model.safetensors")
    image = random_images(1, 64)
    codec = build_codec(config, resolution=64)
    assert torch.equal(codec.encode(image), small.encode(image))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": "quant_conv.bias"}, "1 tensors are missing, the first 'quant_conv.bias'"),
        ({"config": {"scaling_factor": 0.13025}}, "not Stable Diffusion's .* scale 0.13025"),
        ({"config": {"block_out_channels": [8, 16, 16, 32]}}, "could not be loaded"),
    ],
)
def test_another_autoencoder_is_refused(changes, message, tmp_path):
    config = save_folder(small_vae(), tmp_path / "vae", **changes)
    with pytest.raises(WeightsError, match=message) as error:
        build_codec(config, resolution=64)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_pickled_weights(tmp_path):
    """A folder with only a .bin is refused, and its pickle is not opened."""
    config = save_folder(small_vae(), tmp_path / "vae")
    torch.save(small_vae().state_dict(), tmp_path / "vae" / "diffusion_pytorch_model.bin")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"has no diffusion_pytorch_model\.safetensors"):
        build_codec(config, resolution=64)


@pytest.mark.parametrize("weights", ["absent", "./absent/vae", "stabilityai/sd-vae-ft-mse"])
def test_missing_weights_say_what_to_do(weights, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        build_codec(CodecConfig(name="sd-vae", weights=weights), resolution=64)
    message = str(error.value)
    assert weights in message
    assert "diffusion_pytorch_model.safetensors" in message
    assert "\n" not in message


def test_without_diffusers_the_extra_is_named(monkeypatch):
    """It is at once where weights are to be loaded; random ones are missed when they are used."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    codec = build_codec(SD_VAE, resolution=64, random_weights=True)
    for use in (
        lambda: build_codec(SD_VAE, resolution=64),
        lambda: codec.encode(random_images(1, 64)),
        lambda: codec.decode(torch.zeros(1, 4, 8, 8)),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'fastrepa\[vae\]'") as error:
            use()
        assert "\n" not in str(error.value)


def test_latents_of_moments_need_no_autoencoder(monkeypatch, small):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    codec = build_codec(SD_VAE, resolution=64, random_weights=True)
    moments, noise = torch.rand(2, 8, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.equal(codec.latents(None, moments, noise), small.latents(None, moments, noise))
    assert (codec.name, codec.channels, codec.side, codec.stochastic) == ("sd-vae", 4, 8, True)
    assert codec.scale == small.scale


def test_random_weights_are_the_real_architecture():
    """sd-vae-ft-mse has 83,653,863 parameters; seeded, and the global generator is left alone."""
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    codec = build_codec(SD_VAE, resolution=32, random_weights=True)
    assert not codec.vae.training
    assert torch.equal(torch.rand(4), expected)
    assert sum(p.numel() for p in codec.vae.parameters()) == codec_module.SD_VAE_PARAMETERS
    first = next(codec.vae.parameters())
    torch.manual_seed(codec_module.RANDOM_SEED)
    assert torch.equal(first, nn.Conv2d(3, 128, 3).weight)
    assert codec.encode(random_images(1, 32)).shape == (1, 8, 4, 4)
    assert codec.decode(torch.randn(1, 4, 4, 4)).shape == (1, 3, 32, 32)
