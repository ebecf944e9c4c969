"""`python -m benchmarks [--quick]`: every benchmark that this machine can run, one after the other."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from benchmarks.common import ROOT, hardware, versions

MODULES = (
    "benchmarks.router_overhead",
    "benchmarks.round_trip",
    "benchmarks.transport_pingpong",
    "benchmarks.shard_kernel",
    "benchmarks.failover",
    "benchmarks.placement",
    "benchmarks.placement_end_to_end",
    "benchmarks.recorder_cost",
    "benchmarks.decode_throughput",
)


def main() -> int:
    """Run all; the exit status is the number of benchmarks that failed to run (a missed goal is no failure)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few runs: does it work, not how fast")
    args = parser.parse_args()
    print(json.dumps({"hardware": hardware(), "versions": versions()}, indent=1))
    failed = []
    for module in MODULES:
        print(f"\n=== {module}", flush=True)
        command = [sys.executable, "-m", module, *(["--quick"] if args.quick else [])]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(module)
    if failed:
        print(f"\ndid not run to the end: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
