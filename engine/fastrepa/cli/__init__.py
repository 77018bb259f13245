"""The command line: `fastrepa train`, `plan`, `profile`, `bench`, `prepare`, ... (see `--help`).

Imports of torch and its friends stay inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys

from fastrepa.cli import runs, data, insight  # isort: skip  # the order of --help
from fastrepa.cli.app import app, data_app
from fastrepa.errors import FastrepaError, print_error
from fastrepa.runtime.exit_codes import for_launcher
from fastrepa.runtime.world import launched_world

__all__ = ["app", "data", "data_app", "insight", "main", "runs"]


def main() -> None:
    """The console script: a user's error is one line on stderr and a non-zero exit."""
    try:
        app()
    except FastrepaError as e:
        print_error(e, launched_world().rank)
        sys.exit(for_launcher(1))
    except KeyboardInterrupt:
        print("fastrepa: interrupted", file=sys.stderr)
        sys.exit(for_launcher(130))
    except SystemExit as e:
        sys.exit(for_launcher(e.code) if isinstance(e.code, int) else e.code)
