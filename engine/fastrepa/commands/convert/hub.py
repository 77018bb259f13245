"""A model and its card on the Hugging Face hub: `fastrepa convert --to hub`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from fastrepa.checkpoint.format import RunState
from fastrepa.commands.convert.card import CardWords, write_card
from fastrepa.commands.convert.exchange import export_run
from fastrepa.config import Config, run_folder
from fastrepa.errors import CheckpointError, ConfigError, worded
from fastrepa.runtime.hub import unreachable


@dataclass(frozen=True)
class Published:
    """Says what was written: of which checkpoint, and its address, or None where it stayed here."""

    state: RunState
    url: str | None


def publish(
    run: Path,
    words: CardWords,
    *,
    folder: Path | None = None,
    private: bool = False,
    dry_run: bool = False,
    **which: Any,
) -> Published:
    """Push a run's model as a diffusers folder with a card; into `folder` alone in a dry run.

    `which` are export_run's words for the weights. The repository is made where it is not there
    yet, and its files of other names stay. Raises FastrepaError.
    """
    try:
        validate_repo_id(words.repo)
    except HFValidationError as e:
        raise ConfigError(f"--repo: {worded(e)}") from None
    if dry_run and folder is None:
        raise ConfigError("--dry-run: name the folder to write, after the run")
    if dry_run:
        assert folder is not None
        return Published(_written(run, folder, words, which), None)
    api = HfApi()
    if get_token() is None:
        raise ConfigError(
            "--to hub: no token; type hf auth login, or set HF_TOKEN (--dry-run needs none)"
        )
    if problem := unreachable(api.endpoint):
        raise CheckpointError(f"--to hub: {problem}")
    if folder is not None:
        return _pushed(api, run, folder, words, private, which)
    with TemporaryDirectory() as passing:
        return _pushed(api, run, Path(passing) / "model", words, private, which)


def _written(run: Path, folder: Path, words: CardWords, which: dict[str, Any]) -> RunState:
    def card(partial: Path, config: Config, state: RunState) -> None:
        write_card(partial, run_folder(run), config, state, words)

    return export_run(run, folder, "diffusers", beside=card, **which)


def _pushed(
    api: HfApi, run: Path, folder: Path, words: CardWords, private: bool, which: dict[str, Any]
) -> Published:
    state = _written(run, folder, words, which)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        made = api.create_repo(words.repo, private=private or None, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=made.repo_id, commit_message=f"Step {state.step}"
        )
    except Exception as e:  # the hub's client and what it stands on have errors of every kind
        raise CheckpointError(f"--to hub: {words.repo}: not pushed ({worded(e)})") from None
    return Published(state, str(made))
