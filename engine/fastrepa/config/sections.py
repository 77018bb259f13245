"""The sections of a configuration: every key with its type, default and allowed values.

Those of what is learnt from what are in ingredients.py, how it is learnt stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from fastrepa.config.ingredients import (
    AlignmentConfig,
    DataConfig,
    EncoderConfig,
    ModelConfig,
    ObjectiveConfig,
    Section,
    VisionConfig,
)
from fastrepa.config.values import (
    BoolOrAuto,
    NameOrOwn,
    NonNegative,
    NumberOrAuto,
    OwnCode,
    PathText,
    Positive,
    PositiveOrAuto,
    Probability,
    Recompute,
    Text,
)
from fastrepa.errors import shown

if TYPE_CHECKING:
    import torch

MAX_EMAS = 4  # as many as the fused kernel updates in one pass


class OptimizerConfig(Section):
    """AdamW."""

    lr: Annotated[float, Field(gt=0.0)] = Field(
        1e-4, description="learning rate, after the warm-up"
    )
    betas: tuple[Probability, Probability] = Field(
        (0.9, 0.999),
        strict=False,
        description="decay per step of the averages of gradients and of their squares",
    )
    eps: Annotated[float, Field(gt=0.0)] = Field(
        1e-8, description="added to the root of the mean square"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="decoupled, of every weight: its share times lr per step"
    )


class ScheduleConfig(Section):
    """The learning rate over the steps."""

    name: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: half a cosine from lr down to final at training.steps"
    )
    warmup: NonNegative = Field(0, description="steps of linear warm-up, before either shape")
    final: Probability = Field(0.0, description="cosine: the last rate, as a share of lr")
    start: NonNegative = Field(
        0, description="the step where warm-up and shape begin: to train on after a finished cosine"
    )


class EmaConfig(Section):
    """One moving average of the weights; in YAML a decay (`0.9999`) or `{sigma_rel: 0.05}`.

    sigma_rel is the relative standard deviation of EDM2's power-function average (Karras et al.
    2024, section 3.1): how far back it looks, as a share of the training so far.
    """

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="share of the average that a step keeps"
    )
    sigma_rel: Annotated[float, Field(gt=0.0, le=0.28)] | None = Field(
        None, description="how far back a power-function average looks, as a share of the training"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_a_number(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            return {"decay": value}
        if not isinstance(value, Mapping | EmaConfig):
            raise ValueError(
                f"training.ema: {shown(value)} is neither a decay nor {{sigma_rel: 0.05}}"
            )
        return value

    @model_validator(mode="after")
    def _one_of_two(self) -> EmaConfig:
        if (self.decay is None) == (self.sigma_rel is None):
            raise ValueError("training.ema: give a decay such as 0.9999, or {sigma_rel: 0.05}")
        return self

    @model_serializer
    def as_written(self) -> Any:
        return self.decay if self.sigma_rel is None else {"sigma_rel": self.sigma_rel}

    def __str__(self) -> str:
        """Return what the command line calls it: 0.9999, or sigma_rel=0.05."""
        return str(self.decay) if self.sigma_rel is None else f"sigma_rel={self.sigma_rel}"


class LossConfig(Section):
    """A further term of the loss, from a file of one's own; in YAML FILE.py:FUNCTION alone has
    the weight 1. docs/extending.md says what it is given.
    """

    use: OwnCode = Field(description="FILE.py:FUNCTION; a path is relative to the YAML file")
    weight: float = Field(1.0, description="what it is multiplied by in the loss")

    @model_validator(mode="before")
    @classmethod
    def _of_a_text(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value


class KeepBestConfig(Section):
    """The rule of the best checkpoint: a key of metrics.jsonl, as last logged before the save, or
    an evaluation's (`fd_dinov2_vitb14`), whose step is saved where it is the best so far.
    """

    metric: Text = Field(description="as metrics.jsonl calls it")
    mode: Literal["min", "max"] = Field("min", description="whether less or more is better")


class TrainingConfig(Section):
    """Length, portions and precision of the training, and what is written on the way."""

    steps: Positive = Field(400_000, description="updates of the whole run")
    global_batch: Positive = Field(256, description="images per step, over all ranks")
    micro_batch: Positive | None = Field(
        None, description="images per rank per forward; null: no gradient accumulation"
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of weights and activations in a step; the optimiser's are fp32"
    )
    recompute: Recompute = Field(
        "none",
        description="activation checkpointing: none; N: every N-th block keeps its input alone and "
        "runs again in backward; auto: the fewest blocks with which a rank fits into its memory",
    )
    keep: Literal["auto", "none", "h"] = Field(
        "auto",
        description="h: the fused MLP keeps GELU's output for backward instead of making it again "
        "there; auto: where that fits into a rank's memory with nothing recomputed",
    )
    memory_budget_gb: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="what recompute and keep auto may fill per rank, in 1e9 bytes; null: the GPU's "
        "memory; without a GPU nothing is recomputed, and h is not kept",
    )
    compile: Literal["none", "blocks", "graphs"] = Field(
        "none",
        description="blocks: each of the generator's blocks under torch.compile (on a CPU the "
        "whole at once); graphs: the whole, replayed as CUDA graphs; neither with stage 3",
    )
    threads: Positive | None = Field(
        None,
        description="CPU threads of each rank; null: OMP_NUM_THREADS, or what the run had before, "
        "or as the machine's load and a trial of the first steps say",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip: Annotated[float, Field(ge=0.0)] = Field(1.0, description="gradient norm; 0: no clipping")
    ema: tuple[EmaConfig, ...] = Field(
        (EmaConfig(decay=0.9999),),
        strict=False,
        description="one or a list; the first is sampled and evaluated, the others are stored",
    )
    extra_losses: tuple[LossConfig, ...] = Field(
        (), strict=False, description="further terms of the loss, each from a file of one's own"
    )
    log_every: Positive = Field(100, description="steps between lines of metrics.jsonl")
    sample_every: NonNegative = Field(10_000, description="steps between grids; 0: never")
    checkpoint_every: NonNegative = Field(
        50_000, description="steps between checkpoints; 0: at the end only"
    )
    keep_checkpoints: NonNegative = Field(3, description="newest checkpoints kept; 0: all")
    keep_every: NonNegative = Field(
        0, description="checkpoints whose step this divides are kept for ever; 0: none"
    )
    keep_best: KeepBestConfig | None = Field(None, description="the best by a metric is kept too")
    tensorboard: bool = Field(True, description="also log to tensorboard/ in the run's folder")
    wandb: Text | None = Field(None, description="Weights & Biases project; null: off")
    trackio: Text | None = Field(
        None, description="trackio project, on this machine or where TRACKIO_SPACE_ID says"
    )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations in training."""
        import torch  # not for the sake of `fastrepa --help`

        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"

    @property
    def recompute_every(self) -> int:
        """Every how manieth block runs again in backward; 0: none, also while it is auto."""
        return self.recompute if isinstance(self.recompute, int) else 0

    @property
    def keep_h(self) -> bool:
        return self.keep == "h"

    @field_validator("ema", mode="before")
    @classmethod
    def _one_or_a_list(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @field_validator("ema")
    @classmethod
    def _each_once(cls, value: tuple[EmaConfig, ...]) -> tuple[EmaConfig, ...]:
        if not 1 <= len(value) <= MAX_EMAS:
            raise ValueError(f"training.ema: a list of 1 to {MAX_EMAS}, got {len(value)}")
        if twice := [str(e) for i, e in enumerate(value) if e in value[:i]]:
            raise ValueError(f"training.ema: {twice[0]} is there twice")
        return value


class SampleConfig(Section):
    """The grids drawn during training, and the defaults of `fastrepa sample`."""

    num: Positive = Field(64, description="images")
    sampler: Literal["ode", "heun", "sde"] = Field(
        "ode",
        description="ode: Euler's steps; heun: of second order, two evaluations a step; sde: "
        "Euler-Maruyama, with fresh noise",
    )
    steps: Positive = Field(50, description="integration steps from noise to data")
    cfg: Annotated[float, Field(ge=1.0)] = Field(
        1.0, description="scale of classifier-free guidance; 1: none"
    )
    guidance_low: Probability = Field(
        0.0, description="guide from this time on; times are 0 for data and 1 for noise"
    )
    guidance_high: Probability = Field(1.0, description="guide up to this time")
    precision: Literal["run", "fp32", "tf32", "bf16"] = Field(
        "run",
        description="of the network: run is training.precision; tf32 is fp32 with TF32 products on "
        "a GPU, as published. Grids and evaluations of a run in progress are in its own dtype",
    )
    compile: Literal["none", "blocks", "graphs"] = Field(
        "none",
        description="as training.compile, of `fastrepa sample` and `evaluate`, whose first batch "
        "then takes minutes; a run in progress compiles nothing for its samples",
    )


class EvaluationConfig(Section):
    """Metrics of generated images during training, on the first average; `fastrepa evaluate` has
    them all. Sampler, steps and guidance are those of `sample`.
    """

    every: NonNegative = Field(0, description="steps between evaluations; 0: never")
    reference: PathText | None = Field(
        None, description="what `fastrepa evaluate` takes, runs apart; null: the training data"
    )
    num: Positive = Field(1000, description="images generated: the same seeds and labels each time")
    batch_size: Positive = Field(32, description="images per forward")
    metrics: tuple[NameOrOwn, ...] | None = Field(
        None,
        strict=False,
        description="names, or FILE.py:CLASS of one's own; null: the encoders', or Inception's "
        "without any",
    )
    encoders: tuple[EncoderConfig, ...] = Field(
        (), strict=False, description="spaces to measure in, besides Inception's; grid is not used"
    )
    inception_weights: PathText | None = Field(
        None, description="a local file; null: torch-fidelity's, downloaded once"
    )


class ZeroConfig(Section):
    """DeepSpeed's ZeRO, by DeepSpeed's names. What is auto becomes a number when the run starts
    (training/zero/settings.py says which and why), and that number is in the run's config.yaml.
    Sizes are in elements.
    """

    stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="what ranks share out: 0: nothing; 1: the optimiser's states; 2: gradients "
        "too; 3: weights too",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="where masters, Adam's moments and EMA live, and the update runs on CPU"
    )
    nvme_path: PathText | None = Field(None, description="offload nvme: a folder on the local disk")
    offload_parameters: bool = Field(
        False, description="stage 3: the sharded weights live in host memory too"
    )
    overlap_comm: BoolOrAuto = Field("auto", description="send gradients while backward runs")
    reduce_bucket_size: PositiveOrAuto = Field("auto", description="gradients sent at a time")
    allgather_bucket_size: PositiveOrAuto = Field(
        "auto", description="stages 1 and 2: weights gathered at a time after an update"
    )
    prefetch_bucket_size: NumberOrAuto = Field(
        "auto", description="stage 3: weights gathered ahead of their use"
    )
    param_persistence_threshold: NumberOrAuto = Field(
        "auto", description="stage 3: tensors up to this size stay whole on every rank"
    )
    sub_group_size: PositiveOrAuto = Field(
        "auto", description="stage 3: what one pass of the optimiser updates"
    )

    @property
    def offloads(self) -> bool:
        return self.offload != "none"

    @property
    def swaps(self) -> bool:
        return self.offload == "nvme"


class AttentionConfig(Section):
    """The attention of training; fastrepa_kernels/attention/choice.py has the table."""

    backend: Literal[
        "auto", "flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers", "sdpa-cudnn",
        "sdpa-flash", "sdpa-efficient", "math", "math-chunked", "sdpa",
    ] = Field("auto", description="auto: the first of the device's table that works")  # fmt: skip
    require: Literal["any", "flash"] = Field(
        "any", description="flash: anything that is not FlashAttention is an error"
    )


class SurvivalConfig(Section):
    """The times after which a run that is in trouble says so, and stops."""

    timeout_seconds: Annotated[float, Field(gt=0.0)] = Field(
        60.0, description="within this time of a rank's loss the run has ended on all others"
    )
    stall_seconds: Annotated[float, Field(gt=0.0)] = Field(
        900.0, description="a step that takes longer is reported with every rank's stack"
    )
    bad_steps: Positive = Field(
        10, description="steps in a row whose loss or gradients are not finite that end the run"
    )
    loss_spike: Annotated[float, Field(ge=0.0)] = Field(
        6.0, description="warn of a logged loss this many deviations above the last; 0: never"
    )


class Config(Section):
    """The whole configuration of a run."""

    run: PathText = Field(description="the run's folder, made when it begins")
    seed: NonNegative = Field(
        0, description="of first weights, order of the samples, noise, times and dropped labels"
    )
    data: DataConfig
    vision: VisionConfig = VisionConfig()
    model: ModelConfig
    alignment: AlignmentConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    sample: SampleConfig = SampleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    zero: ZeroConfig = ZeroConfig()
    survival: SurvivalConfig = SurvivalConfig()
    kernels: Literal["fused", "eager"] = Field(
        "fused", description="fused: those of fastrepa_kernels; eager: plain torch, the same maths"
    )
    attention: AttentionConfig = AttentionConfig()
    deterministic: bool = Field(
        False, description="two runs on the same hardware and ranks end with the same bits"
    )

    @property
    def fused(self) -> bool:
        return self.kernels == "fused"

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        a, s, t = self.alignment, self.sample, self.training
        if t.schedule.start >= t.steps:
            raise ValueError(
                f"training.schedule.start: {t.schedule.start} is not before "
                f"training.steps {t.steps}"
            )
        if s.guidance_low > s.guidance_high:
            raise ValueError(
                f"sample.guidance_low: {s.guidance_low} is above "
                f"sample.guidance_high {s.guidance_high}"
            )
        if s.cfg > 1 and self.model.label_dropout == 0:
            raise ValueError(
                f"sample.cfg: {s.cfg} needs a null class, and model.label_dropout 0 never trains it"
            )
        if t.micro_batch and t.global_batch % t.micro_batch:
            raise ValueError(
                f"training.micro_batch: {t.micro_batch} does not divide "
                f"training.global_batch {t.global_batch}"
            )
        z = self.zero
        if z.offloads and z.stage == 0:
            raise ValueError(
                f"zero.offload: {z.offload!r} needs zero.stage 1, 2 or 3; stage 0 shards nothing"
            )
        if z.swaps and z.stage != 3:
            raise ValueError(
                f"zero.offload: 'nvme' needs zero.stage 3, got {z.stage}; stages 1 and 2 can 'cpu'"
            )
        if z.swaps and not z.nvme_path:
            raise ValueError("zero.nvme_path: zero.offload 'nvme' needs a folder on a local disk")
        if z.offload_parameters and (z.stage != 3 or not z.offloads):
            raise ValueError(
                f"zero.offload_parameters: needs zero.stage 3 and zero.offload cpu or nvme, got "
                f"stage {z.stage} and {z.offload!r}"
            )
        if self.data.must_cache_latents and not self.data.codec.is_autoencoder:
            raise ValueError(
                "data.latents: 'cached' needs data.codec.name sd-vae; pixels are not stored apart"
            )
        if self.deterministic and self.data.decode == "mixed":
            raise ValueError(
                "data.decode: 'mixed' shares a batch out between the GPU's decoders; "
                "deterministic: true needs 'cpu', which 'auto' then takes"
            )
        if self.deterministic and self.attention.backend == "sdpa-cudnn":
            raise ValueError(
                "attention.backend: 'sdpa-cudnn' has no deterministic backward; "
                "deterministic: true needs 'auto' or another one"
            )
        if t.compile != "none" and self.zero.stage == 3:
            # Stage 3 gathers weights in hooks of the block's children, which break its graph.
            raise ValueError(f"training.compile: {t.compile!r} needs zero.stage 0, 1 or 2, got 3")
        depth = self.model.depth
        if self.vision.encoders and a.block > depth:
            raise ValueError(f"alignment.block: {a.block} is past the last block, {depth}")
        return self
