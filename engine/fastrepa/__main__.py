"""`python -m fastrepa`."""

from fastrepa.cli import main

if __name__ == "__main__":
    main()
