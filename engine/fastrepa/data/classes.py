"""Classes as people name them: a class is its number, and its name is text.

Names need not differ from one another, nor from numbers: ImageNet has two cranes, and folders are
called 1, 10, 11, 2.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import zip_longest

from fastrepa.errors import ConfigError, FastrepaError, nearest, printable

_NUMBER = re.compile(r"#?([0-9]{1,9})")
_LISTED = 20  # names in a message


def same_name(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): one text for what is one name to people."""
    return unicodedata.normalize("NFC", name)


def written_form(name: str) -> str:
    """A name as sets store it: `same_name`, with what is invisible as an escape."""
    return printable(same_name(name))


def first_difference(
    before: Sequence[str], after: Sequence[str]
) -> tuple[int, str | None, str | None] | None:
    """The first number whose names differ, and both; None for a name that is not there."""
    for number, (was, now) in enumerate(zip_longest(before, after)):
        if was is None or now is None or written_form(was) != written_form(now):
            return number, was, now
    return None


def named(names: Sequence[str], number: int) -> str:
    """The name of a class, with its number where the name alone would not say which it is."""
    if number >= len(names):
        return f"#{number}"
    name = written_form(names[number])
    unclear = _NUMBER.fullmatch(name) and name != str(number)
    return f"{name} (#{number})" if unclear or list(names).count(names[number]) > 1 else name


def choose_classes(
    requested: Sequence[str | int] | None,
    names: Sequence[str],
    num_classes: int,
    *,
    kind: type[FastrepaError] = ConfigError,
    option: str = "--classes",
    say: Callable[[str], None] = lambda text: None,
) -> list[int]:
    """Class numbers from what `option` was given; all classes where that is nothing.

    Each of `requested` is one name, or else names and numbers with commas. A name wins over a
    number that is written alike, and `say` is told so; #3 is always number 3. Letter case matters
    only where two names differ in nothing else. Raises an error of `kind` for the first that is no
    class, and for a name that several classes have.
    """
    if not requested:
        return list(range(num_classes))
    choice = _Choice(names, num_classes, kind, option, say)
    chosen = []
    for item in map(str, requested):
        found = choice.by_name(item)
        if found is not None:
            chosen.append(found)
            continue
        chosen += [choice.one(part) for part in item.split(",") if part.strip()]
    return chosen or list(range(num_classes))


class _Choice:
    """The classes of one set or run, by name and by number."""

    def __init__(
        self,
        names: Sequence[str],
        num_classes: int,
        kind: type[FastrepaError],
        option: str,
        say: Callable[[str], None],
    ) -> None:
        self.names, self.num_classes = names, num_classes
        self.kind, self.option, self.say = kind, option, say
        self.exact: dict[str, list[int]] = {}
        self.folded: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            form = written_form(name)
            self.exact.setdefault(form, []).append(number)
            self.folded.setdefault(form.casefold(), []).append(number)

    def one(self, text: str) -> int:
        """The class of one name or number."""
        found = self.by_name(text)
        if found is None:
            found = self._by_number(text.strip())
        if found is None:
            raise self._no_class(text.strip())
        return found

    def by_name(self, text: str) -> int | None:
        """The class of this whole name, None where there is no such name."""
        form = written_form(text.strip())
        found = self.exact.get(written_form(text)) or self.exact.get(form, [])
        if not found and len(alike := self.folded.get(form.casefold(), [])) == 1:
            found = alike
        if len(found) > 1:
            numbers = " and ".join(map(str, found))
            raise self.kind(
                f"{self.option}: {text.strip()!r} is the name of {len(found)} classes, numbers "
                f"{numbers}; give {self._as_typed(found[0])} or {self._as_typed(found[1])}"
            )
        if not found:
            return None
        number = _number(text)
        if number is not None and number != found[0] and number < len(self.names):
            self.say(
                f"{self.option} {text.strip()}: the class of that name is taken, number "
                f"{found[0]}; class number {number}, {self.names[number]!r}, is '#{number}'"
            )
        return found[0]

    def _by_number(self, text: str) -> int | None:
        number = _number(text)
        if number is None or number >= self.num_classes:
            return None
        numbers_as_names = any(_number(n) not in (None, i) for i, n in enumerate(self.names))
        if numbers_as_names and number < len(self.names) and not text.startswith("#"):
            self.say(
                f"{self.option} {text}: no class has that name; class number {number} is taken, "
                f"{self.names[number]!r}"
            )
        return number

    def _as_typed(self, number: int) -> str:
        return f"'#{number}'" if str(number) in self.exact else str(number)

    def _no_class(self, text: str) -> FastrepaError:
        names = [written_form(name) for name in self.names]
        allowed = f"a class is a number from 0 to {self.num_classes - 1}"
        if 0 < len(names) <= _LISTED:
            listed = (named(self.names, number) for number in range(len(names)))
            allowed += f", or one of: {', '.join(listed)}"
        elif names:
            allowed += ", or a class name"
        if any("," in name for name in names):
            allowed += f"; a name with a comma is a {self.option} of its own"
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        return self.kind(f"{self.option}: {shown!r} is no class{nearest(text, names)}; {allowed}")


def _number(text: str) -> int | None:
    found = _NUMBER.fullmatch(text.strip())
    return int(found[1]) if found else None
