"""The keys of the configuration as they are told about: to people in words, to editors in a schema.

Both are made from the sections' own fields, so that a key which is there is also told about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastrepa.config.loading import PATCHES, SIT_MODELS
from fastrepa.config.sections import MAX_EMAS, Config
from fastrepa.config.values import FROM_NAME, LARGEST
from fastrepa.errors import ConfigError, nearest, shown
from fastrepa.reading.text import dump_yaml

_Schema = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One key, or a section of keys, by its dotted path; the entries of a list are `.0`.

    default: as YAML; None where there is none. without: how it comes to a value then. allowed: in
    words. Both are '' of a section.
    """

    path: str
    default: str | None
    without: str
    allowed: str
    description: str

    @property
    def is_section(self) -> bool:
        return not self.allowed


@cache
def all_keys() -> tuple[Key, ...]:
    """Return every key in the order of the sections, each section before its keys."""
    tree = schema()
    return tuple(_keys_in(tree, "", tree["$defs"]))


def find_keys(path: str) -> list[Key]:
    """Return the key of that path and, of a section, those in it; of a list any number is meant.

    Raises ConfigError, with the nearest that there is, for a path that is no key's.
    """
    wanted = _without_places(path)
    found = [k for k in all_keys() if f"{_without_places(k.path)}.".startswith(f"{wanted}.")]
    if not found:
        paths = [key.path for key in all_keys()]
        ends = [known for known in paths if known.endswith(f".{wanted}")]
        hint = f" (did you mean {' or '.join(map(repr, ends[:3]))}?)" if ends else ""
        raise ConfigError(
            f"{shown(path)}: no key of the configuration{hint or nearest(wanted, paths)}; "
            f"`fastrepa config` lists them"
        )
    return found


def values_of(config: Config) -> list[tuple[str, str, Key]]:
    """List (path, YAML of the value, its key) of every value that a configuration has."""
    known = {_without_places(key.path): key for key in all_keys()}
    found = _values_in(config.model_dump(mode="json"), "")
    return [(path, value, known[_without_places(path)]) for path, value in found]


def schema() -> _Schema:
    """Return the JSON schema (draft 7) of a configuration as it is written: before `load_config`
    fills in what follows from other keys.
    """
    tree = _plain(Config.model_json_schema())
    sections = tree["$defs"]
    for section in (tree, *sections.values()):
        keys = section["properties"]
        filled_in = {name for name, key in keys.items() if FROM_NAME.items() <= key.items()}
        for name in filled_in:
            _or_null(keys[name])
        section["required"] = [n for n in section.get("required", ()) if n not in filled_in]
    tree["required"].remove("alignment")  # all of which may be left out
    model = sections["ModelConfig"]
    names = [f"{base}/{patch}" for base in SIT_MODELS for patch in PATCHES]
    model["properties"]["name"]["anyOf"] = [{"enum": names}, _NULL]
    model["anyOf"] = [{"required": ["name"]}, {"required": ["width", "depth", "heads", "patch"]}]
    averages = sections["TrainingConfig"]["properties"]["ema"]
    decay = sections["EmaConfig"]["properties"]["decay"]["anyOf"][0]
    one = [decay, averages.pop("items")]
    several = {"type": averages.pop("type"), "minItems": 1, "maxItems": MAX_EMAS}
    averages["anyOf"] = [*one, {**several, "items": {"anyOf": one}}]
    terms = sections["TrainingConfig"]["properties"]["extra_losses"]
    terms["items"] = {"anyOf": [{"type": "string"}, terms["items"]]}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **tree}


def _plain(node: Any) -> Any:
    """The schema without titles, which say a key's name again, and with lists as draft 7 has them;
    descriptions in one line.
    """
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain: _Schema = {
        name: {key: _plain(value) for key, value in inner.items()}
        if name in ("properties", "$defs")
        else _plain(inner)
        for name, inner in node.items()
        if name != "title"
    }
    if items := plain.pop("prefixItems", None):
        plain["items"] = items[0]
    if "description" in plain:
        plain["description"] = " ".join(plain["description"].split())
    return plain


def _or_null(key: _Schema) -> None:
    bounds = {name: key.pop(name) for name in list(key) if name in _TYPE}
    key["anyOf"] = [bounds, _NULL]


_NULL: _Schema = {"type": "null"}
_TYPE = ("type", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


# In words -------------------------------------------------------------------------------------


def _keys_in(section: _Schema, path: str, sections: _Schema) -> Iterator[Key]:
    for name, key in section["properties"].items():
        inner, entry = _section_of(key)
        here = f"{path}{name}"
        said = [key.get("description", ""), sections[inner]["description"] if inner else ""]
        description = ". ".join(part for part in said if part)
        if "$ref" in key:
            yield Key(here, None, "", "", description)
        else:
            default = as_yaml(key["default"]) if "default" in key else None
            without = f"from {key['x-from']}" if "x-from" in key else "required"
            without = without if default is None else ""
            yield Key(here, default, without, _either(_choices(key)), description)
        if inner:
            yield from _keys_in(sections[inner], f"{here}{entry}.", sections)


def _section_of(key: _Schema) -> tuple[str, str]:
    """The name of the section that a key is or holds, or ''; and '.0' where in a list."""
    kinds = [key, *key.get("anyOf", ())]
    items = [item for kind in kinds for item in _alternatives(kind.get("items", {}))]
    for places, entry in ((items, ".0"), (kinds, "")):
        for place in places:
            if "$ref" in place:
                return place["$ref"].rpartition("/")[2], entry
    return "", ""


def _alternatives(kind: _Schema) -> list[_Schema]:
    alternatives: list[_Schema] = kind.get("anyOf", [kind])
    return sorted(alternatives, key=lambda each: each != _NULL)  # null is said first


def _choices(kind: _Schema) -> list[str]:
    """List in words what a schema allows: 'auto', 'a whole number from 1'."""
    if "anyOf" in kind:
        nothing = "x-from" in kind  # as if it were left out: not worth saying
        each = [one for one in _alternatives(kind) if not (nothing and one == _NULL)]
        return [choice for one in each for choice in _choices(one)]
    if "$ref" in kind:
        return ["a section"]
    values = kind.get("enum", [kind["const"]] if "const" in kind else [])
    if values:
        return [as_yaml(value) for value in values]
    name = kind["type"]
    if name == "array":
        least, most = kind.get("minItems", 0), kind.get("maxItems")
        count = f" of {least if least == most else f'{least} to {most}'}" if most else ""
        items = _either(_choices(kind["items"]))
        return [f"a list{count} of sections" if items == "a section" else f"a list{count}: {items}"]
    return {
        "null": ["null"],
        "boolean": ["true", "false"],
        "string": ["text"],
        "integer": [f"a whole number{_bounds(kind, 1)}"],
        "number": [f"a number{_bounds(kind, 0)}"],
    }[name]


def _bounds(kind: _Schema, step: int) -> str:
    """From where to where a number may be; `step`: to the next one, 0 where there is none."""
    said = ""
    if "minimum" in kind:
        said += f" from {kind['minimum']:g}"
    elif "exclusiveMinimum" in kind:
        above = kind["exclusiveMinimum"]
        said += f" from {above + step}" if step else f" above {above:g}"
    if "exclusiveMaximum" in kind:
        said += f" below {kind['exclusiveMaximum']:g}"
    elif kind.get("maximum", LARGEST) != LARGEST:
        said += f" to {kind['maximum']:g}"
    return said


def _either(choices: list[str]) -> str:
    *before, last = choices
    return f"{', '.join(before)} or {last}" if before else last


def as_yaml(value: Any) -> str:
    """A value as it could stand in the YAML file, in one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    lines = dump_yaml(value).removesuffix("...\n").strip().splitlines()
    return " ".join(line.strip() for line in lines)  # a long text is folded at its spaces


def _values_in(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every value by its path; lists are values, but for those of sections."""
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        inner = [(str(place), item) for place, item in enumerate(value)]
    else:
        yield path, as_yaml(value)
        return
    for name, item in inner:
        yield from _values_in(item, f"{path}.{name}" if path else name)


def _without_places(path: str) -> str:
    """The path without the numbers of entries in lists; no key is called by a number."""
    return re.sub(r"\.[0-9]+(?=\.|$)", "", path.strip("."))
