"""A training step: data, frozen encoders, generator, DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrepa.checkpoint.format import load_engine_state, load_model_weights, read_state
from fastrepa.config import Config, TrainingConfig
from fastrepa.data.pipeline import Batch
from fastrepa.model.attention import choose_attention
from fastrepa.model.compilation import (
    check_compile,
    compile_generator,
    copy_gradients,
    next_graph,
)
from fastrepa.model.sit import SiT
from fastrepa.randomness import KeyedRandom, Stream
from fastrepa.runtime.determinism import make_deterministic
from fastrepa.runtime.world import World
from fastrepa.training.bad_steps import BadSteps
from fastrepa.training.inputs import Inputs, build_inputs
from fastrepa.training.look_ahead import Batches, LookAhead
from fastrepa.training.meters import Meter
from fastrepa.training.objective import Draws, Objective, lognormal_time
from fastrepa.training.schedule import learning_rate
from fastrepa.training.zero.collectives import time_collectives
from fastrepa.training.zero.engine import WholeTensors, grad_norm, start_engine
from fastrepa.training.zero.settings import micro_batch, resolve_zero, trained_elements
from fastrepa.vision.codec import token_grid
from fastrepa_kernels.attention import Choice

if TYPE_CHECKING:
    from fastrepa.training.extra_losses import ExtraLosses


def check_run(config: Config, world: World) -> Choice:
    """Refuse, before anything is built, what cannot run here; return the attention that will.

    Raises ConfigError naming the key.
    """
    micro_batch(config.training, world.size)
    token_grid(config.data, config.model.patch)
    choice = choose_attention(
        config.attention,
        config.model,
        world.device,
        config.training.dtype,
        deterministic=config.deterministic,
    )
    if config.zero.swaps:
        from fastrepa.training.zero.offload import check_offload

        check_offload(config.zero, config.run)
    build_extra_losses(config.training)
    check_compile("training.compile", config.training.compile, world.device)
    check_compile("vision.compile", config.vision.compile, world.device)
    return choice


def build_extra_losses(config: TrainingConfig) -> ExtraLosses | None:
    """Read the terms of one's own, where there are any. Raises ConfigError."""
    if not config.extra_losses:
        return None
    from fastrepa.training.extra_losses import ExtraLosses

    return ExtraLosses(config)


class Trainer:
    """The generator under DeepSpeed, and the step that trains it.

    inputs: codec and encoders; by default with seeded random weights, for steps without data.
    checkpoint: a folder to continue from; by default the weights are those of config.seed.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        inputs: Inputs | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        make_deterministic(config.deterministic)
        self.world, self.attention = world, check_run(config, world)
        self.micro, self.forwards = micro_batch(config.training, world.size)
        inputs = inputs or build_inputs(config, world, None)
        self.codec, self.targets = inputs.codec, inputs.targets
        self.cached_latents = inputs.cached_latents
        self.objective = Objective(config.objective)
        self.extra_losses = build_extra_losses(config.training)
        self.random = KeyedRandom(config.seed)
        state = read_state(checkpoint) if checkpoint else None
        self.step = state.step if state else 0
        # Every rank draws the same initial weights; generators differ afterwards.
        torch.manual_seed(config.seed)
        model = SiT.from_config(
            config,
            side=self.codec.side,
            channels=self.codec.channels,
            encoder_widths=self.targets.widths,
            attention=self.attention.backend,
        )
        if checkpoint:
            load_model_weights(checkpoint, model)
        self.config = config = resolve_zero(
            config, trained_elements(model.parameters()), world.size
        )
        torch.manual_seed(config.seed + 1 + world.rank)
        self.fixed = {
            n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad
        }
        self.engine, self.optimizer = start_engine(model, config, world)
        self.engine.train()
        compile_generator(self.engine.module, config.training.compile, world.device)
        if config.training.compile == "graphs":
            copy_gradients(self.engine.module)
        self.whole = WholeTensors(self.engine, self.optimizer)
        self.resume_notes: list[str] = []
        if checkpoint and state:
            self.resume_notes = load_engine_state(checkpoint, self.whole, state, world)
        self.meter = Meter(world, config.training.global_batch)
        time_collectives(self.meter.region)
        self.look_ahead = LookAhead(self.targets, config.vision.look_ahead, world.device)
        self.bad_steps = BadSteps(world)
        self.last_batches: list[Batch] = []  # of the last step, to explain it with

    def train_step(self, batches: Batches) -> dict[str, Tensor]:
        """Take one update from `forwards` micro-batches; return this rank's means [] by name.

        They stay on the device. `skipped` is 1 where a loss or gradient was not finite and the
        update was left out.
        """
        totals: dict[str, Tensor] = {}
        region = self.meter.region
        self.last_batches.clear()
        self.optimizer.set_rate(learning_rate(self.config.training, self.step))
        for forward in range(self.forwards):
            batch, targets = self.look_ahead.take(batches, region)
            self.last_batches.append(batch)
            losses = self.forward_losses(batch, self.sample_numbers(forward), targets)
            self.bad_steps.add(losses["loss"])
            if forward + 1 < self.forwards or self.step + 1 < self.config.training.steps:
                self.look_ahead.begin(batches, region)
            with region("backward"):
                self.engine.backward(losses["loss"])
            if forward == self.forwards - 1:
                with region("communication"):
                    self.optimizer.bad_loss = self.bad_steps.agree()
            with region("optimiser"):
                self.engine.step()
            for name, value in losses.items():
                share = value.detach() / self.forwards
                totals[name] = totals[name] + share if name in totals else share
        self.step += 1
        skipped = self.bad_steps.taken(grad_norm(self.engine))
        return {**totals, "skipped": skipped}

    def repeats(self) -> list[Callable[[], dict[str, Tensor]]]:
        """This rank's passes of the last step, each to be gone through again, forward and backward,
        with the same weights, batch and noise; it returns its losses [] by name. No step can be
        taken afterwards.
        """
        self.step -= 1  # the draws are keyed by the step that is under way

        def again(forward: int, batch: Batch) -> dict[str, Tensor]:
            losses = self.forward_losses(batch, self.sample_numbers(forward))
            self.engine.backward(losses["loss"])
            return losses

        return [partial(again, number, batch) for number, batch in enumerate(self.last_batches)]

    def forward_losses(
        self, batch: Batch, samples: Tensor, targets: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return loss, velocity_loss, with encoders alignment_loss, and the terms of one's own, of
        a micro-batch, [] each.

        samples [B] int64: the samples' numbers within the step's global batch, which key their
        noise, time and label dropout. targets [B,T,Z] by encoder: made here unless given.
        """
        region = self.meter.region
        if targets is None:
            with region("encoder"):
                targets = self.targets(batch)
        with torch.no_grad():
            latent_noise, t, noise, drop = self.draws(samples)
            with region("codec"):
                z = self.codec.latents(batch.image_u8, batch.moments, latent_noise)
            x_t, velocity_target = self.objective.interpolate(z, noise, t)
        with region("forward"):
            next_graph(self.config.training.compile)
            if targets:
                velocity, alignment = self.engine(x_t, t, batch.label, targets, drop)
            else:
                velocity, alignment = self.engine(x_t, t, batch.label, None, drop), None
            velocity_loss = self.objective.velocity_loss(velocity, velocity_target)
            losses = {"loss": velocity_loss, "velocity_loss": velocity_loss}
            if alignment is not None:
                losses["loss"] = velocity_loss + self.config.alignment.weight * alignment
                losses["alignment_loss"] = alignment
            if self.extra_losses is not None:
                extra, terms = self.extra_losses(
                    velocity.float(), velocity_target, x_t, z, noise, t, batch, drop, targets,
                    self.step,
                )  # fmt: skip
                losses = {**losses, "loss": losses["loss"] + extra, **terms}
        return losses

    def sample_numbers(self, forward: int) -> Tensor:
        """Number the samples [B] of this rank's forward-th micro-batch within the global batch."""
        first = (self.world.rank * self.forwards + forward) * self.micro
        return torch.arange(first, first + self.micro, device=self.world.device)

    def draws(self, samples: Tensor) -> Draws:
        """Draw what is random in these samples [B] of this step: a few launches on a GPU."""
        draw, step, o = self.random, self.step, self.config.objective
        shape = (self.codec.channels, self.codec.side, self.codec.side)
        if o.time == "uniform":
            time = draw.uniform(Stream.TIME, step, samples)
        else:
            normal = draw.normal(Stream.TIME, step, samples)
            time = lognormal_time(o.path, o.time_mean + o.time_std * normal)
        return Draws(
            draw.normal(Stream.LATENT, step, samples, shape) if self.codec.stochastic else None,
            time,
            draw.normal(Stream.NOISE, step, samples, shape),
            draw.uniform(Stream.LABEL_DROP, step, samples) < self.config.model.label_dropout,
        )
