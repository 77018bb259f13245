"""Writing a set's manifest, the last thing that makes it one (shards.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastrepa.data.format.shards import MANIFEST, Manifest
from fastrepa.runtime.files import write_whole


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` whole or not at all: one record per line, readable as a diff."""
    text = _json_lines(manifest.model_dump(mode="json"), "")
    write_whole(folder / MANIFEST, (text + "\n").encode())


def _json_lines(value: Any, indent: str) -> str:
    """JSON with a line for every entry of an outer object or list of records."""
    deeper = indent + "  "
    if isinstance(value, dict) and (not indent or "files" in value):
        rows = [f"{json.dumps(name)}: {_json_lines(item, deeper)}" for name, item in value.items()]
        return "{\n" + ",\n".join(deeper + row for row in rows) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = [_json_lines(item, deeper) for item in value]
        return "[\n" + ",\n".join(deeper + row for row in rows) + f"\n{indent}]"
    return json.dumps(value)
