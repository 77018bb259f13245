"""The command line's two groups, and what several commands take."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fastrepa import __version__
from fastrepa.cli.help import ReadableCommand, ReadableGroup
from fastrepa.errors import ConfigError, DataError
from fastrepa.reading.text import address, expanded, is_address
from fastrepa.runtime.terminal import say
from fastrepa.runtime.world import stated_rank

_Command = TypeVar("_Command", bound=Callable[..., None])


class _Commands(typer.Typer):
    """Takes what is typed as every command means it: ~ is a home folder, numbers are finite."""

    def command(self, name: str | None = None, **how: Any) -> Callable[[_Command], _Command]:
        register = super().command(name, cls=ReadableCommand, **how)

        def add(command: _Command) -> _Command:
            @wraps(command)
            def run(**given: Any) -> None:
                of = command.__name__
                command(**{name: _meant(of, name, value) for name, value in given.items()})

            register(run)
            return command

        return add


# What may be an address: of the commands that read a set, and write nothing into it.
_SETS = {("data_verify", "path"), ("data_show", "path"), ("probe", "target"),
         ("evaluate", "samples"), ("evaluate", "reference")}  # fmt: skip


def _meant(command: str, name: str, value: Any) -> Any:
    if isinstance(value, Path) and is_address(value):
        if (command, name) not in _SETS:
            raise ConfigError(
                f"{name.replace('_', '-')}: {address(str(value))}: an address is read by train "
                "(data.path), data verify, data show, probe and evaluate; here it must be a path"
            )
        from fastrepa.data.datasets import located

        return located(value)
    if isinstance(value, Path):
        return Path(expanded(str(value)))
    if isinstance(value, list):
        return [_meant(command, name, item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"--{name.replace('_', '-')}: {value} is not a finite number")
    return value


def require(*paths: Path) -> None:
    """Raise DataError for the first that is not there, before libraries are loaded for it."""
    for path in paths:
        if not os.path.lexists(path):
            raise DataError(f"{path}: no such file or folder")


@contextmanager
def loading() -> Iterator[None]:
    """Say on a terminal that libraries are loaded, which takes seconds; nothing is left of it."""
    shown = sys.stderr.isatty() and stated_rank() == 0
    if shown:
        sys.stderr.write("loading ...")
        sys.stderr.flush()
    try:
        yield
    finally:
        if shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


app = _Commands(
    name="fastrepa",
    cls=ReadableGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train representation-aligned diffusion transformers.",
)

data_app = _Commands(
    cls=ReadableGroup, no_args_is_help=True, help="Verify a data set, look at it, encode it."
)
app.add_typer(data_app, name="data")


def _recipes(incomplete: str) -> list[str]:
    """Complete a recipe's name; where there is none, the shell completes files."""
    from fastrepa.config.recipes import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def key_paths(incomplete: str) -> list[str]:
    """Complete the path of a key, a part at a time."""
    from fastrepa.config.keys import all_keys

    most = incomplete.count(".") + 1
    paths = (key.path for key in all_keys() if key.path.startswith(incomplete))
    return [path for path in paths if path.count(".") <= most]


def _assignments(incomplete: str) -> list[str]:
    """Complete the key of an override."""
    from fastrepa.config.keys import all_keys

    sections = {key.path for key in all_keys() if key.is_section}
    return [path if path in sections else f"{path}=" for path in key_paths(incomplete)]


ConfigArgument = Annotated[
    Path,
    typer.Argument(
        help="A YAML file, or the name of a recipe, such as quickstart.", autocompletion=_recipes
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="path.to.key=value, as often as you like; `fastrepa config` lists the keys.",
        autocompletion=_assignments,
    ),
]
RunOverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="path.to.key=value over the run's configuration, as often as you like.",
        autocompletion=_assignments,
    ),
]
ClassesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A class name, or names and numbers with commas; repeat for several. A name wins over "
        "a number; #3 is always class number 3."
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        say(f"fastrepa {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    # The deepspeed launcher passes --local_rank beside LOCAL_RANK, which is the one that counts.
    pass
