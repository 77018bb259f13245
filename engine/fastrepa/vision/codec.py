"""Codecs between images and what the generator sees: pixels in [-1, 1], or SD's latents.

    pixel    z = area_average(image / 127.5 - 1)                      [B,3,R,R] -> [B,3,side,side]
    sd-vae   mean, std = vae(image / 127.5 - 1)                       [B,3,R,R] -> [B,8,R/8,R/8]
             z = (mean + std * noise) * 0.18215                       -> [B,4,R/8,R/8]

Moments are cat[mean, std] (std, not the log variance), as the reference layout stores them.
Latents and moments are fp32 whatever the autoencoder computes in. B batch, R image side, C latent
channels, h and w latent sides. The numbers are REPA's (Yu et al. 2024, arXiv 2410.06940), which
takes them from Stable Diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastrepa.config import CodecConfig, DataConfig
from fastrepa.errors import ConfigError, WeightsError
from fastrepa.reading.tensors import (
    COMPILED,
    WRAPPERS,
    SafeTensors,
    reason,
    without_wrappers,
)
from fastrepa.vision.weights import digest

SD_VAE_SCALE = 0.18215
SD_VAE_DOWN = 8
SD_VAE_CHANNELS = 4
SD_VAE_PARAMETERS = 83_653_863
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers looks for
RANDOM_SEED = 0


class Codec(Protocol):
    """A codec as the trainer and the sampler need it.

    channels and side: the latent is [B, channels, side, side]; stochastic: whether `latents` uses
    its noise; scale: latents are this times the autoencoder's own.
    """

    name: str
    channels: int
    side: int
    stochastic: bool
    scale: float

    def encode(self, image_u8: Tensor) -> Tensor | None:
        """Return moments [B,2C,h,w] fp32 of image_u8 [B,3,R,R]; None where a codec has none."""

    def latents(
        self, image_u8: Tensor | None, moments: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        """Return z [B,C,h,w] fp32 of moments [B,2C,h,w] where given, else of image_u8 [B,3,R,R].

        noise [B,C,h,w]: where stochastic. Raises ValueError for what is missing or misfits.
        """

    def decode(self, z: Tensor) -> Tensor:
        """Return image_u8 [B,3,R',R'] uint8 of z [B,C,h,w], rounded and clamped."""


def codec_shape(config: CodecConfig, resolution: int) -> tuple[int, int]:
    """Return (channels, side) of the latents for images of `resolution` px; nothing is built.

    ConfigError when the resolution is not a multiple of what the codec needs.
    """
    if not config.is_autoencoder:
        side = config.side or resolution
        if resolution % side:
            raise ConfigError(
                f"data.codec.side: {side} does not divide the resolution {resolution}; the image "
                f"is averaged over whole blocks of pixels"
            )
        return 3, side
    if config.side is not None:
        raise ConfigError("data.codec.side: only the pixel codec has a side")
    if resolution % SD_VAE_DOWN:
        raise ConfigError(
            f"data.resolution: sd-vae needs a multiple of {SD_VAE_DOWN}, got {resolution}"
        )
    return SD_VAE_CHANNELS, resolution // SD_VAE_DOWN


def token_grid(data: DataConfig, patch: int) -> int:
    """Tokens along a side of the latents, cut into patches of `patch` by `patch`.

    ConfigError where the resolution does not suit the codec, or the patch does not the latents.
    """
    _, side = codec_shape(data.codec, data.resolution)
    if side % patch:
        raise ConfigError(
            f"model.patch: {patch} does not divide the latent side {side} "
            f"(data.resolution {data.resolution}, codec {data.codec.name})"
        )
    return side // patch


def build_codec(
    config: CodecConfig,
    *,
    resolution: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    random_weights: bool = False,
) -> Codec:
    """The codec of `config` for images of `resolution` px.

    `dtype` is what an autoencoder computes in. `random_weights` is the real architecture with
    seeded random weights (dry runs, tests), built when it is first asked to encode or decode, so
    that a step on stored moments needs no autoencoder at all. ConfigError: shapes that do not work,
    or an extra that is not installed. WeightsError: weights that are missing.
    """
    channels, side = codec_shape(config, resolution)
    if not config.is_autoencoder:
        return PixelCodec(resolution, side)

    def build() -> tuple[nn.Module, str]:
        vae = random_sd_vae() if random_weights else _pretrained_sd_vae(config.weights)
        identity = encoder_digest(vae)  # of the fp32 weights, before they are cast
        # nn.Module's own `to`: diffusers' warns about every cast.
        return nn.Module.to(vae, device, dtype), identity

    if random_weights:
        return SdVaeCodec(build, channels, side)
    built = build()  # now: a run that will sample fails here, not after its last step
    return SdVaeCodec(lambda: built, channels, side)


def encoder_digest(vae: Any) -> str:
    """SHA-256 of the half that makes moments; ft-mse and ft-ema differ in their decoders alone."""
    return digest(nn.ModuleDict({"encoder": vae.encoder, "quant_conv": vae.quant_conv}))


def image_to_unit(image_u8: Tensor) -> Tensor:
    """Scale uint8 [B,3,R,R] in 0..255 to fp32 in [-1, 1]."""
    if image_u8.dtype != torch.uint8:
        raise TypeError(f"image_u8 must be uint8, not {image_u8.dtype}")
    return image_u8.to(torch.float32) / 127.5 - 1


def unit_to_image(x: Tensor) -> Tensor:
    """Scale float [B,3,R,R] in [-1, 1] to uint8, rounded to nearest (half to even) and clamped."""
    return ((x.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class PixelCodec:
    """The generator works on the image itself, averaged down over whole blocks of pixels."""

    name = "pixel"
    channels = 3
    stochastic = False
    scale = 1.0

    def __init__(self, resolution: int, side: int) -> None:
        self.side, self._block = side, resolution // side

    def encode(self, image_u8: Tensor) -> None:
        return None

    def latents(
        self, image_u8: Tensor | None, moments: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        if image_u8 is None:
            raise ValueError("the pixel codec needs the image, not moments")
        z = image_to_unit(image_u8)
        z = z if self._block == 1 else F.avg_pool2d(z, self._block)
        if z.shape[-2:] != (self.side, self.side):
            raise ValueError(
                f"image_u8 must be {self.side * self._block} px square, got {list(image_u8.shape)}"
            )
        return z.contiguous()  # the image was channels last

    def decode(self, z: Tensor) -> Tensor:
        return unit_to_image(z)


class SdVaeCodec:
    """Stable Diffusion's autoencoder (diffusers' AutoencoderKL), frozen: 8x down, 4 channels.

    build: gives (autoencoder, digest), when either is first needed; latents of moments need none.
    digest: SHA-256 of its encoding half in fp32, the identity of the moments it makes.
    """

    name = "sd-vae"
    stochastic = True
    scale = SD_VAE_SCALE

    def __init__(
        self, build: Callable[[], tuple[nn.Module, str]], channels: int, side: int
    ) -> None:
        self._build, self.channels, self.side = build, channels, side

    @cached_property
    def _built(self) -> tuple[Any, str]:
        vae, identity = self._build()
        return vae.requires_grad_(False).eval(), identity

    @property
    def vae(self) -> Any:
        return self._built[0]

    @property
    def digest(self) -> str:
        return self._built[1]

    @torch.no_grad()
    def encode(self, image_u8: Tensor) -> Tensor:
        edge = self.side * SD_VAE_DOWN
        if image_u8.shape[1:] != (3, edge, edge):
            raise ValueError(f"image_u8 must be [B,3,{edge},{edge}], got {list(image_u8.shape)}")
        posterior = self.vae.encode(image_to_unit(image_u8).to(self.vae.dtype)).latent_dist
        # The exponential in fp32: in bf16 it would cost the standard deviation its last digits.
        std = torch.exp(0.5 * posterior.logvar.to(torch.float32))
        return torch.cat([posterior.mean.to(torch.float32), std], dim=1)

    def latents(
        self, image_u8: Tensor | None, moments: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        if moments is None:
            if image_u8 is None:
                raise ValueError("sd-vae needs moments or an image")
            moments = self.encode(image_u8)
        if moments.shape[1:] != (2 * self.channels, self.side, self.side):
            raise ValueError(
                f"moments must be [B,{2 * self.channels},{self.side},{self.side}], got "
                f"{list(moments.shape)}"
            )
        if noise is None:
            raise ValueError("sd-vae draws its latents: noise must be given")
        mean, std = moments.to(torch.float32).chunk(2, dim=1)
        return (mean + std * noise) * self.scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return unit_to_image(self.vae.decode((z / self.scale).to(self.vae.dtype)).sample)


def _autoencoder_class() -> Any:
    # diffusers takes seconds to import and is an extra: only this codec pays for it.
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError(
            "data.codec: sd-vae needs diffusers; install it with: pip install 'fastrepa[vae]'"
        ) from error
    return AutoencoderKL


def random_sd_vae() -> nn.Module:
    """The architecture of stabilityai/sd-vae-ft-mse (83.7 M parameters), seeded weights."""
    autoencoder = _autoencoder_class()
    widths = (128, 256, 512, 512)
    # The CPU's generator alone: torch.manual_seed would also reset the GPUs'.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        return autoencoder(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=SD_VAE_CHANNELS,
            sample_size=256,
        )


def _pretrained_sd_vae(weights: str) -> nn.Module:
    """The autoencoder of a local folder or a hub id ("owner/name"); safetensors only."""
    from fastrepa.runtime.hub import asking_the_hub

    autoencoder = _autoencoder_class()
    where = f"data.codec.weights ({weights})"
    by_hand = (
        "give a folder that holds config.json and diffusion_pytorch_model.safetensors, as "
        "downloaded from https://huggingface.co/stabilityai/sd-vae-ft-mse"
    )
    folder = Path(weights).expanduser()
    if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights):
        raise WeightsError(f"{where}: no such folder, and not a hub id; {by_hand}")
    for file in ("config.json", VAE_WEIGHTS):
        if folder.is_dir() and not (folder / file).is_file():
            raise WeightsError(f"{where}: this folder has no {file}; {by_hand}")
    problem = ""
    try:
        with ExitStack() as held:
            # Building draws initial values: the run's own randomness must not notice.
            held.enter_context(torch.random.fork_rng(devices=[]))
            if folder.is_dir():
                source = str(held.enter_context(_without_wrappers(folder)))
            else:
                source, problem = weights, held.enter_context(asking_the_hub())
            vae, loading = autoencoder.from_pretrained(
                source,
                use_safetensors=True,  # or diffusers takes a pickle where there is no other file
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # diffusers passes on whatever a damaged file makes of its readers
        why = problem or reason(error)
        raise WeightsError(f"{where}: could not be loaded ({why}); {by_hand}") from error
    if missing := sorted(loading["missing_keys"]):
        raise WeightsError(f"{where}: {len(missing)} tensors are missing, the first {missing[0]!r}")
    shape = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if shape != (SD_VAE_CHANNELS, SD_VAE_DOWN) or vae.config.scaling_factor != SD_VAE_SCALE:
        raise WeightsError(
            f"{where}: not Stable Diffusion's autoencoder: {shape[0]} channels, {shape[1]}x down, "
            f"scale {vae.config.scaling_factor}; {SD_VAE_CHANNELS}, {SD_VAE_DOWN}x and "
            f"{SD_VAE_SCALE} are expected"
        )
    return vae


@contextmanager
def _without_wrappers(folder: Path) -> Iterator[Path]:
    """Give the folder itself, or one whose tensors have their inner names, which diffusers wants,
    without the prefixes of data parallel and torch.compile.
    """
    stored = SafeTensors(folder / VAE_WEIGHTS, WeightsError)
    if not any(name.startswith(WRAPPERS) or f".{COMPILED}" in name for name in stored):
        yield folder
        return
    with TemporaryDirectory() as inner:
        copyfile(folder / "config.json", Path(inner) / "config.json")
        named = without_wrappers(stored, folder / VAE_WEIGHTS, WeightsError)
        save_file(named, Path(inner) / VAE_WEIGHTS)
        yield Path(inner)
