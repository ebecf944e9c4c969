"""`python -m cluster COMMAND`: `size` before there is a service, `placement` for one, `keys` for its users."""

from __future__ import annotations

import argparse
import sys

from cluster.keys.command import add_keys
from cluster.placement_command.options import add_placement
from cluster.sizing_command.options import add_size


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status: 0 done, 1 refused or failed, 130 interrupted. Bad usage exits with 2."""
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_placement(commands)
    add_size(commands)
    add_keys(commands)
    options = parser.parse_args(argv)
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
