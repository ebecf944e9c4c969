"""The tiny model served with the autopilot on; its traffic changes from four domains to one.

    python -m benchmarks.autopilot.shift [--streams 16] [--window-s 10]

`configs/tiny-autopilot.yaml` on a cluster of its own, but for `--window-s` and the usual horizon. Streams of all four
domains run until the autopilot has settled; then all prompts are of one domain. Placements are judged afterwards, on
the tokens that the last seconds had: each one that was in force, and a plan from nothing made of other tokens of the
same seconds, by what the slowest shard computes.

Goals: within 5 % of that plan after three windows; p99 between tokens until then 1.15 times that afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.common import TINY_MODEL, percentile, print_table, save
from benchmarks.serving.endless_streams import Streams, Window
from benchmarks.serving.live_experts import Mesh
from benchmarks.serving.service import OUTCOME_TIMEOUT_S, Service
from cluster.autopilot.jobs import Model
from cluster.autopilot.pricing import StepPrice, price_steps
from cluster.haproxy_guard import HAProxyGuard
from placement.placement import Placement
from placement.policy import build_placement
from placement.search.problem import PlanRequest
from placement.traces.observation import SampledStep
from placement.traces.profile import read_prompts
from placement.traces.trace import ActivationTrace

NEAR, MOST_WINDOWS, P99_GOAL = 1.05, 3, 1.15
WATCHED_WINDOWS = 12  # after the change
SETTLED_WINDOWS, SETTLE_S = 6, 900.0  # without a decision
PREPARE_S = 900.0  # compiling the planner, once
LOOK_S = 0.5


def autopilot(mesh: Mesh) -> Any:
    return mesh.status().autopilot


def wait_until_settled(mesh: Mesh, window_s: float) -> None:
    """Until the planner is ready and nothing was decided for some windows. RuntimeError if that takes too long."""
    end_s = time.monotonic() + PREPARE_S
    while autopilot(mesh).state in ("off", "preparing"):
        if time.monotonic() > end_s:
            raise RuntimeError(f"the planner is not ready after {PREPARE_S} s")
        time.sleep(LOOK_S)
    end_s, last, since_s = time.monotonic() + SETTLE_S, -1, time.monotonic()
    while time.monotonic() - since_s < SETTLED_WINDOWS * window_s:
        if time.monotonic() > end_s:
            raise RuntimeError(f"the autopilot still decides after {SETTLE_S} s: {autopilot(mesh).last}")
        view = autopilot(mesh)
        number = 0 if view.last is None else view.last.number
        if number != last or view.state in ("moving", "measuring"):
            last, since_s = number, time.monotonic()
        time.sleep(LOOK_S)


def placements_in_force(mesh: Mesh, seconds: float) -> list[tuple[float, Placement]]:
    """(seconds since now, placement) of each one that routers used, from now on."""
    begun_s, found = time.monotonic(), list[tuple[float, Placement]]()
    version = -1
    while time.monotonic() - begun_s < seconds:
        status = mesh.status()
        if status.epoch != version:
            version = status.epoch
            found.append((time.monotonic() - begun_s, mesh.published()))
        time.sleep(LOOK_S)
    return found


def recorded(url: str) -> ActivationTrace:
    """What the routers sampled for this benchmark."""
    with urllib.request.urlopen(f"{url}/expertmesh/trace?reader=shift", timeout=120) as answer:
        return ActivationTrace.load_npz(io.BytesIO(answer.read()))


def forget(url: str) -> None:
    """Let the sample begin now."""
    request = urllib.request.Request(f"{url}/expertmesh/trace?reader=shift", method="DELETE")
    urllib.request.urlopen(request, timeout=120).close()


def judge(
    in_force: list[tuple[float, Placement]], trace: ActivationTrace, streams: int
) -> tuple[list[tuple[float, float]], float]:
    """([(since when, cost of a fresh plan's)], its seconds) by what steps of so many tokens take."""
    ids_TLK = trace.topk_ids
    half = len(ids_TLK) // 2
    last = in_force[-1][1]
    request = PlanRequest(
        num_ranks=last.num_ranks, num_nodes=1, slots_per_rank=last.slots_per_rank - 1, load_cap=1.05, seconds=20.0
    )
    planned = ActivationTrace(ids_TLK[:half], trace.num_experts)
    fresh = build_placement("optimized", request, planned, planned)
    judged = [ids_TLK[start : start + streams] for start in range(half, len(ids_TLK) - streams, streams)]
    steps = [SampledStep(n, float(n), len(ids), ids, ids[:, 0, 0] < 0) for n, ids in enumerate(judged)]
    config = json.loads((TINY_MODEL / "config.json").read_text())
    expert_bytes = 3 * config["hidden_size"] * config["moe_intermediate_size"] * 4
    price = StepPrice.of(Model(expert_bytes, 4.0, expert_bytes * last.num_slots, "cpu"))
    fresh_s = price_steps(fresh, steps, price).mean()
    return [(since_s, price_steps(each, steps, price).mean() / fresh_s) for since_s, each in in_force], fresh_s


def main() -> None:
    """Print the table and write bench-results/autopilot_shift.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--window-s", type=float, default=10.0)
    parser.add_argument("--domain", default="code")
    parser.add_argument("--quick", action="store_true", help="short windows, and few of them")
    args = parser.parse_args()
    if args.quick:
        args.window_s = 5.0
    watched = 6 if args.quick else WATCHED_WINDOWS

    def with_windows(apps: dict[str, dict[str, Any]]) -> None:
        [live] = [each["user_config"] for each in apps["experts"]["deployments"] if "user_config" in each]
        live["autopilot"].update({"window_s": args.window_s, "cool_down_s": args.window_s, "horizon_s": 3600})

    prompts = read_prompts(TINY_MODEL / "prompts.jsonl")
    domains = sorted({prompt.domain for prompt in prompts})
    by_domain = {name: [prompt.text for prompt in prompts if prompt.domain == name] for name in domains}
    each = -(-args.streams // len(domains))
    mixed = [text for texts in by_domain.values() for text in texts[:each]][: args.streams]
    of_one = (by_domain[args.domain] * args.streams)[: args.streams]
    with contextlib.ExitStack() as stack:
        # Short: the paths of Unix sockets below it may have 107 characters.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="em-", ignore_cleanup_errors=True)))
        stack.callback(HAProxyGuard(folder).close)
        service = stack.enter_context(Service(folder, "tiny-autopilot.yaml").running(with_windows))
        mesh = Mesh()
        with Streams(service.url, "tiny-moe", mixed, max_tokens=200).running() as streams:
            streams.wait_until_warm(OUTCOME_TIMEOUT_S)
            wait_until_settled(mesh, args.window_s)
            print(f"settled: {autopilot(mesh).last}", flush=True)
        with Streams(service.url, "tiny-moe", of_one, max_tokens=200).running() as streams:
            streams.wait_until_warm(OUTCOME_TIMEOUT_S)
            begun_s = time.monotonic()
            forget(service.url)
            in_force = placements_in_force(mesh, watched * args.window_s)
            ended_s = time.monotonic()
            still_s = ended_s + 3 * args.window_s
            while time.monotonic() < still_s:
                time.sleep(LOOK_S)
            trace = recorded(service.url)
            decisions = [autopilot(mesh).last]
        costs, _ = judge(in_force, trace, args.streams)
        reached = [since_s for since_s, cost in costs if cost <= NEAR]
        meanwhile = streams.window(begun_s, begun_s + (reached[0] if reached else ended_s - begun_s) + args.window_s)
        afterwards = streams.window(ended_s, still_s)
    ratio = p99_ms(meanwhile) / p99_ms(afterwards)
    windows = reached[0] / args.window_s if reached else float("nan")
    print_table(
        f"From four domains to {args.domain}; goals: {MOST_WINDOWS} windows, {P99_GOAL}, 0, 0",
        ["windows", "cost before", "cost at the end", "p99 ms", "p99 after ms", "ratio", "failed", "changed"],
        [[windows, costs[0][1], costs[-1][1], p99_ms(meanwhile), p99_ms(afterwards), ratio,
          len(streams.window(0, float("inf")).failed), streams.window(0, float("inf")).changed]],
    )  # fmt: skip
    print("  " + ", ".join(f"{cost:.3f} from {since_s:.0f} s" for since_s, cost in costs))
    print(f"  last decision: {decisions[0]}")
    save("autopilot_shift", {"windows": windows, "costs": costs, "p99_ratio": ratio})


def p99_ms(window: Window) -> float:
    return percentile([1000 * gap for gap in window.gaps_s], 0.99)


if __name__ == "__main__":
    main()
