"""Commands that list what there is to choose from: config, recipes, encoders, models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastrepa.cli.app import app, key_paths, loading
from fastrepa.errors import ConfigError, shown
from fastrepa.reading.text import expanded
from fastrepa.runtime.terminal import Terminal, say, say_json


@app.command("config")
def config(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|FILE|KEY|KEY=VALUE",
            help="A run's folder or a YAML file, whose values are shown; which keys or sections, "
            "default: all; what to change in the file.",
            autocompletion=key_paths,
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="A JSON schema of the YAML file, for editors.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The keys as a page, docs/configuration.md.")
    ] = False,
) -> None:
    """Keys of the configuration: defaults, allowed values, what they do; or a run's or file's own.

    A word with a / or the ending .yaml is a run or a file, a recipe's name its file, any other one
    without = a key. Values of a run or a file have a star where they differ from the default.
    """
    from fastrepa.commands.keys import markdown as page
    from fastrepa.commands.keys import print_config, print_keys

    if markdown:
        say(*page().splitlines())
        return
    if schema:
        from fastrepa.config.keys import schema as as_schema

        say_json(as_schema(), indent=1)
        return
    from fastrepa.config import load_config, load_run_config
    from fastrepa.config.loading import SAVED
    from fastrepa.config.recipes import recipe_file

    overrides = [word for word in words or () if "=" in word]
    others = [word for word in words or () if "=" not in word]
    sources = [word for word in others if _is_source(word)]
    keys = [word for word in others if word not in sources]
    if len(sources) > 1:
        raise ConfigError(f"config: one file or run at a time, not {' and '.join(sources)}")
    if overrides and not sources:
        what = shown(overrides[0])
        raise ConfigError(f"override {what}: name the file or the run that it changes before it")
    if not sources:
        print_keys(keys, Terminal())
        return
    path = Path(expanded(sources[0]))
    recipe = recipe_file(sources[0]) is not None and not (path / SAVED).is_file()
    load = load_run_config if path.is_dir() and not recipe else load_config
    print_config(load(path, overrides), str(path), keys, Terminal())


def _is_source(word: str) -> bool:
    """Tell a run or a file from a key: by what no key has, or because it is there."""
    from fastrepa.config import Config
    from fastrepa.config.recipes import recipe_file

    if "/" in word or word.endswith((".yaml", ".yml")):
        return True
    if word.partition(".")[0] in Config.model_fields:
        return False
    return Path(word).exists() or recipe_file(word) is not None


@app.command()
def recipes() -> None:
    """List the recipes that come with fastrepa: what each is and needs, and if it can run here."""
    from fastrepa.commands.doctor.recipes import print_recipes

    print_recipes(Terminal())


@app.command()
def encoders(
    name: Annotated[
        str | None, typer.Argument(help="One of them, or any timm model; default: a list.")
    ] = None,
) -> None:
    """Encoders to align to: input, tokens, where the weights come from, and if they are here."""
    with loading():
        from fastrepa.commands.catalog import print_encoder, print_encoders

    if name is None:
        print_encoders(Terminal())
    else:
        print_encoder(name)


@app.command()
def models() -> None:
    """Generators that are known by name: width, depth, heads, parameters, GFLOPs."""
    with loading():
        from fastrepa.commands.catalog import print_models

    print_models(Terminal())
