"""SiT, a generator of images by class, and its samplers: one file of plain torch.

    from sit import SiT, to_images

    model = SiT.from_pretrained("FOLDER/transformer")
    latents = model.sample(torch.tensor([0, 1, 2]), seed=0)  # one label an image
    images = to_images(latents)  # of a model of pixels; else decode latents / model.scale first

Image i of a seed starts from noise of its own: it is the same in any batch and on any device, to
the rounding of the network. `model.config` has the classes' names and the settings that the model
was sampled with in training. SiT: Ma et al. 2024; trained with REPA: Yu et al. 2025. Shapes: B
batch, C channels, S latent side, p patch, T tokens, D width, H heads, d = D / H.

Written by fastrepa, under the MIT licence; that of the weights stands in the model's card.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FREQUENCIES = 256  # width of the sinusoidal time embedding
SHORTEST_TIME = 0.05  # a data prediction's velocity divides by sigma(t) of at least this time
SDE_LAST_TIME = 0.04  # below it the sde takes one step without noise
STARTS, STEPS = 4, 5  # the streams of noise: what an image starts from, what the sde adds


# Noise -------------------------------------------------------------------------------------------


def keyed_normal(seed: int, stream: int, step: int, ids: Tensor, count: int) -> Tensor:
    """Standard normals [B, count] float64 for images `ids` [B] int64, by their keys alone.

    Philox4x32-10 (Salmon et al. 2011) of (seed; block of four, image, step, stream), then
    Box-Muller.
    """
    low = 0xFFFFFFFF
    image = ids[:, None]
    block = torch.arange(-(-count // 4), device=ids.device)[None]
    zero = torch.zeros_like(image + block)
    c0, c1 = zero + block, zero + (image & low)
    c2, c3 = zero + step, zero + ((image >> 32) | (stream << 24))
    k0, k1 = seed & low, seed >> 32
    m0, m1 = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32  # of which a product stays below 2^63
    for _ in range(10):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (
            ((p1 >> 32) + c2) ^ c1 ^ k0,
            p1 & low,
            ((p0 >> 32) + c0) ^ c3 ^ k1,
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    lanes = [*_box_muller(c0, c1), *_box_muller(c2, c3)]
    return torch.stack(lanes, -1).flatten(1)[:, :count]


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two 32-bit words: 30 bits of the angle, one mirror, one sign."""
    r = (-2 * ((radius.double() + 0.5) * 2.0**-32).log()).sqrt()
    a = ((angle & 0x3FFFFFFF).double() - (2.0**29 - 0.5)) * (math.pi * 2.0**-31)
    r = torch.where(angle >> 31 == 1, -r, r)
    mirrored = (angle >> 30) & 1 == 1
    return r * torch.where(mirrored, a.sin(), a.cos()), r * torch.where(mirrored, a.cos(), a.sin())


# Sampling ----------------------------------------------------------------------------------------


def path_coefficients(path: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return alpha, sigma and their derivatives at t [...] of x_t = alpha data + sigma noise."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    alpha, sigma = torch.cos(t * (math.pi / 2)), torch.sin(t * (math.pi / 2))
    return alpha, sigma, -(math.pi / 2) * sigma, (math.pi / 2) * alpha


@torch.no_grad()
def integrate(
    velocity: Callable[[Tensor, float, bool], Tensor],
    x: Tensor,
    *,
    sampler: str,
    steps: int,
    path: str,
    guided: Callable[[float], bool],
    step_noise: Callable[[int], Tensor],
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Carry noise x [B,C,S,S] float64 from t = 1 to data at t = 0 along velocity(x, t, guided).

    ode: Euler steps. heun: the mean of both ends' velocities, but for the last step. sde: Euler and
    Maruyama with diffusion w = 2t, from t = 0.04 one step without noise.
    """
    if sampler == "sde":
        times = [*torch.linspace(1, SDE_LAST_TIME, steps, dtype=torch.float64).tolist(), 0.0]
    else:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for i, (t, t_next) in enumerate(pairwise(times)):
        dt, last, guide = t_next - t, i == steps - 1, guided(t)
        v = velocity(x, t, guide)
        if sampler == "sde":
            at = torch.tensor(t, dtype=torch.float64)
            alpha, sigma, d_alpha, d_sigma = (c.item() for c in path_coefficients(path, at))
            ratio = alpha / d_alpha
            score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
            x = x + (v - t * score) * dt
            if not last:
                x = x + (2 * t * -dt) ** 0.5 * step_noise(i)
        elif sampler == "heun" and not last:
            x = x + dt * (0.5 * v + 0.5 * velocity(x + dt * v, t_next, guide))
        else:
            x = x + dt * v
        if progress is not None:
            progress(i + 1)
    return x


def to_images(x: Tensor) -> Tensor:
    """Pixels [B,3,H,W] in [-1, 1] as uint8, rounded and clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# The network -------------------------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """t [B] in [0, 1] to [B,D]: 256 features, cosines first, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        exponent = torch.arange(half, dtype=t.dtype, device=t.device) / half
        angle = t[:, None] * torch.exp(-math.log(10000.0) * exponent)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class Attention(nn.Module):
    """Multi-head self-attention of [B,T,D]; `qk_norm`: queries and keys go through a LayerNorm."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B,H,T,d]
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear, with ratio 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The stream [B,T,D] normalised, scaled and shifted by [B,D] each, in `dtype`."""
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return (normal * (1 + scale[:, None]) + shift[:, None]).to(dtype)


class Block(nn.Module):
    """A transformer block under adaLN-Zero (Peebles and Xie 2023); the stream is at least fp32."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated(x, shift1, scale1, c.dtype))
        return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2, c.dtype))


class SiT(nn.Module):
    """The network: (x [B,C,S,S], t [B] in [0, 1], labels [B]) -> velocity [B,C,S,S].

    Parameters have the names of REPA's own files. Label number num_classes is the null class.
    `config` is the mapping in config.json.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, patch, channels = config["width"], config["patch"], config["channels"]
        self.config = config
        self.scale: float = config["latent_scale"]
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        self.t_embedder = TimeEmbedding(width)
        table = nn.Embedding(config["num_classes"] + 1, width)
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.pos_embed = nn.Parameter(torch.empty(1, (config["side"] // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            Block(width, config["heads"], config["qk_norm"]) for _ in range(config["depth"])
        )
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        linear = nn.Linear(width, patch * patch * channels)
        self.final_layer = nn.ModuleDict({"adaLN_modulation": modulation, "linear": linear})

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> SiT:
        """The model of a folder with config.json and its weights, on the CPU, in eval mode."""
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        with torch.device("meta"):
            model = cls(config)
        weights = load_file(Path(folder) / WEIGHTS)
        if torch_dtype is not None:
            weights = {name: value.to(torch_dtype) for name, value in weights.items()}
        model.load_state_dict(weights, strict=True, assign=True)
        return model.requires_grad_(False).eval()

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write what `from_pretrained` reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG).write_text(json.dumps(self.config, indent=1), encoding="utf-8")
        save_file(self.state_dict(), Path(folder) / WEIGHTS, metadata={"format": "pt"})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which products run."""
        return self.pos_embed.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.pos_embed.device

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        c = self.t_embedder(t.to(wide)) + self.y_embedder["embedding_table"](labels)  # [B,D]
        tokens = self.x_embedder["proj"](x.to(self.dtype)).flatten(2).transpose(1, 2)  # [B,T,D]
        h = tokens.to(wide) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        patches = self.final_layer["linear"](modulated(h, shift, scale, c.dtype))  # [B,T,p*p*C]
        p, channels, grid = self.config["patch"], self.config["channels"], x.shape[-1]
        grid //= p
        out = patches.to(wide).view(-1, grid, grid, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        out = out.reshape(-1, channels, grid * p, grid * p)
        return self._velocity_of(out, x.to(wide), t.to(wide)) if self.predicts_data else out

    @property
    def predicts_data(self) -> bool:
        """Tell whether the last layer's output is the clean latent, not the velocity."""
        return self.config["prediction"] == "data"

    def _velocity_of(self, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """alpha' z + sigma' (x - alpha z) / sigma, its sigma bounded from below."""
        t = t.view(-1, 1, 1, 1)
        alpha, sigma, d_alpha, d_sigma = path_coefficients(self.config["path"], t)
        _, bounded, _, _ = path_coefficients(self.config["path"], t.clamp(min=SHORTEST_TIME))
        return (d_sigma * x - (d_sigma * alpha - d_alpha * sigma) * data) / bounded

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor | Sequence[int],
        *,
        seed: int = 0,
        ids: Tensor | Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw latents [B,C,S,S] float32 for labels [B]; `ids` [B] number the images, 0, 1, 2, ...

        settings: sampler ("ode", "heun", "sde"), steps, cfg (1: no guidance), guidance_low and
        guidance_high (the times between which it acts); by default those of `config["sampling"]`.
        `progress(i)` is called after step i. ValueError: a setting or label that is not allowed.
        """
        own = {**self.config["sampling"], **{k: v for k, v in settings.items() if v is not None}}
        if unknown := sorted(own.keys() - self.config["sampling"].keys()):
            raise ValueError(f"{unknown[0]}: unknown; known are {', '.join(sorted(own))}")
        if own["sampler"] not in ("ode", "heun", "sde") or own["steps"] < 1:
            raise ValueError(f"sampler {own['sampler']!r} of {own['steps']} steps is none")
        labels = torch.as_tensor(labels, dtype=torch.int64, device=self.device)
        null, side, channels = (self.config[k] for k in ("num_classes", "side", "channels"))
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < null:
            raise ValueError(f"labels: not all of them are in 0 .. {null - 1}")
        numbers = torch.arange(len(labels)) if ids is None else torch.as_tensor(ids)
        numbers = numbers.to(self.device, torch.int64)
        both = torch.cat((labels, torch.full_like(labels, null)))

        def noise(stream: int, step: int) -> Tensor:
            values = keyed_normal(seed, stream, step, numbers, channels * side * side)
            return values.view(-1, channels, side, side)

        def velocity(x: Tensor, t: float, guide: bool) -> Tensor:
            x = torch.cat((x, x)) if guide else x
            time = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
            v = self(x.float(), time, both[: len(x)]).double()
            if not guide:
                return v
            of_label, of_null = v.chunk(2)
            return of_null + own["cfg"] * (of_label - of_null)

        return integrate(
            velocity,
            noise(STARTS, 0).float().double(),
            sampler=own["sampler"],
            steps=own["steps"],
            path=self.config["path"],
            guided=lambda t: own["cfg"] > 1 and own["guidance_low"] <= t <= own["guidance_high"],
            step_noise=lambda step: noise(STEPS, step),
            progress=progress,
        ).float()
