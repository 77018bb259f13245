"""A folder that diffusers loads and plain torch samples from: `fastrepa convert --to diffusers`.

model_index.json, pipeline.py              what DiffusionPipeline.from_pretrained looks for
transformer/config.json                    the model, its classes, the settings it is drawn with
transformer/sit.py                         the network and its samplers, in torch alone
transformer/diffusion_pytorch_model.safetensors
vae/                                       the autoencoder, where it is a folder of one's own
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastrepa.checkpoint.format import RunState
from fastrepa.commands.convert import shared
from fastrepa.config import Config
from fastrepa.errors import WeightsError
from fastrepa.vision.codec import SD_VAE_SCALE, VAE_WEIGHTS

VAE_FILES = ("config.json", VAE_WEIGHTS)
# Of `sample` the settings that say what an image is, not how many or how fast.
SAMPLING = ("sampler", "steps", "cfg", "guidance_low", "guidance_high")
UNUSED = "projectors."  # the alignment's: sampling never runs them


def write_folder(
    folder: Path, weights: Mapping[str, Tensor], config: Config, state: RunState, average: str
) -> None:
    """Write a model's weights, [...] by parameter name, with all that draws from them.

    `average` says which weights these are. Raises WeightsError for an autoencoder's folder that
    lacks a file, and OSError.
    """
    files, parts = Path(shared.__path__[0]), {"transformer": ["sit", "SiT"], "vae": [None, None]}
    vae = Path(config.data.codec.weights).expanduser() if config.data.codec.is_autoencoder else None
    own = vae is not None and vae.is_dir()
    (folder / "transformer").mkdir(parents=True)
    if vae is not None and own:
        _copy_vae(vae, folder / "vae")
        parts["vae"] = ["diffusers", "AutoencoderKL"]
    shutil.copyfile(files / "pipeline.py", folder / "pipeline.py")
    shutil.copyfile(files / "sit.py", folder / "transformer/sit.py")
    index = {
        "_class_name": ["pipeline", "SiTPipeline"],
        "_diffusers_version": _diffusers_version(),
        **parts,
    }
    _write_json(folder / "model_index.json", index)
    described = _described(config, state) | {"weights": average}
    if vae is not None and not own:
        described["vae"] = config.data.codec.weights  # a name on the hub
    _write_json(folder / "transformer/config.json", described)
    kept = {n: v.contiguous() for n, v in weights.items() if not n.startswith(UNUSED)}
    save_file(kept, folder / "transformer" / VAE_WEIGHTS, metadata={"format": "pt"})


def _described(config: Config, state: RunState) -> dict[str, Any]:
    """Return what transformer/config.json says, all that shared/sit.py needs to know."""
    m, codec, sampling = config.model, config.data.codec, config.sample.model_dump(mode="json")
    return {
        "_class_name": "SiT",
        "name": m.name,
        "width": m.width,
        "depth": m.depth,
        "heads": m.heads,
        "patch": m.patch,
        "num_classes": m.num_classes,
        "qk_norm": m.qk_norm,
        "channels": state.channels,
        "side": state.side,
        "prediction": config.objective.prediction,
        "path": config.objective.path,
        "codec": codec.name,
        "latent_scale": SD_VAE_SCALE if codec.is_autoencoder else 1.0,
        "vae": None,
        "sampling": {key: sampling[key] for key in SAMPLING},
        "classes": state.classes,
        "step": state.step,
    }


def _copy_vae(source: Path, folder: Path) -> None:
    folder.mkdir()
    for name in VAE_FILES:
        if not (source / name).is_file():
            raise WeightsError(f"data.codec.weights ({source}): this folder has no {name}")
        shutil.copyfile(source / name, folder / name)


def _diffusers_version() -> str:
    """The version that is installed; without one the first that loads such folders."""
    try:
        return version("diffusers")
    except PackageNotFoundError:
        return "0.35.0"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
