"""The sections that say what is learnt from what: data, encoders, generator, alignment, objective.

Every key has a description: `fastrepa config`, docs/configuration.md and the schema of editors are
made of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastrepa.config.values import (
    FROM_NAME,
    BoolOrAuto,
    ClassCount,
    NameOrOwn,
    PathText,
    Positive,
    Probability,
    SetPath,
    Text,
)


class Section(BaseModel):
    """A mapping of keys; others are refused, and values are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class CodecConfig(Section):
    """Makes of an image what the generator sees: pixels in [-1, 1] or autoencoder latents."""

    name: Literal["pixel", "sd-vae"] = Field(
        "sd-vae",
        description="pixel: the image, averaged down; sd-vae: latents of Stable Diffusion's "
        "autoencoder, an eighth of the image's side",
    )
    weights: PathText = Field(
        "stabilityai/sd-vae-ft-mse", description="sd-vae: hub id or local folder"
    )
    side: Positive | None = Field(
        None, description="pixel: side that the image is averaged down to; null: data.resolution"
    )

    @property
    def is_autoencoder(self) -> bool:
        return self.name == "sd-vae"


class DataConfig(Section):
    """A data set (made by `fastrepa prepare`, or in the reference's layout) and how it is read."""

    path: SetPath = Field(
        description="the set's folder, or an address: https://, s3:// or gs://HOST/PATH"
    )
    cache_dir: PathText | None = Field(
        None,
        description="of a set at an address: a folder for the blocks that were read, which several "
        "runs may share; null: fastrepa/blocks in the user's cache",
    )
    cache_gb: Annotated[float, Field(ge=0.0)] = Field(
        32.0, description="what cache_dir may hold, in 1e9 bytes; 0: nothing is kept"
    )
    resolution: Positive = Field(256, description="side of the set's images, in pixels")
    codec: CodecConfig = CodecConfig()
    latents: Literal["auto", "online", "cached"] = Field(
        "auto", description="sd-vae: from the set's moments, or encoded in training; auto: if there"
    )
    decode: Literal["auto", "cpu", "mixed"] = Field(
        "auto",
        description="where images are decoded: on the CPU, or partly on the GPU (mixed); auto: "
        "mixed where the run is on a GPU",
    )
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


class EncoderConfig(Section):
    """One frozen encoder: a registry name or any timm model, and where its weights come from."""

    name: NameOrOwn = Field(
        description="one of `fastrepa encoders`, any timm model, or FILE.py:CLASS of one's own"
    )
    weights: PathText = Field(
        "hub", description="hub | random | package:NAME | a local .safetensors/.pth file"
    )
    input: Positive | None = Field(
        None,
        description="side of the encoder's input in pixels; null: the encoder's own rule "
        "(`fastrepa encoders`)",
    )
    grid: Literal["exact", "area", "bilinear"] = Field(
        "exact",
        description="how features are brought to the generator's token grid; exact: they must "
        "have it",
    )
    spatial_norm: Probability = Field(
        0.0,
        description="share of an image's mean token that is taken off, before each channel is "
        "divided by its deviation over the image (iREPA); 0: tokens as they are",
    )


class VisionConfig(Section):
    """The frozen encoders whose features the generator is aligned to; without any it is not."""

    encoders: tuple[EncoderConfig, ...] = Field(
        (), strict=False, description="a list; an empty one trains without alignment"
    )
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


class ModelConfig(Section):
    """SiT by name ("SiT-XL/2") or by width, depth, heads and patch, which a name gives."""

    name: Text | None = Field(
        None, description="SiT-S, SiT-B, SiT-L or SiT-XL with /2, /4 or /8 (`fastrepa models`)"
    )
    width: Positive = Field(
        description="features per token, a multiple of heads and of 4", json_schema_extra=FROM_NAME
    )
    depth: Positive = Field(description="number of blocks", json_schema_extra=FROM_NAME)
    heads: Positive = Field(description="attention heads per block", json_schema_extra=FROM_NAME)
    patch: Positive = Field(
        description="side of a token, in pixels or latents of the codec",
        json_schema_extra=FROM_NAME,
    )
    num_classes: ClassCount = Field(
        1000,
        description="at least as many as the data set has; one more is the null class. auto: as "
        "many; the run's config.yaml has the number",
    )
    label_dropout: Probability = Field(
        0.1,
        description="share of labels replaced by the null class, without which there is no "
        "guidance (sample.cfg)",
    )
    qk_norm: bool = Field(False, description="LayerNorm on queries and keys of every head")

    @property
    def takes_the_sets_classes(self) -> bool:
        return str(self.num_classes) == "auto"


class AlignmentConfig(Section):
    """REPA's alignment: of which block, through which projector, how strongly."""

    weight: Annotated[float, Field(ge=0.0)] = Field(
        0.5, description="of the alignment loss, beside the velocity's 1"
    )
    block: Positive = Field(
        description="the block whose output is aligned, 1-based; if not given: 4 for S/B, 8 for "
        "L/XL, otherwise a third of the depth",
        json_schema_extra=FROM_NAME,
    )
    projector_width: Positive = Field(
        2048, description="width of the hidden layers of the projector, an MLP per encoder"
    )


class ObjectiveConfig(Section):
    """The prediction, the path from data (time 0) to noise (time 1), and the times on it."""

    path: Literal["linear", "cosine"] = Field(
        "linear",
        description="shares of data and noise: 1 - t and t, or cosine and sine of a quarter turn",
    )
    prediction: Literal["velocity", "data"] = Field(
        "velocity",
        description="what the last layer's output means; 'data' is easier to learn in pixel space",
    )
    time: Literal["uniform", "lognormal"] = Field(
        "uniform", description="distribution of training times; lognormal: of noise / signal"
    )
    time_mean: float = Field(0.0, description="lognormal: mean of log(noise / signal)")
    time_std: Annotated[float, Field(gt=0.0)] = Field(1.0, description="lognormal: its deviation")
