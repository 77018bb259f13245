"""A reference's file on itself: the command line in it, and the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastrepa.checkpoint.choice import shape_of
from fastrepa.config import Config, config_from_dict, overridden
from fastrepa.config.loading import PATCHES, SIT_MODELS
from fastrepa.errors import CheckpointError, ConfigError, shown
from fastrepa.reading.tensors import sized
from fastrepa.vision.codec import SD_VAE_CHANNELS, SD_VAE_DOWN

# The reference's arguments that are keys of ours as they stand.
_KEYS = {
    "resolution": "data.resolution",
    "data_dir": "data.path",
    "cfg_prob": "model.label_dropout",
    "encoder_depth": "alignment.block",
    "proj_coeff": "alignment.weight",
    "path_type": "objective.path",
    "prediction": "objective.prediction",
    "weighting": "objective.time",
    "batch_size": "training.global_batch",
    "max_train_steps": "training.steps",
    "mixed_precision": "training.precision",
    "learning_rate": "training.optimizer.lr",
    "adam_weight_decay": "training.optimizer.weight_decay",
    "adam_epsilon": "training.optimizer.eps",
    "max_grad_norm": "training.clip",
    "checkpointing_steps": "training.checkpoint_every",
    "sampling_steps": "training.sample_every",
    "seed": "seed",
}
# Values that have other names here.
_VALUES: dict[str, dict[Any, str]] = {
    "prediction": {"v": "velocity", "x": "data"},
    "mixed_precision": {"fp16": "bf16", "no": "fp32"},
}
_ENCODERS = {"dinov1-vit-b": "dino-vit-b"}  # of the reference's names those that differ


@dataclass(frozen=True)
class Shape:
    """A SiT by its tensors: D is `width`, `side` and `channels` are the latents'; the heads are
    known where the model has a name, or normalises queries and keys.
    """

    width: int
    depth: int
    patch: int
    channels: int
    side: int
    num_classes: int
    qk_norm: bool
    heads: int | None
    encoder_widths: list[int]
    projector_width: int | None

    @property
    def name(self) -> str | None:
        """SiT-B/2, say; None for a size that has no name."""
        for base, (width, depth, *_) in SIT_MODELS.items():
            if (width, depth) == (self.width, self.depth) and self.patch in PATCHES:
                return f"{base}/{self.patch}"
        return None

    def __str__(self) -> str:
        size = f"a SiT of width {self.width}, depth {self.depth} and patch {self.patch}"
        widths = " and ".join(f"{width}-wide" for width in self.encoder_widths)
        projectors = f" with {widths} projector{'s' * (len(self.encoder_widths) > 1)}"
        return (self.name or size) + (projectors if widths else "")

    def keys(self) -> dict[str, Any]:
        """Return the keys of a configuration that the tensors determine, by their dotted names."""
        size: dict[str, Any] = {"name": self.name}
        if not self.name:
            size = {"width": self.width, "depth": self.depth, "heads": self.heads}
            size["patch"] = self.patch
        size |= {"num_classes": self.num_classes, "qk_norm": self.qk_norm}
        found = {f"model.{key}": value for key, value in size.items() if value is not None}
        if self.projector_width is not None:
            found["alignment.projector_width"] = self.projector_width
        return found


def read_shape(model: Mapping[str, Tensor], file: Path) -> Shape:
    """Read a SiT's shape from its tensors, [...] by name; CheckpointError for what is none."""

    def sizes(name: str, form: str) -> list[int]:
        return list(sized(model, name, form, f"{file}: not a SiT of REPA's", CheckpointError).shape)

    width = sizes("pos_embed", "[1, T, D]")[2]
    patch = sizes("x_embedder.proj.weight", "[D, C, patch, patch]")[2]
    head = model.get("blocks.0.attn.q_norm.weight")
    numbers = [int(n.split(".")[1]) for n in model if re.match(r"blocks\.[0-9]{1,6}\.", n)]
    return Shape(
        **shape_of(model, patch, file),
        width=width,
        depth=max(numbers, default=-1) + 1,
        patch=patch,
        num_classes=sizes("y_embedder.embedding_table.weight", "[classes + 1, D]")[0] - 1,
        qk_norm=head is not None,
        heads=width // head.numel() if head is not None and head.numel() else None,
        projector_width=(
            sizes("projectors.0.4.weight", "[Z, P]")[1]
            if "projectors.0.4.weight" in model
            else None
        ),
    )


def config_of(
    args: Mapping[str, Any], shape: Shape, file: Path, run: Path, overrides: Iterable[str]
) -> Config:
    """The configuration that a file's arguments and tensors say, under overrides of the user's.

    Raises ConfigError, naming the file, for what is missing in them or not allowed.
    """
    said = _said(args)
    if encoders := [n for n in str(args.get("enc_type") or "").split(",") if n.strip() != "None"]:
        names = [n.strip().lower() for n in encoders if n.strip()]
        said["vision.encoders"] = [{"name": _ENCODERS.get(n, n)} for n in names]
    said |= shape.keys()
    heads = re.search(r"heads ([0-9]{1,4})", str(args.get("model")))  # as we write them
    if heads and not shape.name:
        said.setdefault("model.heads", int(heads[1]))
    resolution = said.setdefault("data.resolution", shape.side * SD_VAE_DOWN)
    if (shape.channels, shape.side * SD_VAE_DOWN) != (SD_VAE_CHANNELS, resolution):
        said |= {"data.codec.name": "pixel", "data.codec.side": shape.side}
    tree: dict[str, Any] = {"run": str(run)}
    for key, value in {"data.path": "data", **said}.items():
        node, parts = tree, key.split(".")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = value
    config = config_from_dict(overridden(tree, overrides), source=f"{file}: args")
    if len(config.vision.encoders) != len(shape.encoder_widths):
        raise ConfigError(
            f"{file}: has {len(shape.encoder_widths)} projectors, its args name "
            f"{len(config.vision.encoders)} encoders; give vision.encoders"
        )
    return config


def disagreements(args: Mapping[str, Any], config: Config) -> list[str]:
    """Return in words what a file's arguments say otherwise than a configuration."""
    ours = config.model_dump(mode="json")
    found = []
    for key, value in _said(args).items():
        if key.startswith(("data.path", "training.", "seed")):
            continue  # a run of one's own may have others
        node: Any = ours
        for part in key.split("."):
            node = node[part]
        if node != value:
            found.append(f"{key} is {shown(node)}, its args say {shown(value)}")
    return found


def misfits(shape: Shape, config: Config) -> str:
    """Say which model a file is, and the keys that would make a configuration's model that."""
    ours = config.model_dump(mode="json")
    m, keys = config.model, []
    sized_alike = (m.width, m.depth, m.patch) == (shape.width, shape.depth, shape.patch)
    for key, value in shape.keys().items():
        section, name = key.split(".")
        if ours[section][name] != value and not (name == "name" and sized_alike):
            keys.append(f"{key}={value}")
    return f"the file is {shape}" + (f": {' '.join(keys)}" if keys else "")


def _said(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of ours by dotted key; what is None, or no plain value, is not said."""
    found: dict[str, Any] = {}
    for name, key in _KEYS.items():
        value = args.get(name)
        if isinstance(value, bool | int | float | str):
            found[key] = _VALUES.get(name, {}).get(value, value)
    betas = [args.get("adam_beta1"), args.get("adam_beta2")]
    if all(isinstance(beta, float) for beta in betas):
        found["training.optimizer.betas"] = betas
    return found
