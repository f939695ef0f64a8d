"""``python -m robustlearn`` and the ``robustlearn`` command."""

import sys


def main() -> None:
    """Run the command line; exit with 0 for an answer, 2 for bad input, 1 for our own fault."""
    from robustlearn.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
