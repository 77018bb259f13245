"""The command line: `fastrepa train`, `plan`, `profile`, `bench`, `prepare`, ... (see `--help`).

Imports of torch and its friends stay inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer

from fastrepa.cli import runs, data, insight  # isort: skip  # the order of --help
from fastrepa.cli.app import app, data_app
from fastrepa.errors import ConfigError, FastrepaError, print_error, printable
from fastrepa.runtime.exit_codes import for_launcher
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import launched_world

__all__ = ["app", "data", "data_app", "insight", "main", "runs"]


def main() -> None:
    """The console script: a user's error is one line on stderr and a non-zero exit."""
    as_usual = warnings.formatwarning

    def shown(message: Any, *where: Any, **more: Any) -> str:
        return as_usual(printable(message), *where, **more)

    warnings.formatwarning = shown
    try:
        _refuse_empty(sys.argv[1:])
        code = app(standalone_mode=False) or 0
    except FastrepaError as e:
        print_error(e, _rank())
        code = 1
    except (KeyboardInterrupt, typer.Abort) as e:
        if isinstance(e.__cause__, EOFError):  # typer's way with a file that ends too early
            raise e.__cause__ from None
        say("fastrepa: interrupted", file=sys.stderr)
        code = 130
    except SystemExit as e:
        code = e.code
    except Exception as e:
        # What was typed wrongly: click's errors, or those of typer's own copy of click.
        if not hasattr(e, "format_message"):
            raise
        command = getattr(getattr(e, "ctx", None), "command_path", "fastrepa")
        if said := e.format_message():  # none of a help page
            print_error(f"{said} (see {command} --help)", 0)
        code = getattr(e, "exit_code", 2)
    sys.exit(for_launcher(code) if isinstance(code, int) else code)


def _refuse_empty(words: list[str]) -> None:
    """Raise ConfigError for an argument without a letter, which a path would take for "here"."""
    for before, word in zip(["fastrepa", *words], words, strict=False):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if not value and (equals or not option):
            where = option or f"after {before!r}"
            raise ConfigError(f"{where}: an empty argument, perhaps of a shell variable not set")


def _rank() -> int:
    try:
        return launched_world().rank
    except ConfigError:  # which may be the very error
        return 0
