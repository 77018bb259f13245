"""One typed, validated configuration: a YAML file, then dotted overrides (`training.steps=1000`).

Every model is frozen and forbids unknown keys. `load_config` fills in what follows from other keys
(a model's width from its name, the alignment block from its depth), so that the configuration saved
with a run says everything that was used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fastrepa.errors import ConfigError, nearest

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


def _number_or(least: int, *words: str) -> PlainValidator:
    """Accepts a whole number from `least` on, or one of the words; one refusal says both."""

    def check(value: Any) -> Any:
        if (_is_int(value) and value >= least) or value in words:
            return value
        allowed = f"expected {' or '.join(words)} or a number from {least}"
        raise PydanticCustomError("number_or_word", "{allowed}", {"allowed": allowed})

    return PlainValidator(check)


def _bool_or_auto(value: Any) -> Any:
    if isinstance(value, bool) or value == "auto":
        return value
    raise PydanticCustomError("bool_or_auto", "expected true, false or auto")


NumberOrAuto = Annotated[int | Literal["auto"], _number_or(0, "auto")]
PositiveOrAuto = Annotated[int | Literal["auto"], _number_or(1, "auto")]
BoolOrAuto = Annotated[bool | Literal["auto"], PlainValidator(_bool_or_auto)]
Recompute = Annotated[int | Literal["none", "auto"], _number_or(1, "none", "auto")]

# REPA_SPEC "Generator": width, depth, heads, and the block that is aligned (1-based).
SIT_MODELS: dict[str, tuple[int, int, int, int]] = {
    "SiT-S": (384, 12, 6, 4),
    "SiT-B": (768, 12, 12, 4),
    "SiT-L": (1024, 24, 16, 8),
    "SiT-XL": (1152, 28, 16, 8),
}
PATCHES = (2, 4, 8)
MAX_EMAS = 4  # as many as the fused kernel updates in one pass


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CodecConfig(_Section):
    """How an image becomes what the generator sees: pixels in [-1, 1] or autoencoder latents."""

    name: Literal["pixel", "sd-vae"] = "sd-vae"
    weights: str = Field("stabilityai/sd-vae-ft-mse", description="sd-vae: hub id or local folder")
    side: Positive | None = Field(None, description="pixel: side the image is averaged down to")


class DataConfig(_Section):
    """A data set (made by `fastrepa prepare`, or in the reference's layout) and how it is read."""

    path: str
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


class EncoderConfig(_Section):
    """One frozen encoder: a registry name or any timm model, and where its weights come from."""

    name: str
    weights: str = Field(
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


class ModelConfig(_Section):
    """SiT by name ("SiT-XL/2") or by width, depth, heads and patch."""

    name: str | None = None
    width: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    patch: Positive | None = None
    num_classes: Positive = 1000
    label_dropout: Probability = 0.1
    qk_norm: bool = False


class AlignmentConfig(_Section):
    """REPA: which block, through which projector, how strongly."""

    weight: Annotated[float, Field(ge=0.0)] = 0.5
    block: Positive | None = Field(None, description="1-based; None: 4 for S/B, 8 for L/XL")
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
            raise ValueError(f"training.ema: {value!r} is neither a decay nor {{sigma_rel: 0.05}}")
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
        """As the command line names it: 0.9999, or sigma_rel=0.05."""
        return str(self.decay) if self.sigma_rel is None else f"sigma_rel={self.sigma_rel}"


class KeepBestConfig(_Section):
    """Which checkpoint is the best: by a key of metrics.jsonl, as last logged before the save, or
    by an evaluation's (`fd_dinov2_vitb14`) of the saved step itself.
    """

    metric: str
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
    wandb: str | None = Field(None, description="Weights & Biases project; None: off")

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
    reference: str | None = Field(
        None, description="what `fastrepa evaluate` takes, runs apart; None: the training data"
    )
    num: Positive = Field(1000, description="images generated: the same seeds and labels each time")
    batch_size: Positive = Field(32, description="images per forward")
    metrics: tuple[str, ...] | None = Field(
        None, strict=False, description="None: the encoders', or Inception's without any"
    )
    encoders: tuple[EncoderConfig, ...] = Field(
        (), strict=False, description="spaces to measure in, besides Inception's; grid is not used"
    )
    inception_weights: str | None = Field(
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
    nvme_path: str | None = Field(None, description="offload nvme: a folder on the local disk")
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


class AttentionConfig(_Section):
    """Which attention computes the training's; fastrepa_kernels/attention.py has the table."""

    backend: Literal[
        "auto",
        "flash-attn-2",
        "flash-attn-3",
        "flash-attn-4",
        "xformers",
        "sdpa-cudnn",
        "sdpa-flash",
        "sdpa-efficient",
        "math",
        "math-chunked",
        "sdpa",
    ] = Field("auto", description="auto: the first of the device's table that works")
    require: Literal["any", "flash"] = Field(
        "any", description="flash: anything that is not FlashAttention is an error"
    )


class SurvivalConfig(_Section):
    """When a run that is in trouble says so, and when it stops."""

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

    run: str
    seed: NonNegative = 0
    data: DataConfig
    vision: VisionConfig = VisionConfig()
    model: ModelConfig
    alignment: AlignmentConfig = AlignmentConfig()
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
        if z.offload != "none" and z.stage == 0:
            raise ValueError(
                f"zero.offload: {z.offload!r} needs zero.stage 1, 2 or 3; stage 0 shards nothing"
            )
        if z.offload == "nvme" and z.stage != 3:
            raise ValueError(
                f"zero.offload: 'nvme' needs zero.stage 3, got {z.stage}; stages 1 and 2 can 'cpu'"
            )
        if z.offload == "nvme" and not z.nvme_path:
            raise ValueError("zero.nvme_path: zero.offload 'nvme' needs a folder on a local disk")
        if z.offload_parameters and (z.stage != 3 or z.offload == "none"):
            raise ValueError(
                f"zero.offload_parameters: needs zero.stage 3 and zero.offload cpu or nvme, got "
                f"stage {z.stage} and {z.offload!r}"
            )
        if self.data.latents == "cached" and self.data.codec.name == "pixel":
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
        if a.block and depth and self.vision.encoders and a.block > depth:
            raise ValueError(f"alignment.block: {a.block} is past the last block, {depth}")
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; people who write configurations mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The validated, resolved configuration from a YAML file and `path.to.key=value` overrides.

    Raises ConfigError naming the file or the dotted key, the value, and what was allowed.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        known = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(
            f"{path}: no such configuration file{nearest(path.name, known)}"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a YAML file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read ({e})") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, got {_kind(tree)}")
    for override in overrides:
        _set(tree, override)
    return config_from_dict(tree, source=str(path))


def config_from_dict(tree: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validate and resolve a plain mapping, as `load_config` does with a file."""
    try:
        return Config.model_validate(_resolved(tree))
    except ValidationError as e:
        raise ConfigError(f"{source}: " + "; ".join(_messages(e))) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to the same object."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected path.to.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = tree
    for i, part in enumerate(parents):
        child = _child(node, part, override)
        if child is None:
            child = {}
            node[part] = child
        elif not isinstance(child, dict | list):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: i + 1])} is a value, it has no keys"
            )
        node = child
    if isinstance(node, list):
        _child(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"override {override!r}: {part!r} is no position in a list of {len(node)}"
        )
    return node[int(part)]


def _resolved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what follows from other keys; wrong types are left to pydantic."""
    tree = dict(tree)
    data = tree.get("data")
    if isinstance(data, Mapping) and tree.get("deterministic") is True:
        # The GPU's JPEG decoders give no promise.
        decode = data.get("decode", "auto")
        tree["data"] = {**data, "decode": "cpu" if decode == "auto" else decode}
    model = tree.get("model")
    if not isinstance(model, Mapping):
        return tree
    model = dict(model)
    tree["model"] = model
    name, block = model.get("name"), None
    if isinstance(name, str):
        base, _, patch = name.partition("/")
        names = [f"{b}/{p}" for b in SIT_MODELS for p in PATCHES]
        if name not in names:
            raise ConfigError(
                f"model.name: {name!r} is not one of {', '.join(names)}{nearest(name, names)}"
            )
        width, depth, heads, block = SIT_MODELS[base]
        shape = {"width": width, "depth": depth, "heads": heads, "patch": int(patch)}
        for key, value in shape.items():
            if model.get(key, value) not in (value, None):
                raise ConfigError(
                    f"model.{key}: {model[key]} contradicts model.name {name!r}, whose {key} is "
                    f"{value}; leave one of them out"
                )
            model[key] = value
    missing = [k for k in ("width", "depth", "heads", "patch") if model.get(k) is None]
    if missing:
        raise ConfigError(
            f"model: give a name such as SiT-B/2, or width, depth, heads and patch "
            f"(missing: {', '.join(missing)})"
        )
    width, heads = model["width"], model["heads"]
    if _is_int(width) and _is_int(heads) and heads > 0 and (width % heads or width % 4):
        raise ConfigError(
            f"model.width: {width} must be a multiple of model.heads ({heads}) and of 4"
        )
    alignment = tree.get("alignment", {})
    if isinstance(alignment, Mapping) and alignment.get("block") is None:
        depth = model["depth"]
        block = block or (max(1, depth // 3) if _is_int(depth) else None)
        tree["alignment"] = {**alignment, "block": block}
    return tree


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(error: ValidationError) -> list[str]:
    """One clause per problem: the dotted path, the value, what was allowed."""
    out = []
    for e in error.errors(include_url=False):
        path = ".".join(str(p) for p in e["loc"])
        if e["type"] == "extra_forbidden":
            allowed = _keys_at(e["loc"][:-1])
            hint = nearest(str(e["loc"][-1]), allowed) or f" (known: {', '.join(sorted(allowed))})"
            out.append(f"{path}: unknown key{hint}")
        elif e["type"] == "missing":
            out.append(f"{path}: required key is missing")
        elif e["type"] == "value_error":
            out.append(e["msg"].removeprefix("Value error, "))
        else:
            out.append(f"{path}: {e['input']!r} is not allowed: {e['msg'].lower()}")
    return out


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    node: Any = Config
    for part in loc:
        if isinstance(part, int):
            continue
        field = node.model_fields[part].annotation
        inner = [a for a in getattr(field, "__args__", (field,)) if a is not Ellipsis]
        node = next(a for a in inner if isinstance(a, type) and issubclass(a, BaseModel))
    return list(node.model_fields)


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
