"""The values that a key of the configuration takes: numbers, words and paths."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    PlainSerializer,
    PlainValidator,
)
from pydantic_core import PydanticCustomError

from fastrepa.errors import ConfigError
from fastrepa.reading.text import address, expanded, is_address, written

# What `load_config` fills in from the model's name, where the file does not say it.
FROM_NAME: dict[str, JsonValue] = {"x-from": "model.name"}

LARGEST = 2**63 - 1  # of a whole number that torch takes

Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


def is_int(value: Any) -> bool:
    """Tell whether a value read from YAML is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _number_or(least: int, words: Any) -> PlainValidator:
    """Accepts a whole number from `least` on, or a word of that Literal; one refusal says both."""

    def check(value: Any) -> Any:
        if is_int(value) and least <= value <= LARGEST:
            return int(value)
        if value in get_args(words):
            return value
        allowed = f"expected {' or '.join(get_args(words))} or a number from {least}"
        raise PydanticCustomError("number_or_word", "{allowed}", {"allowed": allowed})

    number = Annotated[int, Field(ge=least, le=LARGEST)]
    return PlainValidator(check, json_schema_input_type=words | number)


def _bool_or_auto(value: Any) -> Any:
    if isinstance(value, bool) or value == "auto":
        return value
    raise PydanticCustomError("bool_or_auto", "expected true, false or auto")


_Auto = Literal["auto"]
_NoneOrAuto = Literal["none", "auto"]

NumberOrAuto = Annotated[int | _Auto, _number_or(0, _Auto)]
PositiveOrAuto = Annotated[int | _Auto, _number_or(1, _Auto)]
BoolOrAuto = Annotated[
    bool | _Auto, PlainValidator(_bool_or_auto, json_schema_input_type=bool | _Auto)
]
Recompute = Annotated[int | _NoneOrAuto, _number_or(1, _NoneOrAuto)]
# A number wherever it is used: data/datasets.py makes one of auto before that.
# Written as it is: pydantic would warn of a word.
ClassCount = Annotated[int, _number_or(1, _Auto), PlainSerializer(lambda count: count)]


def _text(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("word", "without quotes it is true or false, with them text")
    return written(value)


def _path(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("path", "a path cannot be empty")
    try:
        return expanded(text)
    except ConfigError as e:
        raise PydanticCustomError("path", "{why}", {"why": str(e)}) from None


def _set_path(text: str) -> str:
    if is_address(text):
        try:
            return address(text)
        except ConfigError as e:
            raise PydanticCustomError("address", "{why}", {"why": str(e)}) from None
    if found := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise PydanticCustomError(
            "address", "{found} is none of https://, http://, s3:// and gs://", {"found": found[0]}
        )
    return _path(text)


OWN = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)")


def is_own(text: object) -> bool:
    """Tell whether a value names code in a file of the user's: FILE.py:NAME."""
    return isinstance(text, str) and OWN.fullmatch(text) is not None


def _own_code(text: str) -> str:
    if not is_own(text):
        raise PydanticCustomError("own_code", "expected FILE.py:NAME, such as my_loss.py:edges")
    return os.path.abspath(_path(text))


def _name_or_own(text: str) -> str:
    return _own_code(text) if is_own(text) else text


# What YAML takes for a number is text here, as it is written: a run called 0123 keeps its 0.
Text = Annotated[str, BeforeValidator(_text)]
# Also of what is a path only among other things: hub ids and words begin with no ~.
PathText = Annotated[Text, AfterValidator(_path)]
# A data set: in a folder, or at an address, which is not made a path.
SetPath = Annotated[Text, AfterValidator(_set_path)]
# Code in a file of the user's, FILE.py:NAME, and a name that may be one.
OwnCode = Annotated[Text, AfterValidator(_own_code)]
NameOrOwn = Annotated[Text, AfterValidator(_name_or_own)]
