"""Tells which code is measured, also where there is no git, or its commits did not travel.

`make gpu-wheels` writes the commit beside the wheels that travel with the tree. It counts where git
cannot name a commit with this very code; a tree whose code neither knows is called modified.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ".gpu-wheels"
COMMIT = Path(WHEELS) / "commit.json"
CODE = ("engine", "kernels", "benchmarks", "tests", "configs")


@functools.cache
def provenance(root: Path = ROOT) -> dict[str, Any]:
    """Return git (the commit, "none" where nothing says), dirty, and code (a digest of the files).

    Raises ValueError where the file that `make gpu-wheels` wrote cannot be read.
    """
    code = digest(root)
    known = {"git": "none", "dirty": True, "code": code}
    if (root / ".git").exists() and (commit := _git(root, "rev-parse", "HEAD")):
        known |= {"git": commit, "dirty": bool(_git(root, "status", "--porcelain"))}
    written = root / COMMIT
    if not known["dirty"] or not written.exists():
        return known
    try:
        then = json.loads(written.read_text())
        if then["code"] == code or known["git"] == "none":
            known |= {"git": then["git"], "dirty": then["dirty"] or then["code"] != code}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{written}: {error!r}; `make gpu-wheels` writes it") from None
    return known


def digest(root: Path) -> str:
    """Return the first 16 hexadecimal digits of SHA-256 over the names and bytes of all code."""
    sha = hashlib.sha256()
    for folder in CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml", ".toml") and path.is_file():
                data = path.read_bytes()
                sha.update(f"{path.relative_to(root)} {len(data)}\n".encode() + data)
    return sha.hexdigest()[:16]


def _git(root: Path, *arguments: str) -> str:
    """Return what git says, '' where it says nothing or is not here."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
