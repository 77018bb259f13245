"""The command line: `fastrepa train`, `plan`, `profile`, `bench`, `prepare`, ... (see `--help`).

Imports of torch and its friends stay inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys

from fastrepa.cli import runs, data, insight  # isort: skip  # the order of --help
from fastrepa.cli.app import app, data_app
from fastrepa.errors import FastrepaError, print_error
from fastrepa.runtime.exit_codes import for_launcher

__all__ = ["app", "data", "data_app", "insight", "main", "runs"]


def main() -> None:
    """The console script: a user's error is one line on stderr and a non-zero exit."""
    try:
        app()
    except FastrepaError as e:
        rank = os.environ.get("RANK", "")  # whatever else is wrong in the environment
        print_error(e, int(rank) if rank.isdecimal() else 0)
        sys.exit(for_launcher(1))
    except KeyboardInterrupt:
        print("fastrepa: interrupted", file=sys.stderr)
        sys.exit(for_launcher(130))
    except SystemExit as e:
        sys.exit(for_launcher(e.code) if isinstance(e.code, int) else e.code)
