"""Paths as people write them."""

from __future__ import annotations

import os

from fastrepa.errors import ConfigError


def expanded(path: str) -> str:
    """`path` with the home folder that its ~ or ~NAME stands for.

    Raises ConfigError where no such user has one: a folder called ~NAME is written ./~NAME.
    """
    found = os.path.expanduser(path)
    if path.startswith("~") and found == path:
        raise ConfigError(f"{path}: there is no such home folder (a name with ~ here: ./{path})")
    return found
