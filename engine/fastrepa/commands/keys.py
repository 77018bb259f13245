"""The keys of the configuration on the screen, on a page and as a schema: `fastrepa config`."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import wrap

from rich.text import Text

from fastrepa.config import Config
from fastrepa.config.keys import Key, all_keys, find_keys, values_of
from fastrepa.runtime.terminal import Terminal, say

PAGE = """\
# Configuration

Every key of a YAML file such as those in [configs](../configs), with what it is when the file
leaves it out. On the command line, as often as you like, a key is given by its path, and an entry
of a list by its number, from 0: `training.steps=1000`, `training.optimizer.betas.1=0.95`.
`fastrepa config` prints these keys, or a section or one of them; of a file or a run's folder it
prints the values, with a star where they differ from the default:
```bash
fastrepa config training.optimizer
fastrepa config training.clip
fastrepa config configs/quickstart.yaml
fastrepa config configs/quickstart.yaml training.optimizer training.optimizer.betas.1=0.95
```
What `vision.encoders` and `model.name` take, with sizes, and which weights are here:
```bash
fastrepa encoders
fastrepa encoders dinov2-vit-b
fastrepa models
```
An editor that knows YAML schemas completes and checks the keys of a file whose first line is
`# yaml-language-server: $schema=PATH`, with the path of [schema.json](../configs/schema.json) or of
what `fastrepa config --schema > schema.json` wrote.
"""


def print_keys(paths: Iterable[str], terminal: Terminal) -> None:
    """Print every key, or those of the paths: default, description, allowed values.

    Raises ConfigError for a path that is no key's.
    """
    for key in _wanted(paths):
        _print_key(key, key.default or key.without, "", terminal)


def print_config(config: Config, name: str, paths: Iterable[str], terminal: Terminal) -> None:
    """Print the values of a configuration, of `name`, and where they differ from the default: in a
    line each, or those of the paths with what `print_keys` says of them.

    Raises ConfigError for a path that is no key's.
    """
    wanted = _wanted(paths) if (paths := list(paths)) else ()
    if not wanted:
        say(f"# {name}; * differs from the default")
    for path, value, key in values_of(config):
        differs = key.default not in (None, value)
        if not wanted:
            default = f"  (default {key.default})" if differs else ""
            say(f"{'*' if differs else ' '} {path}: {value}{default}")
        elif key in wanted:
            _print_key(key, value, f"default {key.default}" if differs else "", terminal, path)


def markdown() -> str:
    """Return the page of all keys: a table for each section."""
    sections = {"": "At the top, beside the sections below."}
    rows: dict[str, list[str]] = {"": []}
    for key in all_keys():
        parent = key.path.rpartition(".")[0]
        if key.is_section:
            sections[key.path] = key.description
            rows[key.path] = []
        else:
            if parent not in rows:  # of a list, or one that may be null
                rows[parent] = []
            default = f"`{key.default}`" if key.default is not None else key.without
            cells = (f"`{key.path}`", default, key.allowed, key.description)
            rows[parent].append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    page = PAGE
    for section, lines in rows.items():
        page += f"\n## {section or 'A run'}\n"
        if section in sections:
            page += f"{sections[section]}\n"
        if lines:
            page += "\n| key | default | allowed | what it is |\n|---|---|---|---|\n"
            page += "".join(f"| {line} |\n" for line in lines)
    return page


def _wanted(paths: Iterable[str]) -> list[Key]:
    found = [key for path in paths for key in find_keys(path)]
    return found or list(all_keys())


def _print_key(key: Key, value: str, aside: str, terminal: Terminal, path: str = "") -> None:
    head = Text(path or key.path, style="bold cyan")
    if not key.is_section:
        head.append(f": {value}", style="not bold default")
    if aside:
        head.append(f"  ({aside})", style="not bold yellow")
    terminal.print(head, soft_wrap=True)
    text = f"{key.description} ({key.allowed})" if key.allowed else key.description
    say(*wrap(text, terminal.width, initial_indent="    ", subsequent_indent="    "))
