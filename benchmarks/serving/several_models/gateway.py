"""What one address for several models costs: streams through the gateway against streams straight to the routers.

    expertmesh serve configs/tiny-two-models.yaml      # in another terminal
    python -m benchmarks.serving.several_models.gateway [--url http://127.0.0.1:8000] [--streams 1,16,64] [--turns 3]

Both ways end at the same router of the same service, in turns. All processes of the machine share its cores, the
gateway among them: its own time a token is printed too, where it runs on this machine.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import psutil

from benchmarks.common import median, print_table, save
from benchmarks.serving.streams import Load, requests, run

PROCESS = "ServeReplica:gateway:Gateway"
FIGURES = ("tokens_per_s", "first_token_p50_ms", "gap_p50_ms", "gap_p99_ms")


def measure(url: str, model: str, streams: int, new_tokens: int, rounds: int) -> Load:
    """One turn of one way. Raises RuntimeError if a request fails."""
    load = run(url, requests(model, max(streams, 4) * rounds, new_tokens), streams)
    if load.failed:
        raise RuntimeError(f"{url}: {load.failed} of {load.requests} requests failed")
    return load


def gateway_cpu_s() -> float:
    """Processor time that the gateway's replicas on this machine have used."""
    total = 0.0
    for process in psutil.process_iter(["cmdline"]):
        if PROCESS in " ".join(process.info["cmdline"] or ()):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is")
    parser.add_argument("--model", default="tiny-moe", help="a model, whose stable version serves below --direct")
    parser.add_argument("--direct", default="/models/tiny-moe", help="route prefix of that model's routers")
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream, one after the other")
    args = parser.parse_args()
    ways = {"direct": args.url + args.direct, "gateway": args.url}
    loads: dict[tuple[str, int], list[Load]] = {}
    cpu_us: dict[int, list[float]] = {}  # of the gateway, a token, by number of streams
    for turn in range(args.turns):
        for streams in map(int, args.streams.split(",")):
            for way, url in ways.items():
                run(url, requests(args.model, streams, 16), streams)  # not counted
                begin_s = gateway_cpu_s()
                load = measure(url, args.model, streams, args.new_tokens, args.rounds)
                if way == "gateway":
                    tokens = load.requests * args.new_tokens
                    cpu_us.setdefault(streams, []).append(1e6 * (gateway_cpu_s() - begin_s) / tokens)
                loads.setdefault((way, streams), []).append(load)
                print(turn, way, load, flush=True)
    rows = []
    for streams in map(int, args.streams.split(",")):
        for figure in FIGURES:
            direct, gateway = (median(getattr(load, figure) for load in loads[way, streams]) for way in ways)
            rows.append([streams, figure, direct, gateway, gateway / direct])
    print_table("One address (medians)", ["streams", "figure", "direct", "gateway", "ratio"], rows)
    for streams, each in cpu_us.items():
        print(f"{streams} streams: the gateway uses {median(each):.0f} us of a core a token")
    save(
        "gateway", {"rows": rows, "loads": {f"{way} {n}": list(map(asdict, each)) for (way, n), each in loads.items()}}
    )


if __name__ == "__main__":
    main()
