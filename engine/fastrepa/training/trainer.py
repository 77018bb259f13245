"""The training loop: data, frozen encoder, generator, DeepSpeed, and what a run leaves behind."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrepa.checkpoint.averages import ema_model, recorded
from fastrepa.checkpoint.format import (
    RunState,
    checkpoint_path,
    load_engine_state,
    load_model_weights,
    newest_checkpoint,
    read_state,
)
from fastrepa.checkpoint.writer import CheckpointWriter
from fastrepa.config import Config, load_config, save_config
from fastrepa.data.datasets import DataSet, open_data
from fastrepa.data.pipeline import Batch, DataPipeline
from fastrepa.errors import ConfigError, DataError, TrainingError
from fastrepa.generation.generate import default_labels, generate, rank_batches
from fastrepa.generation.pictures import save_curves, save_grid
from fastrepa.model.attention import attention_record, choose_attention, slow_attention
from fastrepa.model.compilation import (
    COMPILED,
    check_compile,
    compile_generator,
    copy_gradients,
    next_graph,
)
from fastrepa.model.sit import SiT
from fastrepa.randomness import KeyedRandom, Stream
from fastrepa.runtime.determinism import NOT_ON_A_GPU, make_deterministic
from fastrepa.runtime.exit_codes import REQUEUE
from fastrepa.runtime.regions import SAMPLING
from fastrepa.runtime.survival import Watch, host_group_of
from fastrepa.runtime.world import World, of_first_rank
from fastrepa.training.bad_steps import BadSteps, Spikes
from fastrepa.training.diagnosis import SampleNames, diagnosis
from fastrepa.training.evaluation import Evaluations, MakeEvaluator
from fastrepa.training.look_ahead import Batches, LookAhead
from fastrepa.training.meters import Meter, image_flops
from fastrepa.training.objective import Draws, Objective, lognormal_time
from fastrepa.training.targets import Targets, latents_are_cached
from fastrepa.training.telemetry import Telemetry, versions
from fastrepa.training.zero.collectives import time_collectives
from fastrepa.training.zero.engine import WholeTensors, grad_norm, start_engine
from fastrepa.training.zero.offload import check_offload
from fastrepa.training.zero.settings import as_run, micro_batch, resolve_zero, trained_elements
from fastrepa.vision.codec import build_codec, token_grid
from fastrepa_kernels import launch

# What may change between a run and its continuation without changing what is learned.
FREE_KEYS = ("run", "training.steps", "training.log_every", "training.sample_every",
             "training.checkpoint_every", "training.keep", "training.tensorboard",
             "training.wandb", "training.micro_batch", "training.compile", "training.ema",
             "training.recompute", "training.memory_budget_gb", "vision.look_ahead",
             "vision.compile", "data.path", "data.decode", "data.readers", "data.read_ahead",
             "data.prefetch", "sample", "evaluation", "zero", "survival", "attention", "kernels",
             "deterministic")  # fmt: skip


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOOKED_AT = 16  # images that an encoder's precision is measured on
SAMPLE_BATCH = 16  # images per forward of the grids, the same for any number of ranks


def learning_rate(config: Config, step: int) -> float:
    """The rate of update number `step`, 0-based: linear warm-up, then constant or half a cosine."""
    t, s = config.training, config.training.schedule
    if step < s.warmup:
        return t.optimizer.lr * (step + 1) / s.warmup
    if s.name == "constant":
        return t.optimizer.lr
    done = min(1.0, (step - s.warmup) / max(1, t.steps - s.warmup))
    return t.optimizer.lr * (s.final + (1 - s.final) * 0.5 * (1 + math.cos(math.pi * done)))


def slow_precision(config: Config, world: World) -> str:
    """A warning where bf16 is slower than fp32, by a lot: a CPU without instructions for it."""
    fast = world.device.type != "cpu" or launch.cpu_multiplies(torch.bfloat16)
    if config.training.precision != "bf16" or fast:
        return ""
    return (
        "training.precision: this CPU has no instructions for bf16, whose products are then many "
        "times slower than those of fp32; training.precision=fp32 is the faster here"
    )


class Trainer:
    """A run: built from its configuration, continued from its newest checkpoint where there is one.

    `evaluator` makes what `evaluation` in the configuration asks for. With `random_weights` encoder
    and codec keep seeded random weights and nothing is read or written: what a dry run needs.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        host_group: Any = None,
        *,
        evaluator: MakeEvaluator | None = None,
        random_weights: bool = False,
    ) -> None:
        make_deterministic(config.deterministic)
        self.config, self.world = config, world
        # Small questions between hosts go over gloo, which does not make a GPU wait.
        self.host_group = host_group or host_group_of(config.survival)
        self.run = Path(config.run)
        self.micro, self.forwards = micro_batch(config, world.size)
        dtype = config.training.dtype
        grid = token_grid(config)
        self.attention = choose_attention(config, world.device, dtype)
        check_offload(config)
        check_compile("training.compile", config.training.compile, world.device)
        check_compile("vision.compile", config.vision.compile, world.device)
        if not random_weights:  # what fails cheaply comes first
            self.shards = self._open_shards()
        self.objective = Objective(config.objective)
        self.random = KeyedRandom(config.seed)
        self.codec = build_codec(
            config.data.codec,
            resolution=config.data.resolution,
            device=world.device,
            dtype=dtype,
            random_weights=random_weights,
        )
        self.targets = Targets(
            config,
            grid=grid,
            dtype=dtype,
            device=world.device,
            random_weights=random_weights,
        )
        self.targets.prepare(
            _noise_of(config)
            if random_weights
            else partial(_first_images, self.shards, config, world.device),
            refuse=not random_weights,
        )
        self.cached_latents = config.data.latents == "cached"
        measured = None
        if not random_weights:
            self.cached_latents = latents_are_cached(config.data, self.shards, self.codec)
            self.targets.check(self.shards, weights=world.is_first)
            if config.evaluation.every and evaluator:
                measured = evaluator(config, world, self.codec, self.shards.classes)
        self.evaluations = Evaluations(config, world, self.codec, measured)

        checkpoint = (
            None if random_weights else of_first_rank(world, lambda: _newest_checkpoint(self.run))
        )
        self.step = read_state(checkpoint).step if checkpoint else 0
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
        config = resolve_zero(config, trained_elements(model.parameters()), world.size)
        self.config = config
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
        self.resumed_from, self._resume_notes = checkpoint, list[str]()
        if checkpoint:
            state = read_state(checkpoint)
            self._resume_notes = load_engine_state(checkpoint, self.whole, state, world)
        self.meter = Meter(world, config.training.global_batch)
        time_collectives(self.meter.region)
        self.look_ahead = LookAhead(self.targets, config.vision.look_ahead, world.device)
        self.metrics: dict[str, float] = {}  # the last logged line
        self.writer: CheckpointWriter | None = None  # made when training begins
        self.bad_steps = BadSteps(world)
        self._last_batches: list[Batch] = []  # of the last step, to explain it with
        self._asked_to_stop = self._stopped_by = 0  # signal numbers: this rank's, all ranks'

    # One step ---------------------------------------------------------------------------------

    def train_step(self, batches: Batches) -> dict[str, Tensor]:
        """One update from `forwards` micro-batches; this rank's means, left on the device.

        `skipped` is 1 where a loss or gradient was not finite and the update was left out.
        """
        totals: dict[str, Tensor] = {}
        region = self.meter.region
        self._last_batches.clear()
        self.optimizer.set_rate(learning_rate(self.config, self.step))
        for forward in range(self.forwards):
            batch, targets = self.look_ahead.take(batches, region)
            self._last_batches.append(batch)
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

    def forward_losses(
        self, batch: Batch, samples: Tensor, targets: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """loss, velocity_loss and, with encoders, alignment_loss of one micro-batch.

        samples [B] int64: the samples' numbers within the step's global batch, which key their
        noise, time and label dropout. targets: made here unless given.
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
            if alignment is None:
                return {"loss": velocity_loss, "velocity_loss": velocity_loss}
            loss = velocity_loss + self.config.alignment.weight * alignment
        return {"loss": loss, "velocity_loss": velocity_loss, "alignment_loss": alignment}

    def sample_numbers(self, forward: int) -> Tensor:
        """This rank's samples of its forward-th micro-batch, numbered within the global batch."""
        first = (self.world.rank * self.forwards + forward) * self.micro
        return torch.arange(first, first + self.micro, device=self.world.device)

    def draws(self, samples: Tensor) -> Draws:
        """What is random in these samples [B] of this step: a few launches on a GPU."""
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

    # The run ----------------------------------------------------------------------------------

    def train(self, watch: Watch) -> int:
        """Train to the last step; returns 0, or what the process exits with: 130 after SIGINT,
        REQUEUE (75), which the launch files start again, after SIGTERM and SIGUSR1.
        """
        config, world = self.config, self.world
        if config.evaluation.every and self.evaluations.evaluator is None:
            raise ConfigError("evaluation.every: this run was given nothing to evaluate with")
        if world.is_first:
            _warn_of_changes(self.run, config)
            save_config(config, self.run / "config.yaml")
        ran = attention_record(config, self.attention)
        with Telemetry(
            self.run, config, start_step=self.step, active=world.is_first, environment=ran
        ) as telemetry:
            telemetry.say(self.first_line())
            slow = (slow_attention(self.attention, world.device), slow_precision(config, world))
            for words in filter(None, slow):
                telemetry.warn(words)
            if config.deterministic and world.device.type == "cuda":
                telemetry.say(NOT_ON_A_GPU)
            if self.resumed_from:
                for line in (f"continuing {self.run} from step {self.step}", *self._resume_notes):
                    telemetry.say(line)
            for line in self.evaluations.first_words():
                telemetry.warn(line)
            if self.step >= config.training.steps:
                telemetry.say(
                    f"{self.run} is finished already: to go on, raise training.steps; "
                    f"to start again, name another run"
                )
                self._say_what_is_there(telemetry)
                return 0
            if world.is_first:
                self.meter.flops = image_flops(
                    config, world.device, cached_latents=self.cached_latents
                )
            with self.open_pipeline() as batches, _Signals(self), watch.guard():
                self._loop(batches, telemetry, watch)
            if world.is_first and telemetry.history():
                with telemetry.dispensable("curves.png"):
                    save_curves(telemetry.history(), self.run / "curves.png")
            if self._stopped_by:
                telemetry.say(f"stopped at step {self.step}, saved; the same command continues")
                return 128 + signal.SIGINT if self._stopped_by == signal.SIGINT else REQUEUE
            self._say_what_is_there(telemetry)
        return 0

    def open_pipeline(self) -> DataPipeline:
        """The run's batches on this rank, from its step on."""
        return DataPipeline(
            self.shards,
            self.config.data,
            global_batch=self.config.training.global_batch,
            micro_batch=self.micro,
            rank=self.world.rank,
            world=self.world.size,
            seed=self.config.seed,
            start_step=self.step,
            device=self.world.device,
            image=not self.cached_latents or self.targets.need_images,
            moments=self.cached_latents,
            features=self.targets.columns,
        )

    def _say_what_is_there(self, telemetry: Telemetry) -> None:
        """What the finished run did, where to look, and what to try next."""
        lines = telemetry.history()
        if not lines:
            return
        last, run, encoders = lines[-1], self.run, self.config.vision.encoders
        aligned = f", aligned to {', '.join(e.name for e in encoders)}" if encoders else ""
        telemetry.say(
            f"\n{self.step} steps of {self.config.training.global_batch} images{aligned}: "
            f"loss {last['loss']:.4f}, {last['images_per_s']:.0f} images/s, "
            f"{last['seconds'] / 60:.1f} minutes\n"
            f"  samples      {run}/samples/\n"
            f"  curves       {run}/curves.png\n"
            f"  metrics      {run}/metrics.jsonl, {run}/tensorboard/\n"
            f"  checkpoint   {checkpoint_path(run, self.step)}/\n"
            f"next:\n"
            f"  {_program('fastrepa')} sample {run} --num 64 --cfg 3 --seed 1\n"
            f"  {_program('fastrepa')} train {run}/config.yaml training.steps={2 * self.step}\n"
            f"  {_program('tensorboard')} --logdir {run}"
        )

    def _loop(self, batches: Batches, telemetry: Telemetry, watch: Watch) -> None:
        t, writer = self.config.training, self._open_writer()
        telemetry.start(self.step)
        meter = self.meter
        meter.reset()
        earlier = [line["loss"] for line in telemetry.history()]
        spikes = Spikes(self.config.survival.loss_spike, earlier)
        skipped = self.step - self.whole.optimizer_step
        while self.step < t.steps:
            watch.progress(self.step)
            stop = self._ask_to_stop()
            metrics = self.train_step(batches)
            meter.add(metrics)
            telemetry.advance(self.step)
            last = stop() or self.step == t.steps
            if last:
                self._give_up_if_bad()
            evaluated = self.evaluations.due(self.step)
            if self.step % t.log_every == 0 or last or evaluated:
                rate = learning_rate(self.config, self.step - 1)
                read = meter.read(self.step, rate, grad_norm(self.engine))
                before, skipped = skipped, self.step - self.whole.optimizer_step
                self.metrics = {**read, "skipped_steps": skipped}
                if evaluated:
                    with meter.region(SAMPLING):
                        self._evaluate(telemetry, watch)
                telemetry.log(self.metrics | self.evaluations.at(self.step))
                if skipped > before:
                    telemetry.warn(
                        f"{skipped - before} step(s) up to step {self.step} had a loss or "
                        f"gradients that are not finite and were skipped; {skipped} in all"
                    )
                if spike := spikes.check(self.step, self.metrics["loss"]):
                    telemetry.warn(spike)
            if (t.sample_every and self.step % t.sample_every == 0) or self.step == t.steps:
                with meter.region(SAMPLING):
                    self._draw_samples(telemetry)
            if (t.checkpoint_every and self.step % t.checkpoint_every == 0) or last:
                with meter.region("checkpoint"):
                    self.save(wait=last)
            else:
                with meter.region("checkpoint"):
                    writer.poll()
            if last:
                return

    def save(self, *, wait: bool = False) -> Path:
        """Start to write a checkpoint of this step, or write it whole and `wait` (collective).

        Raises CheckpointError where it cannot be written and `wait` is set; otherwise that is a
        warning at a later step.
        """
        writer = self._open_writer()
        writer.save(self.state())
        if wait:
            writer.settle(required=True)
        return checkpoint_path(self.run, self.step)

    def _open_writer(self) -> CheckpointWriter:
        if self.writer is None:
            self.writer = CheckpointWriter(
                self.run, self.whole, self.fixed, self.world, self.host_group, self.config.training
            )
        return self.writer

    def state(self) -> RunState:
        return RunState(
            step=self.step,
            optimizer_step=self.whole.optimizer_step,
            samples_seen=self.step * self.config.training.global_batch,
            side=self.codec.side,
            channels=self.codec.channels,
            encoder_widths=self.targets.widths,
            classes=self.shards.classes,
            world_size=self.world.size,
            versions=versions(),
            metrics=self.metrics | self.evaluations.at(self.step),
            emas=recorded(self.config.training.ema),
            ema_since=self.optimizer.ema_since,
        )

    def first_line(self) -> str:
        """What this run computes on and which paths are active, on one line."""
        c, w = self.config, self.world
        where = (
            torch.cuda.get_device_name(w.device)
            if w.device.type == "cuda"
            else f"cpu ({torch.get_num_threads()} threads)"
        )
        model = (
            c.model.name or f"SiT {c.model.width} wide, {c.model.depth} deep, patch {c.model.patch}"
        )
        parameters = sum(math.prod(_shape(p)) for p in self.engine.module.parameters())
        stage = as_run(c, w.size).zero.stage
        parts = {
            "device": f"{where} x {w.size}",
            "model": f"{model}, {parameters / 1e6:.1f} M parameters",
            "precision": c.training.precision,
            "ZeRO": str(c.zero.stage)
            + (f", as {stage}" if stage != c.zero.stage else "")
            + (f", states on {c.zero.offload}" if c.zero.offload != "none" else ""),
            "recompute": str(c.training.recompute),
            "keep": c.training.keep if c.kernels == "fused" else "none",
            "attention": self.attention.backend,
            "kernels": c.kernels + COMPILED[c.training.compile],
            "encoder": self.targets.describe() + (", ahead" if self.look_ahead.active else ""),
            "codec": f"{self.codec.name} {self.codec.channels}x{self.codec.side}x{self.codec.side}"
            + (" (cached)" if self.cached_latents else ""),
            "batch": f"{c.training.global_batch} = {w.size} x {self.forwards} x {self.micro}",
        }
        if c.deterministic:
            parts["deterministic"] = "yes"
        return " · ".join(f"{k} {v}" for k, v in parts.items())

    def _open_shards(self) -> DataSet:
        shards = open_data(self.config.data.path, resolution=self.config.data.resolution)
        if len(shards.classes) > self.config.model.num_classes:
            raise DataError(
                f"{self.config.data.path}: holds {len(shards.classes)} classes, "
                f"model.num_classes is {self.config.model.num_classes}"
            )
        return shards

    def _evaluate(self, telemetry: Telemetry, watch: Watch) -> None:
        """Metrics of the averaged weights; training.keep_best may go by them (collective)."""
        scores = self.evaluations.measure(
            self.step,
            self.whole,
            self.fixed,
            alive=lambda: watch.progress(self.step),
            warn=telemetry.warn,
        )
        figures = " · ".join(f"{name} {value:.5g}" for name, value in scores.items())
        telemetry.say(f"step {self.step}, {self.config.evaluation.num:,} images: {figures}")

    def _draw_samples(self, telemetry: Telemetry) -> None:
        """A grid from the averaged weights, in eval mode: samples/step_*.png (collective)."""
        config, world = self.config, self.world
        num = config.sample.num
        labels = default_labels(num, len(self.shards.classes))
        mine = rank_batches(num, SAMPLE_BATCH, world.rank, world.size)
        numbers = torch.cat(mine) if mine else torch.empty(0, dtype=torch.int64)
        images: Tensor | None = None
        with ema_model(
            config, self.whole, self.fixed, self.codec, world, needed=bool(mine)
        ) as model:
            if model is not None:
                images = generate(
                    model,
                    self.codec,
                    labels[numbers],
                    seed=config.seed,
                    sample_ids=numbers,
                    batch_size=SAMPLE_BATCH,
                    sample_config=config.sample,
                    path=config.objective.path,
                )
        parts: list[Any] = [None] * world.size
        dist.gather_object((numbers, images), parts if world.is_first else None, dst=0)
        if world.is_first:
            assert images is not None
            grid = torch.empty(num, *images.shape[1:], dtype=torch.uint8)
            for numbers, part in parts:
                if part is not None:
                    grid[numbers] = part
            path = self.run / "samples" / f"step_{self.step:07d}.png"
            with telemetry.dispensable(f"samples/{path.name}"):
                path.parent.mkdir(exist_ok=True)
                save_grid(grid, path)
                telemetry.picture("samples", path, self.step)

    # Stopping ---------------------------------------------------------------------------------

    def request_stop(self, number: int) -> None:
        self._asked_to_stop = number

    def _ask_to_stop(self) -> Callable[[], bool]:
        """Ask all ranks, while the step runs, whether any was told to stop; call for the answer."""
        flag = torch.tensor([self._asked_to_stop, self.bad_steps.seen])
        work: Any = dist.all_reduce(
            flag, op=dist.ReduceOp.MAX, group=self.host_group, async_op=True
        )

        def answer() -> bool:
            with self.meter.region("communication"):
                work.wait()
            self._stopped_by, bad = flag.tolist()
            if self.world.device.type == "cpu":  # this step's own, alike on all ranks
                bad = self.bad_steps.seen
            if bad >= self.config.survival.bad_steps:
                self._give_up_if_bad()
            return self._stopped_by > 0

        return answer

    def _give_up_if_bad(self) -> None:
        """Stop with a diagnosis where too many steps in a row were bad (collective)."""
        in_row = self.bad_steps.in_row()
        if in_row >= self.config.survival.bad_steps:
            self._open_writer().settle()  # a save in flight is the last good one
            raise self._diagnosis(in_row)

    def _diagnosis(self, in_row: int) -> TrainingError:
        """What is not finite in the last step, which is repeated for it (collective)."""
        step, batches = self.step, self._last_batches
        self.step -= 1  # the draws are keyed by the step that is under way
        names = SampleNames(
            self.shards, self.config, self.micro, self.world, cached_latents=self.cached_latents
        )

        def repeat(forward: int) -> dict[str, Tensor]:
            losses = self.forward_losses(batches[forward], self.sample_numbers(forward))
            self.engine.backward(losses["loss"])
            return losses

        return diagnosis(
            self.engine.module,
            repeat,
            [names.of(step, forward) for forward in range(len(batches))],
            run=self.run,
            step=step,
            in_row=in_row,
            world=self.world,
            group=self.host_group,
        )


class _Signals:
    """SIGINT, SIGTERM and SIGUSR1 (what SLURM sends before it takes the machine away) ask for a
    stop after the step; a second one stops at once.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self.before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
        for number in self.before:
            signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.trainer.request_stop(number)
        signal.signal(number, self.before[signal.Signals(number)])


def _first_images(data: DataSet, config: Config, device: torch.device) -> Tensor:
    """The first images of the run's order, alike on every rank: uint8 [B,3,R,R]."""
    num = min(LOOKED_AT, sum(data.shard_sizes))
    with DataPipeline(
        data, config.data, global_batch=num, micro_batch=num, seed=config.seed, device=device
    ) as batches:
        images = next(batches).image_u8
        assert images is not None
        return images.clone()  # the pipeline's memory goes with it


def _noise_of(config: Config) -> Callable[[], Tensor]:
    """In place of images, for a run without data: uint8 [B,3,R,R]."""
    size, generator = config.data.resolution, torch.Generator().manual_seed(config.seed)
    shape = (LOOKED_AT, 3, size, size)
    return lambda: torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def _newest_checkpoint(run: Path) -> Path | None:
    """What the first rank finds and verifies; its warnings are lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = newest_checkpoint(run)
    for w in caught:
        print(f"warning: {w.message}", flush=True)
    return found


def _warn_of_changes(run: Path, config: Config) -> None:
    """Name what differs from the configuration this run was started with, where it matters."""
    try:
        before = load_config(run / "config.yaml")
    except ConfigError:
        return
    for key, (old, new) in _differences(before.model_dump(), config.model_dump()):
        if not key.startswith(FREE_KEYS):
            print(f"warning: {key} was {old!r} and is now {new!r}: this run's curve changes")


def _differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in a.keys() | b.keys():
            yield from _differences(a.get(name), b.get(name), f"{key}.{name}".lstrip("."))
    elif a != b:
        yield key, (a, b)


def _program(name: str) -> str:
    """A command of this environment, as it can be typed here: by name where the shell finds it."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _shape(p: Tensor) -> tuple[int, ...]:
    """A parameter's whole shape, also where ZeRO-3 has taken it apart."""
    return tuple(getattr(p, "ds_shape", p.shape))
