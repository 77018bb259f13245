"""The sections of a configuration: every key with its type, default and allowed values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from fastrepa.config.values import (
    BoolOrAuto,
    NonNegative,
    NumberOrAuto,
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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class CodecConfig(_Section):
    """Makes of an image what the generator sees: pixels in [-1, 1] or autoencoder latents."""

    name: Literal["pixel", "sd-vae"] = "sd-vae"
    weights: PathText = Field(
        "stabilityai/sd-vae-ft-mse", description="sd-vae: hub id or local folder"
    )
    side: Positive | None = Field(None, description="pixel: side the image is averaged down to")

    @property
    def is_autoencoder(self) -> bool:
        return self.name == "sd-vae"


class DataConfig(_Section):
    """A data set (made by `fastrepa prepare`, or in the reference's layout) and how it is read."""

    path: PathText
    resolution: Positive = 256
    codec: CodecConfig = CodecConfig()
    latents: Literal["auto", "online", "cached"] = Field(
        "auto", description="sd-vae: from the set's moments, or encoded in training; auto: if there"
    )
    decode: Literal["auto", "cpu", "mixed"] = "auto"
    readers: Positive = Field(8, description="threads that read per rank")
    read_ahead: Positive = Field(4, description="batches being read")
    prefetch: Positive = Field(2, description="batches DALI keeps ready")
    window: Positive = Field(8, description="shards whose samples are shuffled together")
    flip: bool = Field(
        False, description="mirror half of the samples, one draw per step and sample"
    )
    remainder: Literal["include", "drop"] = Field(
        "include",
        description="what an epoch's samples beyond the last whole batch do: join the next epoch's "
        "first, or are left out",
    )

    @property
    def must_cache_latents(self) -> bool:
        return self.latents == "cached"


class EncoderConfig(_Section):
    """One frozen encoder: a registry name or any timm model, and where its weights come from."""

    name: Text
    weights: PathText = Field(
        "hub", description="hub | random | package:NAME | a local .safetensors/.pth file"
    )
    input: Positive | None = Field(None, description="side of the encoder's input in pixels")
    grid: Literal["exact", "area", "bilinear"] = Field(
        "exact", description="how features are brought to the generator's token grid"
    )
    spatial_norm: Probability = Field(
        0.0,
        description="share of an image's mean token that is taken off, before each channel is "
        "divided by its deviation over the image (iREPA); 0: tokens as they are",
    )


class VisionConfig(_Section):
    encoders: tuple[EncoderConfig, ...] = Field((), strict=False)
    targets: Literal["online", "cached"] = Field(
        "online", description="cached: from the data set's feature columns, no encoder in training"
    )
    look_ahead: BoolOrAuto = Field(
        "auto",
        description="make the next batch's targets on a stream of their own while this batch's "
        "backward runs; auto: on a GPU, for targets that are online",
    )
    precision: Literal["run", "fp8"] = Field(
        "run",
        description="of the encoders: the run's, or products in e4m3 (from compute capability 8.9 "
        "on), refused where features would be less than 0.999 alike",
    )
    compile: Literal["none", "graphs"] = Field(
        "none", description="graphs: the encoders compiled, and replayed as CUDA graphs"
    )

    @property
    def cached_targets(self) -> bool:
        return self.targets == "cached"


class ModelConfig(_Section):
    """SiT by name ("SiT-XL/2") or by width, depth, heads and patch, which a name gives."""

    name: Text | None = None
    width: Positive
    depth: Positive
    heads: Positive
    patch: Positive
    num_classes: Positive = 1000
    label_dropout: Probability = 0.1
    qk_norm: bool = False


class AlignmentConfig(_Section):
    """REPA's alignment: of which block, through which projector, how strongly."""

    weight: Annotated[float, Field(ge=0.0)] = 0.5
    block: Positive = Field(description="1-based; if not given: 4 for S/B, 8 for L/XL")
    projector_width: Positive = 2048


class ObjectiveConfig(_Section):
    path: Literal["linear", "cosine"] = "linear"
    prediction: Literal["velocity", "data"] = Field(
        "velocity",
        description="what the last layer's output means; 'data' is easier to learn in pixel space",
    )
    time: Literal["uniform", "lognormal"] = "uniform"
    time_mean: float = Field(0.0, description="lognormal: mean of log(noise / signal)")
    time_std: Annotated[float, Field(gt=0.0)] = Field(1.0, description="lognormal: its deviation")


class OptimizerConfig(_Section):
    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    betas: tuple[Probability, Probability] = Field((0.9, 0.999), strict=False)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0


class ScheduleConfig(_Section):
    name: Literal["constant", "cosine"] = "constant"
    warmup: NonNegative = Field(0, description="steps of linear warm-up, before either shape")
    final: Probability = Field(0.0, description="cosine: the last rate, as a share of lr")


class EmaConfig(_Section):
    """One moving average of the weights; in YAML a decay (`0.9999`) or `{sigma_rel: 0.05}`.

    sigma_rel is the relative standard deviation of EDM2's power-function average (Karras et al.
    2024, section 3.1): how far back it looks, as a share of the training so far.
    """

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    sigma_rel: Annotated[float, Field(gt=0.0, le=0.28)] | None = None

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


class KeepBestConfig(_Section):
    """The rule of the best checkpoint: a key of metrics.jsonl, as last logged before the save, or
    an evaluation's (`fd_dinov2_vitb14`) of the saved step itself.
    """

    metric: Text
    mode: Literal["min", "max"] = "min"


class TrainingConfig(_Section):
    steps: Positive = 400_000
    global_batch: Positive = 256
    micro_batch: Positive | None = Field(
        None, description="images per rank per forward; None: no gradient accumulation"
    )
    precision: Literal["bf16", "fp32"] = "bf16"
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
        description="what recompute and keep auto may fill per rank, in 1e9 bytes; None: the GPU's "
        "memory; without a GPU nothing is recomputed, and h is not kept",
    )
    compile: Literal["none", "blocks", "graphs"] = Field(
        "none",
        description="blocks: each of the generator's blocks under torch.compile (on a CPU the "
        "whole at once); graphs: the whole, replayed as CUDA graphs; neither with stage 3",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip: Annotated[float, Field(ge=0.0)] = Field(1.0, description="gradient norm; 0: no clipping")
    ema: tuple[EmaConfig, ...] = Field(
        (EmaConfig(decay=0.9999),),
        strict=False,
        description="one or a list; the first is sampled and evaluated, the others are stored",
    )
    log_every: Positive = 100
    sample_every: NonNegative = Field(10_000, description="0: never")
    checkpoint_every: NonNegative = Field(50_000, description="0: at the end only")
    keep_checkpoints: NonNegative = Field(3, description="newest kept; 0: all")
    keep_every: NonNegative = Field(0, description="kept for ever where this divides the step")
    keep_best: KeepBestConfig | None = Field(None, description="the best by a metric is kept too")
    tensorboard: bool = True
    wandb: Text | None = Field(None, description="Weights & Biases project; None: off")

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


class SampleConfig(_Section):
    """The grids drawn during training, and the defaults of `fastrepa sample`."""

    num: Positive = 64
    sampler: Literal["ode", "heun", "sde"] = "ode"
    steps: Positive = 50
    cfg: Annotated[float, Field(ge=1.0)] = 1.0
    guidance_low: Probability = 0.0
    guidance_high: Probability = 1.0
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


class EvaluationConfig(_Section):
    """Metrics of generated images during training, on the first average; `fastrepa evaluate` has
    them all. Sampler, steps and guidance are those of `sample`.
    """

    every: NonNegative = Field(0, description="steps between evaluations; 0: never")
    reference: PathText | None = Field(
        None, description="what `fastrepa evaluate` takes, runs apart; None: the training data"
    )
    num: Positive = Field(1000, description="images generated: the same seeds and labels each time")
    batch_size: Positive = Field(32, description="images per forward")
    metrics: tuple[Text, ...] | None = Field(
        None, strict=False, description="None: the encoders', or Inception's without any"
    )
    encoders: tuple[EncoderConfig, ...] = Field(
        (), strict=False, description="spaces to measure in, besides Inception's; grid is not used"
    )
    inception_weights: PathText | None = Field(
        None, description="a local file; None: torch-fidelity's, downloaded once"
    )


class ZeroConfig(_Section):
    """DeepSpeed's ZeRO, by DeepSpeed's names. What is auto becomes a number when the run starts
    (training/zero/settings.py says which and why), and that number is in the run's config.yaml.
    Sizes are in elements.
    """

    stage: Literal[0, 1, 2, 3] = 1
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


class AttentionConfig(_Section):
    """The attention of training; fastrepa_kernels/attention/choice.py has the table."""

    backend: Literal[
        "auto", "flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers", "sdpa-cudnn",
        "sdpa-flash", "sdpa-efficient", "math", "math-chunked", "sdpa",
    ] = Field("auto", description="auto: the first of the device's table that works")  # fmt: skip
    require: Literal["any", "flash"] = Field(
        "any", description="flash: anything that is not FlashAttention is an error"
    )


class SurvivalConfig(_Section):
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


class Config(_Section):
    """The whole configuration of a run."""

    run: PathText
    seed: NonNegative = 0
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
    kernels: Literal["fused", "eager"] = "fused"
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
