"""A YAML file and dotted overrides (`training.steps=1000`) to one validated configuration.

`load_config` fills in what follows from other keys (a model's width from its name, the alignment
block from its depth), so that the configuration saved with a run says everything that was used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fastrepa.config.sections import Config, is_int
from fastrepa.errors import ConfigError, nearest

# REPA_SPEC "Generator": width, depth, heads, and the block that is aligned (1-based).
SIT_MODELS: dict[str, tuple[int, int, int, int]] = {
    "SiT-S": (384, 12, 6, 4),
    "SiT-B": (768, 12, 12, 4),
    "SiT-L": (1024, 24, 16, 8),
    "SiT-XL": (1152, 28, 16, 8),
}
PATCHES = (2, 4, 8)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; people who write configurations mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The validated, resolved configuration from a YAML file and `path.to.key=value` overrides.

    Raises ConfigError naming the file or the dotted key, the value, and what was allowed.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        known = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(
            f"{path}: no such configuration file{nearest(path.name, known)}"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a YAML file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read ({e})") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, got {_kind(tree)}")
    for override in overrides:
        _set(tree, override)
    return config_from_dict(tree, source=str(path))


def config_from_dict(tree: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validate and resolve a plain mapping, as `load_config` does with a file."""
    try:
        return Config.model_validate(_resolved(tree))
    except ValidationError as e:
        raise ConfigError(f"{source}: " + "; ".join(_messages(e))) from None


def load_run_config(run: Path) -> Config:
    """Load the configuration that a run was last trained with.

    Raises ConfigError where the folder is no run's.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: not a run folder (no config.yaml)")
    return load_config(run / "config.yaml")


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to the same object."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected path.to.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = tree
    for i, part in enumerate(parents):
        child = _child(node, part, override)
        if child is None:
            child = {}
            node[part] = child
        elif not isinstance(child, dict | list):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: i + 1])} is a value, it has no keys"
            )
        node = child
    if isinstance(node, list):
        _child(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"override {override!r}: {part!r} is no position in a list of {len(node)}"
        )
    return node[int(part)]


def _resolved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what follows from other keys; wrong types are left to pydantic."""
    tree = dict(tree)
    data = tree.get("data")
    if isinstance(data, Mapping) and tree.get("deterministic") is True:
        # The GPU's JPEG decoders give no promise.
        decode = data.get("decode", "auto")
        tree["data"] = {**data, "decode": "cpu" if decode == "auto" else decode}
    alignment, model = tree.get("alignment", {}), tree.get("model")
    unaligned = isinstance(alignment, Mapping) and alignment.get("block") is None
    if not isinstance(model, Mapping):  # which is refused, whatever the block
        return {**tree, "alignment": {**alignment, "block": 1} if unaligned else alignment}
    model = dict(model)
    tree["model"] = model
    name, block = model.get("name"), None
    if isinstance(name, str):
        base, _, patch = name.partition("/")
        names = [f"{b}/{p}" for b in SIT_MODELS for p in PATCHES]
        if name not in names:
            raise ConfigError(
                f"model.name: {name!r} is not one of {', '.join(names)}{nearest(name, names)}"
            )
        width, depth, heads, block = SIT_MODELS[base]
        shape = {"width": width, "depth": depth, "heads": heads, "patch": int(patch)}
        for key, value in shape.items():
            if model.get(key, value) not in (value, None):
                raise ConfigError(
                    f"model.{key}: {model[key]} contradicts model.name {name!r}, whose {key} is "
                    f"{value}; leave one of them out"
                )
            model[key] = value
    missing = [k for k in ("width", "depth", "heads", "patch") if model.get(k) is None]
    if missing:
        raise ConfigError(
            f"model: give a name such as SiT-B/2, or width, depth, heads and patch "
            f"(missing: {', '.join(missing)})"
        )
    width, heads = model["width"], model["heads"]
    if is_int(width) and is_int(heads) and heads > 0 and (width % heads or width % 4):
        raise ConfigError(
            f"model.width: {width} must be a multiple of model.heads ({heads}) and of 4"
        )
    if unaligned:
        depth = model["depth"]  # which is refused where it is no number
        block = block or (max(1, depth // 3) if is_int(depth) else 1)
        tree["alignment"] = {**alignment, "block": block}
    return tree


def _messages(error: ValidationError) -> list[str]:
    """One clause per problem: the dotted path, the value, what was allowed."""
    out = []
    for e in error.errors(include_url=False):
        path = ".".join(str(p) for p in e["loc"])
        if e["type"] == "extra_forbidden":
            allowed = _keys_at(e["loc"][:-1])
            hint = nearest(str(e["loc"][-1]), allowed) or f" (known: {', '.join(sorted(allowed))})"
            out.append(f"{path}: unknown key{hint}")
        elif e["type"] == "missing":
            out.append(f"{path}: required key is missing")
        elif e["type"] == "value_error":
            out.append(e["msg"].removeprefix("Value error, "))
        else:
            out.append(f"{path}: {e['input']!r} is not allowed: {e['msg'].lower()}")
    return out


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    node: Any = Config
    for part in loc:
        if isinstance(part, int):
            continue
        field = node.model_fields[part].annotation
        inner = [a for a in getattr(field, "__args__", (field,)) if a is not Ellipsis]
        node = next(a for a in inner if isinstance(a, type) and issubclass(a, BaseModel))
    return list(node.model_fields)


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
