"""The command line: `fastrepa train`, `plan`, `profile`, `bench`, `prepare`, ... (see `--help`).

Imports of torch and its friends stay inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import typer

from fastrepa.cli import runs, data, insight, catalog  # isort: skip  # the order of --help
from fastrepa.cli.app import app, data_app
from fastrepa.errors import ConfigError, FastrepaError, lacking, print_error, printable, worded
from fastrepa.runtime.exit_codes import for_launcher
from fastrepa.runtime.terminal import say
from fastrepa.runtime.threads import before_torch
from fastrepa.runtime.world import stated_rank

__all__ = ["app", "catalog", "data", "data_app", "insight", "main", "runs"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


def main() -> None:
    """The console script: a user's error is one line on stderr and a non-zero exit."""
    _open_closed_streams()
    warnings.formatwarning = _in_a_line
    try:
        _refuse_empty(sys.argv[1:])
        before_torch()
        code = app(standalone_mode=False) or 0
    except FastrepaError as e:
        print_error(e, stated_rank())
        code = 1
    except (KeyboardInterrupt, typer.Abort) as e:
        if isinstance(e.__cause__, EOFError):  # typer's way with a file that ends too early
            raise e.__cause__ from None
        if stated_rank() == 0:  # Ctrl-C comes to all
            say("fastrepa: interrupted", file=sys.stderr)
        code = 130
    except SystemExit as e:
        code = e.code
    except Exception as e:
        code = _of_the_machine(e)
        if code is None:
            raise
    sys.exit(for_launcher(code) if isinstance(code, int) else code)


def _open_closed_streams() -> None:
    """Give streams that the shell closed (`>&-`) somewhere to go: the next file to be opened would
    get their number, and what C libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def _of_the_machine(error: Exception) -> int | None:
    """Print in a line what is no fault of the code, and return the exit code: what was typed, what
    is not installed, a disk or a memory that is too small. None: anything else.
    """
    # What was typed wrongly: click's errors, or those of typer's own copy of click.
    if hasattr(error, "format_message"):
        command = getattr(getattr(error, "ctx", None), "command_path", "fastrepa")
        if said := error.format_message():  # none of a help page
            print_error(f"{said} (see {command} --help)", 0)
        return int(getattr(error, "exit_code", 2))
    missing = lacking(error) if isinstance(error, ModuleNotFoundError) else None
    if missing or isinstance(error, MemoryError):
        print_error(missing or worded(error), stated_rank())
    elif isinstance(error, OSError) and (
        error.filename or error.errno in _NO_ROOM or "temporary directory" in str(error)
    ):  # the last is Python's, where no place for temporary files has room
        where = f"{error.filename}: " if error.filename else ""
        print_error(f"{where}{worded(error)}", stated_rank())
    else:
        return None
    return 1


def _in_a_line(message: Any, category: type, filename: str, lineno: int, line: Any = None) -> str:
    """A warning of ours, and one of a library with where it comes from; Python's way has a second
    line, of source.
    """
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {printable(message)}\n"
    text = printable(" ".join(str(message).split()))
    return f"{filename}:{lineno}: {category.__name__}: {text}\n"


def _refuse_empty(words: list[str]) -> None:
    """Raise ConfigError for an argument without a letter, which a path would take for "here"."""
    for before, word in zip(["fastrepa", *words], words, strict=False):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if not value and (equals or not option):
            where = option or f"after {before!r}"
            raise ConfigError(f"{where}: an empty argument, perhaps of a shell variable not set")
