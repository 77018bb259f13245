"""Help that reads well at any width: flowing paragraphs, options in groups, an example a command.

Nothing in a help text is markup, so that `[@INPUT]` is shown as it is written.
"""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

# A command that can be copied, by the command's name; data's own have none of the same.
EXAMPLES = {
    "train": "fastrepa train quickstart training.steps=3200 run=runs/longer",
    "sample": "fastrepa sample runs/quickstart --num 16 --classes cat,dog --cfg 2",
    "evaluate": "fastrepa evaluate runs/quickstart data/photos64 --num 5000",
    "convert": "fastrepa convert runs/quickstart quickstart.safetensors --to safetensors",
    "prepare": "fastrepa prepare photos data/photos64 --resolution 64",
    "verify": "fastrepa data verify data/photos64",
    "show": "fastrepa data show data/photos64 --num 24",
    "encode": "fastrepa data encode data/photos64 --cache-features dinov2-vit-b@112 --replace",
    "plan": "fastrepa plan imagenet256_sit_xl2_dinov2b --gpus 8,64 --gpu h200",
    "profile": "fastrepa profile quickstart --steps 20 --against eager",
    "bench": "fastrepa bench quickstart --batch 8 --batch 16",
    "report": "fastrepa report runs/quickstart runs/longer --out both.html",
    "watch": "fastrepa watch runs/quickstart --port 8000",
    "probe": "fastrepa probe data/photos64 --encoders dinov2-vit-b@112,clip-vit-l",
    "doctor": "fastrepa doctor",
    "config": "fastrepa config quickstart training.optimizer",
    "recipes": "fastrepa recipes",
    "encoders": "fastrepa encoders dinov2-vit-b",
    "models": "fastrepa models",
}

_SAMPLING = ("sampler", "steps", "cfg", "guidance_low", "guidance_high")
_WEIGHTS = ("step", "ema", "codec_weights")
_SPEED = ("precision", "compile", "batch_size")
_COLUMNS = ("codec", "codec_weights", "cache_features", "flip", "precision", "batch_size")

# Which options stand together, by the command's name; the others are just Options.
PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "sample": {"Images": ("num", "classes", "seed", *_SAMPLING), "Weights": _WEIGHTS,
               "Speed": _SPEED, "Files": ("out", "npz", "overwrite")},
    "evaluate": {"What is measured": ("metrics", "encoders", "inception_weights", "clip"),
                 "Images of a run": ("num", "seed", *_SAMPLING), "Weights of a run": _WEIGHTS,
                 "Speed": _SPEED, "Files": ("cache", "save_statistics")},
    "convert": {
        "Which weights": ("weights", "step", "ema", "ema_sigma_rel"),
        "The hub": ("repo", "private", "license", "datasets", "dry_run"),
    },
    "prepare": {"The source": ("inside", "class_names", "image_column", "label_column", "skip_bad"),
                "The set": ("resolution", "shard_size", "image_format", "quality", "seed"),
                "Latents and features": _COLUMNS},
    "plan": {"Assumed efficiency": ("efficiency", "frozen_efficiency", "hbm_efficiency",
                                    "link_efficiency", "overlap"),
             "Assumed machine": ("nvlink_gbs", "network_gbs", "gpus_per_node", "storage_gbs",
                                 "pcie_gbs", "host_memory_gbs", "nvme_gbs", "reserve_gb",
                                 "image_bytes")},
    "bench": {"Contenders and cases": ("against", "precision", "batch", "ranks", "sampling"),
              "Timing": ("rounds", "steps", "warmup")},
}  # fmt: skip


def flowing(text: str) -> str:
    """The text with the line ends of its paragraphs gone, and no markup in it."""
    return escape("\n\n".join(" ".join(part.split()) for part in cleandoc(text).split("\n\n")))


class _Readable:
    """A command or a group of commands, as typer makes them, with readable help."""

    def __init__(self, **how: Any) -> None:
        name = how.get("name") or ""
        panels = PANELS.get(name, {}).items()
        group_of = {option: panel for panel, options in panels for option in options}
        for parameter in how.get("params") or ():
            if parameter.help:
                parameter.help = escape(parameter.help)
            if parameter.name in group_of:
                parameter.rich_help_panel = group_of[parameter.name]
        if how.get("help"):
            how["help"] = flowing(how["help"])
        if example := EXAMPLES.get(name):
            how["epilog"] = escape(f"Example:\n  {example}")
        super().__init__(**how)

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters; that a flag takes no value needs no `<bool>` beside it."""
        parameters = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters


class ReadableCommand(_Readable, TyperCommand):
    """A command with readable help."""


class ReadableGroup(_Readable, TyperGroup):
    """A group of commands with readable help."""
