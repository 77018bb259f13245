"""A run: built from its configuration, continued from its newest checkpoint, trained to its end."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fastrepa.checkpoint.averages import recorded
from fastrepa.checkpoint.format import (
    RunState,
    checkpoint_path,
    improves,
    newest_checkpoint,
    read_state,
)
from fastrepa.checkpoint.identity import check_classes, trained_classes
from fastrepa.checkpoint.writer import CheckpointWriter
from fastrepa.config import Config, DataConfig, own_files, save_config
from fastrepa.data.datasets import DataSet, keep_blocks, open_data
from fastrepa.data.pipeline import DataPipeline
from fastrepa.data.reader import RankBatches
from fastrepa.errors import ConfigError, DataError, GivenUp, TrainingError
from fastrepa.generation.pictures import save_curves, save_grid
from fastrepa.model.attention import attention_record, slow_attention
from fastrepa.runtime.determinism import NOT_ON_A_GPU, make_deterministic
from fastrepa.runtime.exit_codes import REQUEUE
from fastrepa.runtime.regions import SAMPLING
from fastrepa.runtime.survival import Watch, host_group_of
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import World, of_rank_0
from fastrepa.training.bad_steps import Spikes
from fastrepa.training.evaluation import Evaluations, MakeEvaluator
from fastrepa.training.inputs import build_inputs
from fastrepa.training.look_ahead import Batches
from fastrepa.training.messages import (
    farewell,
    first_line,
    slow_precision,
    untrained_classes,
    warn_of_changes,
    warn_of_other_samples,
)
from fastrepa.training.meters import image_flops
from fastrepa.training.schedule import learning_rate
from fastrepa.training.telemetry import Telemetry, versions
from fastrepa.training.trainer import Trainer, check_run
from fastrepa.training.zero.engine import grad_norm

if TYPE_CHECKING:
    from fastrepa.runtime.signals import StopSignals
    from fastrepa.runtime.threads import Threads


class Run:
    """A trainer with its data, checkpoints, evaluations and what it leaves in its folder.

    `evaluator` makes what `evaluation` in the configuration asks for.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        host_group: Any = None,
        *,
        evaluator: MakeEvaluator | None = None,
    ) -> None:
        make_deterministic(config.deterministic)
        check_run(config, world)  # what fails cheaply comes first
        # Small questions between hosts go over gloo, which does not make a GPU wait.
        self.host_group = host_group or host_group_of(config.survival)
        self.world, self.folder = world, Path(config.run)
        self.data = data = _open_data(config.data, config.model.num_classes)
        self.drawn = [number for number, size in enumerate(data.class_sizes) if size]
        self.data_digest = data.digest
        self.resumed_from = of_rank_0(world, lambda: _newest_checkpoint(self.folder))
        self.before = None if self.resumed_from is None else read_state(self.resumed_from)
        if self.before is not None:
            check_classes(self.before, data)
        inputs = build_inputs(config, world, data)
        measured = None
        if config.evaluation.every and evaluator:
            measured = evaluator(config, world, inputs.codec, data.classes, self.drawn)
        self.evaluations = Evaluations(config, world, inputs.codec, measured)
        self.trainer = Trainer(config, world, inputs=inputs, checkpoint=self.resumed_from)
        self.config = self.trainer.config
        self.metrics: dict[str, float] = {}  # the last logged line
        self.writer: CheckpointWriter | None = None  # made when training begins
        self._signals: StopSignals | None = None
        self._stopped_by = 0  # the number of a signal, of any rank
        self.threads: Threads | None = None  # chosen when training begins

    @property
    def step(self) -> int:
        """Steps that have been taken."""
        return self.trainer.step

    def train(self, watch: Watch, signals: StopSignals | None = None) -> int:
        """Train to the last step, or to the one under way when `signals` ask for a stop; returns 0,
        or what the process exits with: 130 after SIGINT, after the others REQUEUE (75), which the
        launch files start again.
        """
        config, world = self.config, self.world
        if config.evaluation.every and self.evaluations.evaluator is None:
            raise ConfigError("evaluation.every: this run was given nothing to evaluate with")
        if world.is_rank_0:
            warn_of_changes(self.folder, config, self.step)
            if self.before is not None:
                warn_of_other_samples(self.before, self.data)
            if own := own_files(config):
                from fastrepa.reading.own_code import keep_copies

                for words in keep_copies(self.folder, own):
                    say(f"warning: {words}")
            save_config(config, self.folder / "config.yaml")
        ran = attention_record(config.attention, self.trainer.attention)
        with Telemetry(
            self.folder, config, start_step=self.step, active=world.is_rank_0, environment=ran
        ) as telemetry:
            telemetry.say(first_line(self.trainer, self._choose_threads().why))
            slow = (
                slow_attention(self.trainer.attention, world.device),
                slow_precision(config.training, world),
            )
            for words in filter(None, slow):
                telemetry.warn(words)
            if config.deterministic and world.device.type == "cuda":
                telemetry.say(NOT_ON_A_GPU)
            if self.resumed_from:
                for line in (
                    f"continuing {self.folder} from step {self.step}",
                    *self.trainer.resume_notes,
                ):
                    telemetry.say(line)
            for line in self.evaluations.first_words():
                telemetry.warn(line)
            if untrained := untrained_classes(self.data, self.trained, config.model.num_classes):
                telemetry.say(untrained)
            if self.step >= config.training.steps:
                telemetry.say(
                    f"{self.folder} is finished already: to go on, raise training.steps; "
                    f"to start again, name another run"
                )
                self._take_leave(telemetry)
                return 0
            if world.is_rank_0:
                self.trainer.meter.flops = image_flops(
                    config, world.device, cached_latents=self.trainer.cached_latents
                )
            with self.open_pipeline() as batches, watch.guard():
                if signals is not None:
                    self._signals, signals.saves = signals, True
                self._loop(batches, telemetry, watch)
            telemetry.end_bar()
            self._draw_curves(telemetry)
            if self._stopped_by:
                telemetry.say(f"stopped at step {self.step}, saved; the same command continues")
                return 128 + signal.SIGINT if self._stopped_by == signal.SIGINT else REQUEUE
            self._take_leave(telemetry)
        return 0

    def _choose_threads(self) -> Threads:
        from fastrepa.runtime.threads import choose_threads

        self.threads = choose_threads(
            self.world,
            self.config.training.threads,
            self.before.threads if self.before else 0,
            deterministic=self.config.deterministic,
        )
        return self.threads

    def open_pipeline(self) -> DataPipeline:
        """The run's batches on this rank, from its step on."""
        return DataPipeline(
            self.data,
            self.config.data,
            global_batch=self.config.training.global_batch,
            micro_batch=self.trainer.micro,
            rank=self.world.rank,
            world=self.world.size,
            seed=self.config.seed,
            start_step=self.step,
            device=self.world.device,
            image=not self.trainer.cached_latents or self.trainer.targets.need_images,
            moments=self.trainer.cached_latents,
            features=self.trainer.targets.columns,
        )

    def _take_leave(self, telemetry: Telemetry) -> None:
        if lines := telemetry.history():
            telemetry.say(*farewell(self.config, self.step, lines[-1]))

    def _loop(self, batches: Batches, telemetry: Telemetry, watch: Watch) -> None:
        t, writer = self.config.training, self._open_writer()
        threads = self.threads or self._choose_threads()
        switched: dict[str, float] = {}  # for the next line of metrics
        telemetry.start(self.step)
        meter = self.trainer.meter
        meter.reset()
        earlier = [line["loss"] for line in telemetry.history() if "loss" in line]
        spikes = Spikes(self.config.survival.loss_spike, earlier)
        skipped = self.step - self.trainer.whole.optimizer_step
        while self.step < t.steps:
            watch.progress(self.step)
            stop = self._ask_to_stop()
            began = time.perf_counter()
            metrics = self.trainer.train_step(batches)
            threads.took(time.perf_counter() - began)
            meter.add(metrics)
            telemetry.advance(self.step)
            last = stop() or self.step == t.steps
            if news := threads.take_news():
                telemetry.warn(f"step {self.step}: {news}")
                switched = {"threads": threads.wanted}
            if last:
                self._give_up_if_bad()
            evaluated = self.evaluations.due(self.step) and not self._stopped_by
            if self.step % t.log_every == 0 or last or evaluated:
                rate = learning_rate(self.config.training, self.step - 1)
                read = meter.read(self.step, rate, grad_norm(self.trainer.engine))
                before, skipped = skipped, self.step - self.trainer.whole.optimizer_step
                self.metrics = {**read, "skipped_steps": skipped, **switched}
                switched = {}
                if evaluated:
                    with meter.region(SAMPLING):
                        last = self._evaluate(telemetry, watch) or last
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
                    if not last:  # then they are drawn when all is saved
                        self._draw_curves(telemetry)
            due = last or (t.checkpoint_every and self.step % t.checkpoint_every == 0)
            with meter.region("checkpoint"):
                if due or self._is_best():
                    self.save(wait=last)
                else:
                    writer.poll()
            if last:
                return

    def save(self, *, wait: bool = False) -> Path:
        """Start to write a checkpoint of this step, or write it whole and `wait` (collective).

        Raises CheckpointError where it cannot be written and `wait` is set; otherwise that is a
        warning at a later step. While steps are bad it is written and replaces none.
        """
        writer = self._open_writer()
        measured = not self.config.evaluation.every or bool(self.evaluations.at(self.step))
        writer.save(self.state(), self.trainer.bad_steps.count, measured=measured)
        if wait:
            writer.wait(required=True)
        return checkpoint_path(self.folder, self.step)

    def _is_best(self) -> bool:
        """Tell whether this step's evaluation is the best so far by training.keep_best, going by
        what is saved, so that a run that was cut off decides as one that was not (collective).
        """
        rule, scores = self.config.training.keep_best, self.evaluations.at(self.step)
        if rule is None or rule.metric not in scores:
            return False
        self._open_writer().wait()  # the one in flight may be better
        return of_rank_0(self.world, lambda: improves(self.folder, self.step, scores, rule))

    def _open_writer(self) -> CheckpointWriter:
        if self.writer is None:
            self.writer = CheckpointWriter(
                self.folder,
                self.trainer.whole,
                self.trainer.fixed,
                self.world,
                self.host_group,
                self.config.training,
                good=self.resumed_from,
            )
        return self.writer

    def state(self) -> RunState:
        return RunState(
            step=self.step,
            optimizer_step=self.trainer.whole.optimizer_step,
            samples_seen=self.step * self.config.training.global_batch,
            side=self.trainer.codec.side,
            channels=self.trainer.codec.channels,
            encoder_widths=self.trainer.targets.widths,
            classes=self.data.classes,
            world_size=self.world.size,
            versions=versions(),
            metrics=self.metrics | self.evaluations.at(self.step),
            emas=recorded(self.config.training.ema),
            ema_since=self.trainer.optimizer.ema_since,
            trained=self.trained,
            num_samples=self.data.num_samples,
            data_digest=self.data_digest,
            threads=self.threads.count if self.threads and self.threads.why else 0,
        )

    @property
    def trained(self) -> list[int]:
        """Numbers of the classes that have had images, in this process or before."""
        before = (
            []
            if self.before is None
            else trained_classes(self.before, self.config.model.num_classes)
        )
        return sorted({*before, *self.drawn})

    def _evaluate(self, telemetry: Telemetry, watch: Watch) -> bool:
        """Metrics of the averaged weights; training.keep_best may go by them. True where a signal
        has come meanwhile, for which they are given up (collective).
        """

        def alive() -> None:
            watch.progress(self.step)
            if self._signals and self._signals.asked:
                raise GivenUp(self._signals.asked)

        try:
            scores = self.evaluations.measure(
                self.step, self.trainer.whole, self.trainer.fixed, alive=alive, warn=telemetry.warn
            )
        except GivenUp as e:
            (self._stopped_by,) = e.args
            telemetry.say(f"step {self.step}: the evaluation is given up for the signal")
            return True
        figures = " · ".join(f"{name} {value:.5g}" for name, value in scores.items())
        if figures:
            telemetry.say(f"step {self.step}, {self.config.evaluation.num:,} images: {figures}")
        return False

    def _draw_samples(self, telemetry: Telemetry) -> None:
        """Write the grid of this step: samples/step_*.png (collective)."""
        from fastrepa.generation.generate import default_labels
        from fastrepa.training.grids import draw_grid

        what, num = f"step {self.step}: drawing samples", self.config.sample.num
        with telemetry.counting(what, num) as progress:
            grid = draw_grid(self.trainer, self.drawn, telemetry.warn, progress)
        if grid is not None:
            classes = self.data.classes
            names = [classes[c] for c in default_labels(num, len(classes), self.drawn).tolist()]
            path = self.folder / "samples" / f"step_{self.step:07d}.png"
            with telemetry.dispensable(f"samples/{path.name}"):
                path.parent.mkdir(exist_ok=True)
                save_grid(grid, path, names=names)
                telemetry.picture("samples", path, self.step)

    def _draw_curves(self, telemetry: Telemetry) -> None:
        if lines := telemetry.history():
            with telemetry.dispensable("curves.png"):
                save_curves(lines, self.folder / "curves.png")

    # Stopping ---------------------------------------------------------------------------------

    def _ask_to_stop(self) -> Callable[[], bool]:
        """Ask all ranks, while the step runs, whether any was told to stop; call for the answer."""
        asked = self._signals.asked if self._signals else 0
        wanted = self.threads.wanted if self.threads and self.threads.free else 0
        flag = torch.tensor([asked, self.trainer.bad_steps.seen, wanted])
        work: Any = dist.all_reduce(
            flag, op=dist.ReduceOp.MAX, group=self.host_group, async_op=True
        )

        def answer() -> bool:
            with self.trainer.meter.region("communication"):
                work.wait()
            self._stopped_by, bad, wanted = flag.tolist()
            if self.threads:
                self.threads.follow(wanted)
            if self.world.device.type == "cpu":  # this step's own, alike on all ranks
                bad = self.trainer.bad_steps.seen
            if bad >= self.config.survival.bad_steps:
                self._give_up_if_bad()
            return self._stopped_by > 0

        return answer

    def _give_up_if_bad(self) -> None:
        """Stop with a diagnosis where too many steps in a row were bad (collective)."""
        in_row = self.trainer.bad_steps.in_row()
        if in_row >= self.config.survival.bad_steps:
            self._open_writer().wait()  # a save in flight may be the last good one
            raise self._diagnosis(in_row)

    def _diagnosis(self, in_row: int) -> TrainingError:
        """Say what is not finite in the last step, which is repeated for it (collective)."""
        from fastrepa.training.diagnosis import SampleNames, diagnosis

        step = self.step
        names = SampleNames(
            self.data,
            self.config.data,
            RankBatches(
                self.config.training.global_batch,
                self.trainer.micro,
                self.world.rank,
                self.world.size,
            ),
            seed=self.config.seed,
            cached_latents=self.trainer.cached_latents,
        )
        return diagnosis(
            self.trainer.engine.module,
            self.trainer.repeats(),
            lambda forward: names.of(step, forward),
            run=self.folder,
            step=step,
            in_row=in_row,
            good=self._open_writer().good,
            world=self.world,
            group=self.host_group,
        )


def _open_data(config: DataConfig, num_classes: int) -> DataSet:
    keep_blocks(config)
    data = open_data(config.path, resolution=config.resolution)
    if len(data.classes) > num_classes:
        raise DataError(
            f"{config.path}: holds {len(data.classes)} classes, model.num_classes is "
            f"{num_classes}; model.num_classes=auto takes the set's number"
        )
    return data


def _newest_checkpoint(run: Path) -> Path | None:
    """Find and verify it, on the first rank; warnings are lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = newest_checkpoint(run)
    for w in caught:
        say(f"warning: {w.message}")
    return found
