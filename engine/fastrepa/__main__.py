"""The command `fastrepa`, and `python -m fastrepa`: also where only the kernels are installed."""

import sys

from fastrepa.errors import lacking, print_error


def main() -> None:
    """Run the command line, which needs more than the base install."""
    try:
        from fastrepa.cli import main as command_line
    except ModuleNotFoundError as e:
        if (words := lacking(e)) is None:
            raise
        print_error(words, 0)
        sys.exit(1)
    command_line()


if __name__ == "__main__":
    main()
