"""JSON, YAML and paths, read so that what is wrong is one line that names where it stands.

YAML is 1.2's core schema: 010 is ten, and 1:30, dates and 0x_ are text. As configurations were
always written, yes, no, on and off are booleans too, 400_000 and 1e-4 are numbers, and `<<` merges
mappings into another one, whose own keys win. Keys are text. Aliases are copies, and are counted.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from fastrepa.errors import ConfigError, DataError, FastrepaError, shown

MAX_YAML_BYTES = 500_000
MAX_YAML_VALUES = 20_000  # of a text whose aliases are written out
MAX_DIGITS = 400  # more than any double has

_TAG = "tag:yaml.org,2002:"
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_PLAIN = (  # how a value without quotes is understood: the first that fits, or else as text
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "|".join(f"{w}|{w.title()}|{w.upper()}" for w in _TRUE + _FALSE), list("tTyYoOfFnN")),
    ("int", r"[-+]?([0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9]+(_[0-9]+)*(\.([0-9]+(_[0-9]+)*)?)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
)  # fmt: skip


def read_json(path: Path, kind: type[FastrepaError] = DataError) -> Any:
    """Return the value in a JSON file; an error of `kind` names a file that holds none."""
    return parse_json(_bytes_of(path, kind), path, kind)


def parse_json(text: str | bytes, what: object, kind: type[FastrepaError] = DataError) -> Any:
    """Return the value that `text` says; an error of `kind` names `what`, where it stands."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise kind(f"{what}: not valid JSON (nested too deeply)") from None
    except ValueError as e:  # bytes that are no text, too
        # Python's words for such a number are advice on its own settings.
        why = "a number of too many digits" if "digits" in str(e) else e
        raise kind(f"{what}: not valid JSON ({why})") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return found


def read_yaml(
    path: Path, kind: type[FastrepaError] = DataError, *, as_written: bool = False
) -> Any:
    """Return the value in a YAML file, as `parse_yaml` does; an error names the file."""
    raw = _bytes_of(path, kind, MAX_YAML_BYTES + 1)
    if len(raw) > MAX_YAML_BYTES:
        raise kind(f"{path}: not valid YAML (larger than {MAX_YAML_BYTES // 1000} kB)")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise kind(f"{path}: not valid YAML (byte {e.start} is not UTF-8)") from None
    return parse_yaml(text, path, kind, as_written=as_written)


def parse_yaml(
    text: str, what: object, kind: type[FastrepaError] = DataError, *, as_written: bool = False
) -> Any:
    """Return the value that `text` says; an error of `kind` names `what`, where it stands.

    Mappings (keys: text), lists, text, numbers, booleans and None: no node occurs twice.
    as_written: numbers remember how they were written, for what takes text (`written`).
    """
    try:
        node = _composed(text)
        return None if node is None else _Builder(as_written).value(node)
    except RecursionError:
        raise kind(f"{what}: not valid YAML: nested too deeply") from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = " ".join(f"{e.context or ''} {e.problem or ''}".split())
        raise kind(f"{what}: not valid YAML: {why[:160]}{where}") from None
    except yaml.reader.ReaderError as e:
        where = f"character {e.position + 1}"
        raise kind(f"{what}: not valid YAML: {where} is a control one or not UTF-8") from None
    except ValueError as e:  # what the builder refuses
        raise kind(f"{what}: not valid YAML: {e}") from None


def dump_yaml(value: Any) -> str:
    """Return YAML that `parse_yaml`, and any reader of YAML 1.1, reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def written(value: Any) -> Any:
    """A number that `parse_yaml` was to keep as it is written, as that text; others as they are."""
    return value.text if isinstance(value, _Written) else value


def whole_number(text: str) -> int | None:
    """The number that 1 to 18 ASCII digits say; None for any other text, signs and ² included."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def expanded(path: str) -> str:
    """`path` with the home folder that its ~ or ~NAME stands for.

    Raises ConfigError where no such user has one. A folder called ~NAME is meant by its whole path.
    """
    found = os.path.expanduser(path)
    if path.startswith("~") and found == path:
        raise ConfigError(
            f"{path}: there is no such home folder; what is called so needs its whole path"
        )
    return found


_ADDRESS = re.compile(r"(https?|s3|gs):/+(?=[^/])")


def is_address(path: object) -> bool:
    """Tell whether a path means files elsewhere: https://, http://, s3:// or gs://."""
    return _ADDRESS.match(str(path)) is not None


def address(text: str) -> str:
    """Return an address as it is compared and recorded: two slashes, and none at its end.

    Raises ConfigError, which does not repeat it, for one that may hold a secret.
    """
    found = _ADDRESS.match(text)
    assert found is not None
    host, slash, rest = text[found.end() :].partition("/")
    if "@" in host or "?" in rest or "#" in rest:
        raise ConfigError(
            f"an address of {found[1]}:// is taken without user, password, ? and #, as it is "
            "recorded with the run; credentials come from the environment or ~/.netrc"
        )
    return f"{found[1]}://{host}{slash}{rest}".rstrip("/")


def _bytes_of(path: Path, kind: type[FastrepaError], most: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except (OSError, ValueError) as e:  # a name with a NUL in it
        why = getattr(e, "strerror", None) or e
        raise kind(f"{path}: cannot be read ({why})") from None


class _Written:
    text: str

    def __repr__(self) -> str:
        return self.text


class _WrittenInt(_Written, int):
    pass


class _WrittenFloat(_Written, float):
    pass


class _Loader(yaml.SafeLoader):
    """Finds nodes and says how plain ones are understood; `_Builder` makes the values."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Puts text into quotes that YAML 1.1 or `_Loader` would take for something else."""


def _in_full(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """In double quotes what yaml would otherwise fold, and so lose, as \\x85."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _in_full)
for _name, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def _composed(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except (ValueError, OverflowError):  # chr's
        raise ValueError("an escape in quotes that is no character") from None


class _Builder:
    """Values of nodes, each made anew wherever an alias stands for it."""

    def __init__(self, as_written: bool) -> None:
        self._as_written = as_written
        self._left = MAX_YAML_VALUES

    def value(self, node: yaml.Node) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {MAX_YAML_VALUES:,} values, aliases written out")
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.value(item) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and tag in _SCALARS:
            return self._scalar(_text(node), tag, _line(node))
        raise ValueError(f"the tag {shown(node.tag)} in {_line(node)} is not one that is read")

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] | None = None
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"the key in {_line(key_node)} is no word")
            key = _text(key_node)
            is_merge = key_node.tag == _TAG + "merge"
            if key in own or (is_merge and merged is not None):
                raise ValueError(f"the key {shown(key)} stands there twice, in {_line(key_node)}")
            if is_merge:
                merged = self._merged(value_node)
            else:
                own[key] = self.value(value_node)
        return {**(merged or {}), **own}

    def _merged(self, node: yaml.Node) -> dict[str, Any]:
        """Return what `<<` brings: of several mappings the first that has a key counts."""
        found: dict[str, Any] = {}
        for each in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            value = self.value(each)
            if not isinstance(value, dict):
                raise ValueError(f"<< in {_line(each)} takes mappings")
            found = {**value, **found}
        return found

    def _scalar(self, text: str, tag: str, line: str) -> Any:
        if tag in ("int", "float") and len(text) > MAX_DIGITS:
            raise ValueError(f"a number of {len(text):,} digits in {line}")
        try:
            value = _SCALARS[tag](text)
        except (ValueError, KeyError):
            raise ValueError(f"{shown(text)} in {line} is no {tag}") from None
        if self._as_written and tag in ("int", "float"):
            value = _WrittenInt(value) if tag == "int" else _WrittenFloat(value)
            value.text = text
        return value


def _text(node: yaml.ScalarNode) -> str:
    text: str = node.value
    if "\0" in text:
        raise ValueError(f"a NUL character in {_line(node)}")
    if re.search("[\ud800-\udfff]", text):  # escapes of half a character
        raise ValueError(f"no character in {_line(node)}: {shown(text)}")
    return text


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _int(text: str) -> int:
    digits = text.replace("_", "")
    if re.fullmatch("[-+]?[0-9]+", digits):
        return int(digits)
    return int(digits, 8 if "o" in digits else 16)


def _float(text: str) -> float:
    word = text.replace("_", "").lower()
    return float(re.sub(r"\.(?=inf|nan)", "", word))


_SCALARS: dict[str, Any] = {
    "str": str,
    "null": {"": None, "~": None, "null": None, "Null": None, "NULL": None}.__getitem__,
    "bool": lambda text: {w: w in _TRUE for w in _TRUE + _FALSE}[text.lower()],
    "int": _int,
    "float": _float,
    "merge": str,
}
