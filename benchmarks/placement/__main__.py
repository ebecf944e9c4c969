"""`python -m benchmarks.placement`: see `benchmarks.placement.suite`."""

import sys

from benchmarks.placement.suite import main

if __name__ == "__main__":
    sys.exit(main())
