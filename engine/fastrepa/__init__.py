"""fastrepa: a training engine for representation-aligned diffusion transformers (REPA).

The names in `__all__` are its Python API (docs/python.md); they are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrepa.api import Model, encode, evaluate, load, load_config, prepare, probe, train
    from fastrepa.commands.evaluate.evaluate import Evaluation
    from fastrepa.config import Config
    from fastrepa.errors import FastrepaError

__version__ = "0.1.0"
__all__ = [
    "Config", "Evaluation", "FastrepaError", "Model", "__version__", "encode", "evaluate", "load",
    "load_config", "prepare", "probe", "train",
]  # fmt: skip

_ELSEWHERE = {
    "Config": "config",
    "Evaluation": "commands.evaluate.evaluate",
    "FastrepaError": "errors",
}  # what is not in api.py


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastrepa' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastrepa.{_ELSEWHERE.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
