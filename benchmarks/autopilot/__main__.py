"""`python -m benchmarks.autopilot`: see `benchmarks.autopilot.day`."""

from benchmarks.autopilot.day import main

if __name__ == "__main__":
    main()
