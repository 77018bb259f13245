"""Code of the user's own, FILE.py:NAME: read when it is needed, refused in a line.

It runs with the rights of whoever names it, like any script. Ranks read the same file.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrepa.errors import ConfigError, nearest, worded, writing
from fastrepa.reading.text import expanded
from fastrepa.runtime.files import sha256_of, write_whole

KEPT = "own"  # folder of a run


def own_code(key: str, spec: str, kind: str) -> Any:
    """Return what FILE.py:NAME names, the same object each time; `key` and `kind` are for errors.

    Raises ConfigError for a file that is not there or fails, and a name that is not in it or
    cannot be called.
    """
    file, _, name = spec.rpartition(":")
    module = _module(key, os.path.abspath(expanded(file)))
    own = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    if not hasattr(module, name):
        raise ConfigError(
            f"{key}: {file} has no {name}{nearest(name, own)}; expected is a {kind} of that name"
        )
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"{key}: {spec} is a {type(found).__name__}, expected is a {kind}")
    return found


@cache
def _module(key: str, file: str) -> ModuleType:
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{key}: {file}: no such file")
    name = f"fastrepa_own_{sha256_of(path)[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look there
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise ConfigError(f"{key}: {file}: {failed_in(file, e)}") from e
    return module


def failed_in(file: str, error: BaseException) -> str:
    """Say what a user's code raised, and on which line of its file."""
    path = os.path.abspath(expanded(file))
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {worded(error)}"


def keep_copies(run: Path, specs: Iterable[str]) -> list[str]:
    """Keep each file as it is in RUN/own, under a name of its contents; returns words for those of
    which the run has other contents. Raises ConfigError where that cannot be written.
    """
    said = []
    for file in dict.fromkeys(Path(spec.rpartition(":")[0]) for spec in specs):
        copy = run / KEPT / f"{file.stem}-{sha256_of(file)[:12]}.py"
        if copy.exists():
            continue
        before = sorted((run / KEPT).glob(f"{file.stem}-{'?' * 12}.py"))
        if before:
            said.append(f"{file} is not what it was ({before[-1]}): this run's curve changes")
        with writing(copy):
            copy.parent.mkdir(exist_ok=True)
            write_whole(copy, file.read_bytes())
    return said
