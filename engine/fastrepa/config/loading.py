"""A YAML file and dotted overrides (`training.steps=1000`) to one validated configuration.

`load_config` fills in what follows from other keys (a model's width from its name, the alignment
block from its depth), so that the configuration saved with a run says everything that was used.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fastrepa.config.sections import Config
from fastrepa.config.values import is_int, is_own
from fastrepa.errors import ConfigError, nearest, printable, shown, writing
from fastrepa.reading.text import dump_yaml, parse_yaml, read_yaml, whole_number, written
from fastrepa.runtime.files import write_whole

# REPA_SPEC "Generator": width, depth, heads, and the block that is aligned (1-based).
SIT_MODELS: dict[str, tuple[int, int, int, int]] = {
    "SiT-S": (384, 12, 6, 4),
    "SiT-B": (768, 12, 12, 4),
    "SiT-L": (1024, 24, 16, 8),
    "SiT-XL": (1152, 28, 16, 8),
}
PATCHES = (2, 4, 8)


# Where a user's own code can be named.
WITH_OWN = (
    ("training", "extra_losses"), ("vision", "encoders"), ("evaluation", "encoders"),
    ("evaluation", "metrics"),
)  # fmt: skip
SAVED = "config.yaml"  # a run's own configuration, by its name
_LEFT = ("metrics.jsonl", "rank_0.log")  # one of which is beside it, or checkpoints/
MOST_TOLD = 440  # characters of what is wrong with a file, the file's own name apart


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, run: Path | None = None
) -> Config:
    """The validated, resolved configuration from a YAML file and `path.to.key=value` overrides.

    path: a file, or the name of a recipe that comes with fastrepa, where no file is called so.
    run: the run's folder, whatever the file says. Otherwise a run's own file means the run that it
    lies in (`run_of`), unless an override names another.
    Raises ConfigError naming the file or the dotted key, the value, and what was allowed.
    """
    path = _found(Path(path))
    tree = read_yaml(path, ConfigError, as_written=True)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, got {_kind(tree)}")
    if own := run_of(path):
        tree["run"] = _as_path(own)
    tree = overridden(_anchored(tree, os.path.dirname(path)), overrides)
    if run is not None:
        tree["run"] = _as_path(run)
    return config_from_dict(tree, source=str(path))


def overridden(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a plain mapping with `path.to.key=value` set in it; ConfigError for one that is not
    written so. `tree` stays as it is.
    """
    out = copy.deepcopy(dict(tree))
    for override in overrides:
        _set(out, override)
    return out


def own_files(config: Config) -> list[str]:
    """The user's own code that a configuration names, each as FILE.py:NAME."""
    encoders = (*config.vision.encoders, *config.evaluation.encoders)
    named = [*(encoder.name for encoder in encoders), *(config.evaluation.metrics or ())]
    return [*(term.use for term in config.training.extra_losses), *filter(is_own, named)]


def _anchored(tree: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the tree with the user's own files, FILE.py:NAME, found from where the YAML lies."""

    def found(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: found(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [found(inner) for inner in value]
        own = is_own(value) and not value.startswith("~")
        return os.path.join(folder, value) if own else value

    out = dict(tree)
    for section, key in WITH_OWN:
        inside = out.get(section)
        if isinstance(inside, dict) and key in inside:
            out[section] = {**inside, key: found(inside[key])}
    return out


def _found(path: Path) -> Path:
    """The file itself, or the recipe of that name."""
    if os.path.isfile(path):
        return path
    from fastrepa.config.recipes import recipe_file, recipe_names

    if recipe := recipe_file(str(path)):
        return recipe
    if os.path.isdir(path):
        raise ConfigError(f"{path}: is a folder, not a YAML file")
    if not os.path.exists(path):
        there = os.path.isdir(path.parent)
        known = sorted(p.name for p in path.parent.glob("*.yaml")) if there else []
        close = nearest(path.name, [*known, *recipe_names()])
        raise ConfigError(
            f"{str(path)[:255]}: no such configuration file{close}; recipes that go by their name: "
            + ", ".join(recipe_names())
        )
    return path


def config_from_dict(tree: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validate and resolve a plain mapping, as `load_config` does with a file."""
    try:
        return Config.model_validate(_resolved(tree))
    except ValidationError as e:
        raise ConfigError(f"{source}: {_told(e)}") from None


def load_run_config(run: Path, overrides: Iterable[str] = ()) -> Config:
    """Load the configuration that a run was last trained with; its `run` is the folder given.

    Raises ConfigError where the folder is no run's.
    """
    if not (run / SAVED).is_file():
        raise ConfigError(f"{run}: not a run folder (no {SAVED})")
    return load_config(run / SAVED, overrides, run=run)


def run_folder(path: Path) -> Path:
    """The folder of the run that a path means: of a checkpoint the run that it lies in, otherwise
    the path itself.
    """
    inside = re.fullmatch(r"step_\d{7,19}", path.name) and path.parent.name == "checkpoints"
    return path.parent.parent if inside else path


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to the same object.

    Raises ConfigError naming a file that cannot be written; what was there then stays.
    """
    with writing(path):
        write_whole(path, dump_yaml(config.model_dump(mode="json")).encode())


def run_of(file: Path) -> Path | None:
    """The folder of the run whose own configuration a file is, itself or through a link; None for
    any other file.
    """
    for path in (file, Path(os.path.realpath(file))):
        left = any(os.path.exists(path.parent / name) for name in _LEFT)
        if path.name == SAVED and (left or _has_checkpoints(path.parent)):
            return path.parent if path.parent.name else path.parent.absolute()
    return None


def _has_checkpoints(folder: Path) -> bool:
    """Tell whether checkpoints/ in it may be a run's: projects keep others' in one of that name."""
    saved = folder / "checkpoints"
    try:
        names = os.listdir(saved)
    except (NotADirectoryError, FileNotFoundError):
        return False
    except OSError:  # not readable: the run that it may be says so
        return True
    return not names or any(os.path.isdir(saved / n) for n in names if n.startswith("step_"))


def told_of_folder(file: Path, run: str) -> str:
    """Say which run goes on where that is not what the file, loaded for `run`, is or says; or ''.

    A run is where its folder is, whatever name it had when its configuration was saved.
    """
    own = run_of(file)
    if own is None:
        return ""
    if not _same_folder(own, Path(run)):
        return f"{file} is of the run in {own}, run={run} is another one"
    before = str(read_yaml(file, ConfigError).get("run", run))
    if before == run or _same_folder(own, Path(before)):
        return ""
    return f"this is the run in {own}, where {file.name} lies, which says run: {before}"


def _same_folder(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _as_path(run: Path) -> str:
    """A path as the key `run` takes it: not as a home folder, nor as nothing."""
    text = str(run)
    return f"./{text}" if text.startswith("~") or not text.strip() else text


def _set(tree: dict[str, Any], override: str) -> None:
    what = f"override {shown(override)}"
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(f"{what}: expected path.to.key=value")
    value = parse_yaml(text, what, ConfigError, as_written=True)
    if not isinstance(value, dict | list) and re.search(r"^[^'\"]*(^|\s)#", text):
        raise ConfigError(f"{what}: a # after a space begins a comment; put the value in quotes")
    node: Any = tree
    for i, part in enumerate(parents):
        child = node.get(part) if isinstance(node, dict) else node[_position(node, part, what)]
        if child is None and isinstance(node, dict):
            child = node[part] = {}
        elif not isinstance(child, dict | list):
            raise ConfigError(f"{what}: {_dotted(parents[: i + 1])} is a value, it has no keys")
        node = child
    node[last if isinstance(node, dict) else _position(node, last, what)] = value


def _position(values: list[Any], part: str, what: str) -> int:
    position = whole_number(part)
    if position is None or position >= len(values):
        raise ConfigError(f"{what}: {shown(part)} is no position in a list of {len(values)}")
    return position


def _resolved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what follows from other keys; wrong types are left to pydantic."""
    tree = dict(tree)
    for section, key in (("data", "path"), ("evaluation", "reference")):
        values = tree.get(section)
        if not isinstance(values, Mapping):
            continue
        where = values.get(key)
        if isinstance(where, str) and not os.path.exists(where):
            from fastrepa.config.recipes import of_the_install

            tree[section] = {**values, key: of_the_install(where)}
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
    name, block = written(model.get("name")), None
    if isinstance(name, str):
        base, _, patch = name.partition("/")
        names = [f"{b}/{p}" for b in SIT_MODELS for p in PATCHES]
        if name not in names:
            raise ConfigError(
                f"model.name: {shown(name)} is not one of {', '.join(names)}{nearest(name, names)}"
            )
        width, depth, heads, block = SIT_MODELS[base]
        shape = {"width": width, "depth": depth, "heads": heads, "patch": int(patch)}
        for key, value in shape.items():
            if model.get(key, value) not in (value, None):
                raise ConfigError(
                    f"model.{key}: {shown(model[key])} contradicts model.name {name!r}, whose "
                    f"{key} is {value}; leave one of them out"
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


def _told(error: ValidationError) -> str:
    """Say what is wrong, problem by problem, as far as there is room for."""
    problems = error.errors(include_url=False)
    told = _clause(problems[0])[:MOST_TOLD]
    for count, problem in enumerate(problems[1:], 1):
        clause = _clause(problem)
        if len(told) + len(clause) > MOST_TOLD:
            return f"{told}; and {len(problems) - count} more"
        told += f"; {clause}"
    return told


def _clause(problem: ErrorDetails) -> str:
    """One clause: the dotted path, the value, what was allowed."""
    loc, kind = problem["loc"], problem["type"]
    path, why = _dotted(loc), problem["msg"]
    if kind == "extra_forbidden":
        allowed = _keys_at(loc[:-1])
        hint = nearest(str(loc[-1]), allowed) or f" (known: {', '.join(sorted(allowed))})"
        return f"{path}: unknown key{hint}"
    if kind == "missing":
        return f"{path}: required key is missing"
    if kind == "address":  # which may hold a secret
        return f"{path}: {why}"
    if kind == "value_error":
        return why.removeprefix("Value error, ")
    return f"{path}: {shown(problem['input'])} is not allowed: {why[:1].lower()}{why[1:]}"


def _dotted(parts: Iterable[str | int]) -> str:
    names = (printable(part) for part in parts)
    return ".".join(p if len(p) <= 80 else f"{p[:77]}..." for p in names)


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
