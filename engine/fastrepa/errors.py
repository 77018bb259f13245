"""Errors that are the user's to mend: the command line prints each on one line, no traceback."""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class FastrepaError(Exception):
    """Base of every error whose message names what is wrong and what was allowed."""


class ConfigError(FastrepaError):
    """A key or value of the configuration, named by its dotted path."""


class DataError(FastrepaError):
    """A file, shard or sample of a data set, named."""


class WeightsError(FastrepaError):
    """Pretrained weights of an encoder or codec that are missing or do not fit."""


class CheckpointError(FastrepaError):
    """A checkpoint that is missing, damaged or of another architecture."""


class TrainingError(FastrepaError):
    """A run that cannot go on: a rank was lost, or its numbers are not finite any more."""


class GivenUp(FastrepaError):
    """A signal's number: it asked for a stop while something dispensable was done."""


def printable(text: object) -> str:
    """`text` as it is safe on a terminal: control characters and stray bytes become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


_MOST = 80
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = _MOST
_brief.maxlevel = 4


def shown(value: object) -> str:
    """`value` as an error echoes it: Python's way to write it, of at most 80 characters."""
    try:
        text = _brief.repr(value)
    except ValueError:  # a whole number of too many digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _MOST else text[: _MOST - 3] + "..."


def worded(error: BaseException | str, most: int = 300) -> str:
    """Return why something failed, for the end of a line of ours: in one line, and never nothing.

    Of the system's errors these are its words alone, without number and file.
    """
    if "unexpected pos" in str(error):  # torch, after a write that failed
        before = getattr(error, "__context__", None)
        error = before if isinstance(before, OSError) else "no room left, or a damaged disk"
    text = getattr(error, "strerror", None) or error
    text = " ".join(str(text).split())
    if not text:
        text = "not enough memory" if isinstance(error, MemoryError) else type(error).__name__
    return text if len(text) <= most else f"{text[:most].rstrip()} ..."


# What extras other than `train` bring.
_EXTRAS = {"diffusers": "vae", "pyarrow": "parquet", "torch_fidelity": "eval", "open_clip": "clip"}


def lacking(error: ModuleNotFoundError) -> str | None:
    """Say what to install for a module that is not there; None where it is one of the house's."""
    module = (error.name or "").partition(".")[0]
    if not module or module.startswith("fastrepa"):
        return None
    if module == "torch":
        return "fastrepa needs torch: pip install torch"
    extra = _EXTRAS.get(module, "train")
    return f"fastrepa's commands need more: pip install 'fastrepa[{extra}]' (no {module} here)"


def print_error(text: object, rank: int) -> None:
    """Print an error on one line of stderr, naming every rank but the first."""
    where = f" (rank {rank})" if rank else ""
    # One write, the line's end included: ranks share the terminal.
    sys.stderr.write(f"fastrepa: error{where}: {printable(' '.join(str(text).split()))}\n")
    sys.stderr.flush()


@contextmanager
def writing(what: object, kind: type[FastrepaError] = ConfigError) -> Iterator[None]:
    """Make of the block's OSError an error of that kind, which names what cannot be written."""
    try:
        yield
    except OSError as e:
        raise kind(f"{what}: cannot be written ({worded(e)})") from None


def print_warning(text: object) -> None:
    """Print a warning on one line of stderr."""
    sys.stderr.write(f"warning: {printable(text)}\n")
    sys.stderr.flush()


@contextmanager
def decoration(what: object, warn: Callable[[str], None] = print_warning) -> Iterator[None]:
    """Around a picture, or the like, beside work that is done: should it fail, for whatever reason,
    `warn` is told in a line, and the work stands.
    """
    try:
        yield
    except OSError as e:
        warn(f"{what}: cannot be written ({worded(e)}); the rest goes on")
    except Exception as e:  # libraries of pictures raise almost anything
        kind = "" if isinstance(e, FastrepaError) else f"{type(e).__name__}: "
        warn(f"{what}: left out ({kind}{worded(e)}); the rest goes on")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ' (did you mean X?)' where something close to `word` is allowed, otherwise ''."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
