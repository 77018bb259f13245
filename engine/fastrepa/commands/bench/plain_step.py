"""The training step that a good engineer writes in an afternoon, without us, as a rival.

float32 weights under torch.autocast in bf16, the whole model under torch.compile as one graph,
torch's fused AdamW, averages by foreach, noise from the device's own generator: no DeepSpeed, no
kernel of ours, nothing that the host waits for. The model is SiT on its eager operations, which are
plain torch, with torch's scaled_dot_product_attention. One process, one forward per step.

Losses depend on the noise. So it can also draw what a run of ours would, which is slower: `bench`
has it take as many steps on those draws as the others take in all, whose losses are compared, and
times it with the generator's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrepa.config import Config, EmaConfig
from fastrepa.data.pipeline import Batch
from fastrepa.model.attention import choose_attention
from fastrepa.model.sit import SiT
from fastrepa.randomness import KeyedRandom, Stream
from fastrepa.training.look_ahead import Batches
from fastrepa.training.objective import Objective, lognormal_time
from fastrepa.training.optimizer import power_gamma
from fastrepa.training.schedule import learning_rate
from fastrepa.training.targets import Targets
from fastrepa.vision.codec import build_codec, token_grid
from fastrepa_kernels.adamw_ema import power_decay


class DeviceRandom:
    """KeyedRandom's calls, answered by the device's generator: its keys are unused."""

    def normal(
        self, stream: int, step: int, samples: Tensor, shape: tuple[int, ...] = ()
    ) -> Tensor:
        return torch.randn(len(samples), *shape, device=samples.device)

    def uniform(self, stream: int, step: int, samples: Tensor) -> Tensor:
        return torch.rand(len(samples), device=samples.device)


class PlainLoop:
    """A training loop with a Trainer's `train_step`, from the same weights: those of config.seed.

    config: a contender's, with eager kernels and attention.backend sdpa. random: where noise, time
    and label drop come from, a run's own at first.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device, self.steps = config, device, 0
        self.mixed, dtype = config.training.bf16, config.training.dtype
        self.codec = build_codec(
            config.data.codec,
            resolution=config.data.resolution,
            device=device,
            dtype=dtype,
            random_weights=True,
        )
        self.cached_latents = config.data.must_cache_latents
        self.targets = Targets(
            config.vision,
            resolution=config.data.resolution,
            grid=token_grid(config.data, config.model.patch),
            dtype=dtype,
            device=device,
            random_weights=True,
        )
        self.objective = Objective(config.objective)
        self.random: KeyedRandom | DeviceRandom = KeyedRandom(config.seed)
        attention = choose_attention(  # tried before the compile
            config.attention, config.model, device, dtype, deterministic=config.deterministic
        )
        torch.manual_seed(config.seed)
        self.model = SiT.from_config(
            config,
            side=self.codec.side,
            channels=self.codec.channels,
            encoder_widths=self.targets.widths,
            attention=attention.backend,
        ).to(device)
        self.compiled = torch.compile(self.model, fullgraph=True, dynamic=False)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        o = config.training.optimizer
        self.adamw = torch.optim.AdamW(
            self.params, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        self.averages = [[p.detach().clone() for p in self.params] for _ in config.training.ema]

    def train_step(self, batches: Batches) -> dict[str, Tensor]:
        """Take one update from one batch; return its loss [], left on the device."""
        batch = next(batches)
        x_t, t, velocity_target, drop = self.example(batch)
        targets = self.targets(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            out = self.compiled(x_t, t, batch.label, targets or None, drop)
        velocity, alignment = out if targets else (out, 0.0)
        loss = F.mse_loss(velocity, velocity_target) + self.config.alignment.weight * alignment
        loss.backward()
        if self.config.training.clip:
            nn.utils.clip_grad_norm_(self.params, self.config.training.clip, foreach=True)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.config.training, self.steps)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.steps += 1
        weights = [p.detach() for p in self.params]
        for ema, average in zip(self.config.training.ema, self.averages, strict=True):
            torch._foreach_lerp_(average, weights, 1 - _decay(ema, self.steps))
        return {"loss": loss.detach()}

    @torch.no_grad()
    def example(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x_t [B,C,h,w], t [B], velocity [B,C,h,w] and bool [B]: is the label dropped?"""
        draw, step, o = self.random, self.steps, self.config.objective
        samples = torch.arange(len(batch.label), device=self.device)
        shape = (self.codec.channels, self.codec.side, self.codec.side)
        latent_noise = None
        if self.codec.stochastic:
            latent_noise = draw.normal(Stream.LATENT, step, samples, shape)
        z = self.codec.latents(batch.image_u8, batch.moments, latent_noise)
        noise = draw.normal(Stream.NOISE, step, samples, shape)
        if o.time == "uniform":
            t = draw.uniform(Stream.TIME, step, samples)
        else:
            exponent = o.time_mean + o.time_std * draw.normal(Stream.TIME, step, samples)
            t = lognormal_time(o.path, exponent)
        x_t, velocity_target = self.objective.interpolate(z, noise, t)
        drop = draw.uniform(Stream.LABEL_DROP, step, samples) < self.config.model.label_dropout
        return x_t, t, velocity_target, drop


def _decay(ema: EmaConfig, update: int) -> float:
    if ema.sigma_rel is not None:
        return float(power_decay(update, power_gamma(ema.sigma_rel)))
    assert ema.decay is not None
    return ema.decay
