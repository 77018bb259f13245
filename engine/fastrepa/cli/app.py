"""The command line's two groups, and what several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastrepa import __version__
from fastrepa.errors import printable

app = typer.Typer(
    name="fastrepa",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train representation-aligned diffusion transformers.",
)

data_app = typer.Typer(no_args_is_help=True, help="Verify a data set, look at it, encode it.")
app.add_typer(data_app, name="data")


ConfigArgument = Annotated[
    Path, typer.Argument(help="A YAML file, such as configs/quickstart.yaml.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="path.to.key=value, as often as you like.")
]
ClassesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A class name, or names and numbers with commas; repeat for several. A name wins over "
        "a number; #3 is always class number 3."
    ),
]


def said(text: str) -> None:
    """Print a line about what was asked for, before the work begins."""
    print(printable(text), flush=True)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastrepa {__version__}")
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
