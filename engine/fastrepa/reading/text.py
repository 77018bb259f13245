"""JSON, read so that whatever is wrong with it is one line that names where it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastrepa.errors import DataError, FastrepaError


def read_json(path: Path, kind: type[FastrepaError] = DataError) -> Any:
    """Return the value in a JSON file; an error of `kind` names a file that holds none."""
    try:
        text = path.read_bytes()
    except OSError as e:
        raise kind(f"{path}: cannot be read ({e.strerror or e})") from None
    return parse_json(text, path, kind)


def parse_json(text: str | bytes, what: object, kind: type[FastrepaError] = DataError) -> Any:
    """Return the value that `text` says; an error of `kind` names `what`, where it stands."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise kind(f"{what}: not readable as JSON (nested too deeply)") from None
    except ValueError as e:  # bytes that are no text, and numbers of too many digits, too
        raise kind(f"{what}: not readable as JSON ({e})") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands there twice")
    return found
