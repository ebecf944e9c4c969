"""`python -m benchmarks [--quick]`: every benchmark that needs no GPU, one after the other."""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.common import ROOT, hardware, versions
from benchmarks.processes import run_tied

MODULES = (
    "benchmarks.data_plane.router_overhead",
    "benchmarks.data_plane.round_trip",
    "benchmarks.data_plane.many_routers",
    "benchmarks.data_plane.layer_cost",
    "benchmarks.data_plane.two_halves",
    "benchmarks.data_plane.transport_pingpong",
    "benchmarks.data_plane.pair_memory",
    "benchmarks.data_plane.soak",
    "benchmarks.data_plane.weight_copies",
    "benchmarks.data_plane.shard_kernel",
    "benchmarks.data_plane.expert_loading",
    "benchmarks.data_plane.failover",
    "benchmarks.data_plane.offload",
    "benchmarks.placement",
    "benchmarks.placement.published",
    "benchmarks.serving.placement_end_to_end",
    "benchmarks.data_plane.recorder_cost",
    "benchmarks.serving.decode_throughput",
    "benchmarks.serving.fuzz_http",
    "benchmarks.serving.upgrade",
    "benchmarks.placement.large_mesh",
    "benchmarks.serving.live_experts",
    "benchmarks.autopilot",
    "benchmarks.autopilot.shift",
)


def main() -> int:
    """Run all. The exit status is the number of benchmarks that did not finish; a missed goal is no failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few runs: does it work, not how fast")
    args = parser.parse_args()
    print(json.dumps({"hardware": hardware(), "versions": versions()}, indent=1))
    failed = []
    for module in MODULES:
        print(f"\n=== {module}", flush=True)
        command = [sys.executable, "-m", module, *(["--quick"] if args.quick else [])]
        if run_tied(command, cwd=ROOT).returncode:
            failed.append(module)
    if failed:
        print(f"\ndid not finish: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
