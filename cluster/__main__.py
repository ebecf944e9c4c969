"""`python -m cluster placement ...`: commands for a running service."""

from __future__ import annotations

import argparse
import sys

from cluster.placement_command.options import add_placement, run


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status: 0 done, 1 refused or failed, 130 interrupted. Bad usage exits with 2."""
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_placement(commands)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
