"""The Python API, as a notebook uses it: `import fastrepa` has these names.

Every function does what the command of its name does, by the same code. Mistakes are
`FastrepaError`s; no function ends the process or touches its signals. Overrides are a mapping from
dotted keys: {"training.steps": 1000}. Images are numpy uint8 [N,H,W,3].
"""

from __future__ import annotations

import atexit
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrepa import config as configuration
from fastrepa.config import Config, EncoderConfig
from fastrepa.errors import ConfigError, shown

if TYPE_CHECKING:
    import torch

    from fastrepa.commands.evaluate.evaluate import Evaluation
    from fastrepa.commands.prepare.prepare import PrepareReport
    from fastrepa.commands.probe.probe import Probed
    from fastrepa.generation.loading import Loaded
    from fastrepa.runtime.signals import StopSignals

Overrides = Mapping[str, Any]
Labels = Sequence[str | int]
Weights = str | Path
_NO_OVERRIDES: Overrides = {}


def load_config(file: str | Path, overrides: Overrides = _NO_OVERRIDES) -> Config:
    """Load a YAML file, or the configuration of a run's folder, validated and resolved."""
    path = Path(file)
    if path.is_dir():
        return configuration.load_run_config(path, _written(overrides))
    return configuration.load_config(path, _written(overrides))


# Images -----------------------------------------------------------------------------------------


class Model:
    """A trained generator; `fastrepa.load` makes it.

    network: the generator, a torch module in eval mode and float32, on `device`: it maps latents
    x [B,C,h,w], times t [B] (0 data, 1 noise) and labels [B] int64 to velocities [B,C,h,w].
    config: the run's configuration. classes: their names, in the order of their labels. step: steps
    it was trained for. codec: makes images of latents [B,C,h,w].
    """

    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        from fastrepa.vision.codec import build_codec

        self._loaded, self.device, self.ema = loaded, device, loaded.ema
        self.network, self.config = loaded.model, loaded.config
        self.step, self.classes = loaded.state.step, list(loaded.state.classes)
        data = self.config.data
        self.codec = build_codec(data.codec, resolution=data.resolution, device=device)
        self._ready: dict[tuple[str, str], Any] = {}

    def __repr__(self) -> str:
        name = self.config.model.name or f"SiT of width {self.config.model.width}"
        return f"<fastrepa.Model {name}, step {self.step:,}, {len(self.classes)} classes>"

    def sample(
        self,
        labels: Labels | None = None,
        *,
        num: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        guidance_low: float | None = None,
        guidance_high: float | None = None,
        precision: str | None = None,
        compile: str | None = None,
        batch_size: int = 32,
        progress: Callable[[float], None] | None = None,
    ) -> np.ndarray:
        """Draw images, uint8 [N,H,W,3]: the pixels of `fastrepa sample` with the same settings.

        labels: one an image, names of classes or their numbers; by default `num` images of all
        that were trained, in turn. With labels and `num`, the labels take turns. What is None is
        the run's own (`sample` in its configuration). `progress` is told of images made since its
        last call, in fractions of an image.

        Raises ConfigError for a class that is none or was never trained, and a bad setting.
        """
        import torch

        from fastrepa.generation.generate import default_labels, generate
        from fastrepa.generation.loading import draw_options, with_settings
        from fastrepa.generation.sample import chosen_classes

        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is less than 1")
        named = [f"#{label}" if isinstance(label, int) else label for label in _listed(labels)]
        if labels is not None and not named:
            raise ConfigError("labels: none are given; leave them out for all classes in turn")
        config = with_settings(
            self.config,
            {
                "num": num if num is not None or labels is None else len(named),
                "steps": steps, "cfg": guidance, "sampler": sampler, "precision": precision,
                "guidance_low": guidance_low, "guidance_high": guidance_high, "compile": compile,
            },
        )  # fmt: skip
        state = self._loaded.state
        chosen = chosen_classes(named, state, config, option="labels")
        wanted = default_labels(config.sample.num, config.model.num_classes, chosen)
        images = generate(
            self._network_for(config),
            self.codec,
            wanted,
            seed=seed,
            sample_ids=torch.arange(len(wanted)),
            batch_size=min(batch_size, len(wanted)),
            progress=progress,
            **draw_options(config, state),
        )
        return images.permute(0, 2, 3, 1).contiguous().numpy()

    def _network_for(self, config: Config) -> Any:
        """The generator as `sample.precision` and `sample.compile` want it: the network itself, or
        a copy, so that the network stays as it is.
        """
        from fastrepa.generation.loading import ready_to_sample

        settings, training = config.sample, config.training
        bf16 = settings.precision == "bf16" or (settings.precision == "run" and training.bf16)
        if not bf16 and settings.compile == "none":
            return self.network
        key = ("bf16" if bf16 else "fp32", settings.compile)
        if key not in self._ready:
            twin = copy.deepcopy(self.network)
            self._ready[key] = ready_to_sample(twin, settings, training, self.device)
        return self._ready[key]


def load(
    path: str | Path,
    *,
    step: int | str | None = None,
    ema: str | float | None = None,
    device: str | torch.device | None = None,
    codec_weights: Weights | None = None,
    overrides: Overrides = _NO_OVERRIDES,
) -> Model:
    """Load the averaged weights of a run, a checkpoint folder of it or an exported .safetensors.

    step: a number, or "best" by the run's `training.keep_best`; None: the newest. ema: another
    average than the first: 0.999, "sigma_rel=0.05". device: by default the GPU where there is one.
    codec_weights: where the autoencoder lies now, short for "data.codec.weights" in `overrides`.

    Raises CheckpointError, ConfigError and WeightsError, which name what is missing.
    """
    import torch

    from fastrepa.generation.loading import load_generator
    from fastrepa.runtime.world import World

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    wanted = _wanted(step, ema, codec_weights, overrides)
    return Model(load_generator(Path(path), World(), device, wanted), device)


def encode(
    images: Any,
    encoder: str | EncoderConfig,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """Look at images with a frozen encoder: its tokens, float32 [N,T,Z], as alignment sees them.

    images: uint8 [N,R,R,3]. encoder: "NAME[=WEIGHTS][@INPUT]", or a section of the configuration.
    `.mean(1)` of the result is one feature an image.

    Raises ConfigError and WeightsError, and ConfigError for images of another shape.
    """
    import torch

    from fastrepa.vision.features import own_grid_encoder
    from fastrepa.vision.registry import parse_encoders

    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (*array.shape[1:2] * 2, 3):
        raise ConfigError(
            f"images: uint8 [N,R,R,3] expected, got {array.dtype} {list(array.shape)}"
        )
    if isinstance(encoder, str):
        (encoder, *others) = parse_encoders(encoder, "encoder")
        if others:
            raise ConfigError(f"encoder: one is expected, got {len(others) + 1}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network = own_grid_encoder(encoder, array.shape[1], torch.float32, torch.device(device))
    batches = torch.from_numpy(array).permute(0, 3, 1, 2).split(batch_size)
    tokens = [network(batch.contiguous().to(device)).cpu() for batch in batches]
    return torch.cat(tokens).numpy()


# Commands ---------------------------------------------------------------------------------------


def train(config: str | Path | Config, overrides: Overrides = _NO_OVERRIDES) -> Path:
    """Train to the last step, or continue the run; returns its folder, for `load`.

    config: a YAML file, or a configuration. In a notebook or a thread as well: an interrupt of the
    kernel ends it at once, and the same call goes on from the last checkpoint.

    Raises FastrepaError.
    """
    from fastrepa.runtime.world import destroy_world

    if isinstance(config, Config):
        tree = configuration.overridden(config.model_dump(mode="json"), _written(overrides))
        resolved, words = configuration.config_from_dict(tree), ""
    else:
        resolved = configuration.load_config(config, _written(overrides))
        words = configuration.told_of_folder(Path(config), resolved.run)
    # DeepSpeed cannot meet its peers twice in one process: what begins here ends with it.
    atexit.unregister(destroy_world)
    atexit.register(destroy_world)
    run_training(resolved, words=words)
    return Path(resolved.run)


def run_training(
    config: Config,
    *,
    words: str = "",
    dry_run: bool = False,
    signals: StopSignals | None = None,
) -> int:
    """Do what `fastrepa train` does of a configuration; returns what the process exits with.

    words: to say first. signals: what asks for a stop. The group of all ranks stays (collective).
    """
    from fastrepa.runtime.threads import before_torch, others

    before_torch(others)
    from fastrepa.errors import print_error
    from fastrepa.runtime.determinism import make_deterministic, refusals_by_name
    from fastrepa.runtime.exit_codes import LOST
    from fastrepa.runtime.survival import is_of_peers, watched
    from fastrepa.runtime.terminal import say
    from fastrepa.runtime.world import init_world, stated_rank

    make_deterministic(config.deterministic)
    watch = None
    try:
        world = init_world(2 * config.survival.stall_seconds)
        from fastrepa.data.datasets import with_classes
        from fastrepa.training.memory.decision import resolve_memory

        config = resolve_memory(with_classes(config), world)
        if dry_run:
            from fastrepa.commands.dry_run import dry_run as take_one_step
            from fastrepa.commands.dry_run import print_dry_run

            result = take_one_step(config, world)
            if world.is_rank_0:
                print_dry_run(result, config.training.global_batch)
            return 0
        if world.is_rank_0 and words:
            say(words)
        from fastrepa.training.run import Run

        evaluator: Any = None
        if config.evaluation.every:
            from fastrepa.commands.evaluate.during_training import RunEvaluator

            evaluator = RunEvaluator
        with watched(Path(config.run), config.survival, world) as watch, refusals_by_name():
            return Run(config, world, watch.group, evaluator=evaluator).train(watch, signals)
    except RuntimeError as e:
        if watch is not None or not is_of_peers(e):
            raise
        lost = "another rank was lost before the run began; the same command continues"
        print_error(lost, stated_rank())
        return LOST


def evaluate(
    samples: str | Path,
    reference: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    encoders: str | Sequence[EncoderConfig] = (),
    step: int | str | None = None,
    ema: str | float | None = None,
    codec_weights: Weights | None = None,
    overrides: Overrides = _NO_OVERRIDES,
    guidance: float | None = None,
    **options: Any,
) -> Evaluation:
    """Measure how far generated images are from real ones; the numbers are in `.scores`, by name.

    samples, reference: a run, a checkpoint folder or an export (which generates), a folder of
    images, an npz or a data set. encoders: "NAME[=WEIGHTS][@INPUT]", with commas. options: as
    `fastrepa evaluate` has them: num, seed, steps, sampler, batch_size, inception_weights, ...
    What is found of a run's images is kept in RUN/evaluations.jsonl.

    Raises FastrepaError.
    """
    from fastrepa.commands.evaluate.evaluate import evaluate as measure
    from fastrepa.data.datasets import located
    from fastrepa.vision.registry import parse_encoders

    if isinstance(encoders, str):
        encoders = parse_encoders(encoders, "encoders")
    return measure(
        located(samples), located(reference), metrics=metrics, encoders=encoders,
        wanted=_wanted(step, ema, codec_weights, overrides), cfg=guidance, **options,
    )  # fmt: skip


def probe(
    target: str | Path,
    *,
    encoders: str | None = None,
    out: str | Path | None = None,
    held_out: str | Path | None = None,
    overrides: Overrides = _NO_OVERRIDES,
    **options: Any,
) -> Probed:
    """Find out what a run's blocks know, or if an encoder will help on a set of images.

    `.found` has the numbers as arrays, `.record` as JSON, and `.folder` the picture. encoders:
    "NAME[=WEIGHTS][@INPUT]", with commas. options: as `fastrepa probe` has them: num, seed, time,
    resolution, batch_size.

    Raises FastrepaError.
    """
    from fastrepa.commands.probe.probe import probe as measure
    from fastrepa.data.datasets import located

    return measure(
        located(target), encoders=encoders, out=None if out is None else Path(out),
        held_out=None if held_out is None else Path(held_out), overrides=_written(overrides),
        **options,
    )  # fmt: skip


def prepare(
    source: str | Path, out: str | Path, *, resolution: int, **options: Any
) -> PrepareReport:
    """Make the data set `out` from images: class folders, archives, tables, ...

    options: as `fastrepa prepare` has them: image_format, seed, workers, skip_bad, ...
    Raises FastrepaError.
    """
    from fastrepa.commands.prepare.prepare import prepare as make

    return make(source, out, resolution=resolution, **options)


def _wanted(step: Any, ema: Any, codec_weights: Weights | None, overrides: Overrides) -> Any:
    from fastrepa.checkpoint.choice import options_of

    return options_of(
        None if step is None else str(step),
        None if ema is None else str(ema),
        _written(overrides),
        None if codec_weights is None else Path(codec_weights),
    )


def _written(overrides: Overrides) -> list[str]:
    """Return overrides as they are typed; ConfigError for a value that no YAML file holds."""
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f'overrides: a mapping such as {{"training.steps": 100}}, got {shown(overrides)}'
        )
    try:
        return [f"{k}={json.dumps(v, default=_of_a_path)}" for k, v in overrides.items()]
    except (TypeError, ValueError) as e:
        raise ConfigError(f"overrides: {e}") from None


def _of_a_path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{shown(value)} is no value of a configuration")


def _listed(labels: Labels | None) -> list[str | int]:
    if isinstance(labels, str):
        raise ConfigError(f"labels: a list of one label an image, got {shown(labels)}")
    return [] if labels is None else [x if isinstance(x, str) else int(x) for x in labels]
