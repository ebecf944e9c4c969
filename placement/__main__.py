"""`python -m placement`: the commands of the planner."""

import sys

from placement.cli import main

if __name__ == "__main__":
    sys.exit(main())
