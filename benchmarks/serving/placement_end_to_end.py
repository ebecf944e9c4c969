"""Bytes between hosts and tokens/s by placement: the tiny model on a Ray cluster of two hosts with a slow link.

    python -m benchmarks.serving.placement_end_to_end [--quick] [--mbit 40] [--slots-per-rank 10]
        [--placements linear,eplb,...]

Two network namespaces joined by a switch, each with a router (vLLM) and two of the four shards; `tc tbf` limits what
each host sends. Placements are planned for the trace in examples/tiny-moe and run on prompts from other documents, with
all four domains mixed. Bytes come from the interface and from the routers' own counters. The planner predicts both for
the tokens the routers recorded in the run, by the rule dispatch uses; "off" is the prediction's relative error.

With "+near" after a placement's name, routers prefer replicas on their own host; "near" is planned for that, the others
are not. The benchmark needs the right to create network namespaces, `ip` and `tc`; without them it skips itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, TINY_MODEL, median, print_table, save
from benchmarks.placement.rows import eplb_placement
from benchmarks.serving.hosts import Host, NamespacesRefusedError, hosts_on_a_switch
from benchmarks.serving.ray_hosts import Node, ray_environment, start_ray
from experts.protocol.wire import exchange_bytes
from placement.placement import Placement
from placement.policy import build_placement
from placement.rule.evaluate import evaluate
from placement.rule.local_replicas import keep_local
from placement.rule.replica_choice import choose_replicas
from placement.search.problem import PlanRequest
from placement.traces.profile import read_prompts
from placement.traces.trace import ActivationTrace

TRACE, PROMPTS = TINY_MODEL / "trace.npz", TINY_MODEL / "prompts-unseen.jsonl"
NUM_HOSTS, NUM_SHARDS, PORT = 2, 4, 8000
ROW_BYTES = 4 * 256  # float32, hidden 256
PLANNERS = ("linear", "greedy", "eplb", "optimized", "near")
NEAR = "+near"  # after a planner's name: routers prefer replicas on their own host


def plan(name: str, trace: ActivationTrace, args: Any) -> Placement:
    """The placement made by one of PLANNERS."""
    if name == "eplb":
        return eplb_placement(trace.load(), PlanRequest(NUM_SHARDS, args.nodes, args.slots_per_rank), num_groups=1)
    near = name == "near"
    request = PlanRequest(
        num_ranks=NUM_SHARDS,
        num_nodes=NUM_HOSTS if near else args.nodes,
        prefer_local_replicas=near,
        slots_per_rank=args.slots_per_rank,
        min_replicas=args.min_replicas,
        seconds=args.plan_seconds,
        load_cap=args.load_cap,
    )
    return build_placement("optimized" if near else name, request, trace, trace)


def serve_config(placement_file: Path, near: bool) -> dict[str, Any]:
    """The applications. Ray's resources put one router and two shards on each host."""
    model = {"id": "tiny-moe", "path": str(TINY_MODEL), "dtype": "float32"}
    head = {"head": 0.01}
    experts = {
        "model": model,
        "shards": {"ray_actor_options": {"num_cpus": 0.1, "resources": {"shard": 1}}},
        "controller": {"ray_actor_options": {"num_cpus": 0, "resources": head}},
    }
    live = {"placement": {"file": str(placement_file)}, "membership": {"lost_after_s": 60, "drain_s": 0}}
    deployments = [
        {"name": "ExpertShard", "num_replicas": NUM_SHARDS},
        {"name": "PlacementController", "user_config": live},
    ]
    llm = {
        "model": model,
        "routers": {
            "count": NUM_HOSTS,
            "engine_kwargs": {
                "max_model_len": 1024,
                "max_num_seqs": 32,
                "enforce_eager": True,
                "enable_prefix_caching": False,
            },
            "placement_group_config": {"bundles": [{"CPU": 0.1, "router": 1}]},
            "deployment_config": {"ray_actor_options": {"num_cpus": 0.1}, "health_check_timeout_s": 60},
            "env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
        },
        "transport": {"prefer_local_replicas": near},
        "deadlines": {"dispatch_ms": 60_000, "connect_s": 60},
    }
    console = {"deployment_config": {"ray_actor_options": {"num_cpus": 0.1, "resources": head}}}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "applications": [
            {
                "name": "experts",
                "route_prefix": None,
                "import_path": "serve_app:build_experts",
                "args": experts,
                "deployments": deployments,
            },
            {"name": "llm", "route_prefix": "/", "import_path": "serve_app:build_llm", "args": llm},
            {
                "name": "console",
                "route_prefix": "/expertmesh",
                "import_path": "serve_app:build_console",
                "args": console,
            },
        ],
    }


class Cluster:
    """The running cluster, seen through `benchmarks.serving.serve_side` on its head."""

    def __init__(self, hosts: list[Host]) -> None:
        environment = ray_environment()
        resources = {"shard": NUM_SHARDS // NUM_HOSTS, "router": 1}
        nodes = [Node(host, 2, {**resources, **({"head": 1} if host is hosts[0] else {})}) for host in hosts]
        address = start_ray(nodes, environment)
        self.hosts = hosts
        self._log = Path(hosts[0].disk) / "serve_side.log"
        with self._log.open("w") as log:
            self._side = hosts[0].popen(
                *[sys.executable, "-m", "benchmarks.serving.serve_side", address, str(PORT)],
                env={**environment, "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"},
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def order(self, **order: Any) -> dict[str, Any]:
        """Give one order and return the answer; see serve_side."""
        assert self._side.stdin is not None
        assert self._side.stdout is not None
        self._side.stdin.write(json.dumps(order) + "\n")
        self._side.stdin.flush()
        line = self._side.stdout.readline()
        if not line:
            raise RuntimeError(f"the cluster's side ended:\n{self._log.read_text()[-6000:]}")
        return dict(json.loads(line))

    def routers(self) -> list[dict[str, Any]]:
        """The routers' status, with their counters."""
        return list(json.loads(self.order(get="/expertmesh/status")["body"])["routers"])

    def link_bytes(self) -> int:
        """Bytes that crossed the link between the hosts, both ways."""
        return sum(self.hosts[0].link_bytes())

    def trace(self, router: str) -> ActivationTrace:
        """The trace a router recorded since it was last cleared."""
        path = f"/expertmesh/trace?router={urllib.parse.quote(router)}"
        return ActivationTrace.load_npz(io.BytesIO(bytes.fromhex(self.order(get=path)["body"])))


def own_ranks(router: dict[str, Any]) -> np.ndarray:
    """bool [R]: the shards on the router's host, which it reaches through shared memory."""
    return np.array([router["transports"].get(str(rank)) == "shm" for rank in range(NUM_SHARDS)])


def predict(placement: Placement, trace: ActivationTrace, local_R: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(rows, pairs) [L, R] that a trace's tokens send to each shard, by the rule dispatch uses."""
    if local_R is None:
        evaluation = evaluate(placement, trace)
        return evaluation.rows_LR, evaluation.load_LR
    slots_LER = keep_local(placement.slots_LER, local_R)
    rows_LR, pairs_LR = np.zeros((2, trace.num_layers, NUM_SHARDS))
    for layer in range(trace.num_layers):
        ids_TK = trace.ids_of_layer(layer)
        rank_TK = np.zeros_like(ids_TK)
        loads_R = np.zeros(NUM_SHARDS, np.int64)
        choose_replicas(
            ids_TK, slots_LER[layer], placement.node_of_rank_R, placement.num_nodes, placement.work_R, loads_R, rank_TK
        )
        rows_LR[layer] = [(rank_TK == rank).any(axis=1).sum() for rank in range(NUM_SHARDS)]
        pairs_LR[layer] = loads_R
    return rows_LR, pairs_LR


def measure(cluster: Cluster, placement: Placement, near: bool, prompts: list[str], args: Any) -> dict[str, Any]:
    """One run of all prompts: what was sent, and what the planner predicts for the tokens the routers recorded."""
    cluster.order(delete="/expertmesh/trace")
    before, link_before = cluster.routers(), cluster.link_bytes()
    run = cluster.order(run=prompts, new_tokens=args.new_tokens, concurrency=args.concurrency)
    link, after = cluster.link_bytes() - link_before, cluster.routers()
    sent = {"rows": 0.0, "remote_rows": 0.0, "bytes": 0.0}
    predicted = dict(sent)
    tokens, pairs_R = 0.0, np.zeros(NUM_SHARDS)
    for old, new in zip(before, after, strict=True):
        if old["router_id"] != new["router_id"] or new["lost"]:
            raise RuntimeError(f"router {new['router_id']} was restarted or lost shards: {new['lost']}")
        grown = {key: new[key] - old[key] for key in ("rows", "steps", "fan_out_sum", "bytes_sent", "bytes_received")}
        own_R = own_ranks(new)
        rows_R = np.subtract(new["shard_rows"], old["shard_rows"])
        pairs_R += np.subtract(new["shard_pairs"], old["shard_pairs"])
        tokens += grown["rows"] / placement.num_layers
        sent["rows"] += grown["fan_out_sum"]
        sent["remote_rows"] += rows_R[~own_R].sum()
        sent["bytes"] += grown["bytes_sent"] + grown["bytes_received"]
        recorded = cluster.trace(new["router_id"])
        scale = grown["rows"] / (recorded.num_tokens * placement.num_layers)  # the reservoir may hold a sample
        rows_LR, pairs_LR = predict(placement, recorded, own_R if near else None)
        predicted["rows"] += rows_LR.sum() * scale
        predicted["remote_rows"] += rows_LR[:, ~own_R].sum() * scale
        predicted["bytes"] += sum(
            grown["steps"] * exchange_bytes(round(rows), round(pairs), ROW_BYTES)
            for rows, pairs in zip(
                rows_LR.ravel() * scale / grown["steps"], pairs_LR.ravel() * scale / grown["steps"], strict=True
            )
        )
    return {
        "tokens_per_s": run["tokens"] / run["seconds"],
        "link_mb": link / 1e6,
        "link_kb_per_token": link / tokens / 1e3,
        "remote_rows_per_token": sent["remote_rows"] / tokens / placement.num_layers,
        "fan_out": sent["rows"] / tokens / placement.num_layers,
        "balancedness": float(pairs_R.mean() / pairs_R.max()),
        **{f"{key}_off": predicted[key] / sent[key] - 1 if sent[key] else 0.0 for key in sent},
    }


@contextlib.contextmanager
def two_hosts() -> Iterator[Cluster]:
    """The cluster. Raises NamespacesRefusedError where it cannot be created."""
    with hosts_on_a_switch(NUM_HOSTS) as hosts:
        for host in hosts:  # a missing right shows now, not after minutes
            host.limit(1000)
            host.limit(None)
        yield Cluster(hosts)


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per placement: medians over its runs."""
    trace = ActivationTrace.load_npz(TRACE)
    prompts = [prompt.text for prompt in read_prompts(PROMPTS)]  # domains alternate, so every batch mixes them
    prompts = [prompts[i] for i in np.argsort(np.arange(len(prompts)) % (len(prompts) // 4), kind="stable")]
    prompts = prompts[: args.prompts]
    names = args.placements.split(",")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, two_hosts() as cluster:
        for turn in range(args.turns):
            for name in names if turn % 2 == 0 else names[::-1]:
                file = Path(folder) / f"{name}.json"
                planner, near = name.removesuffix(NEAR), name == "near" or name.endswith(NEAR)
                placement = plan(planner, trace, args)
                placement.save(file)
                for host in cluster.hosts:
                    host.limit(None)
                deployed = cluster.order(deploy=serve_config(file, near))
                cluster.order(run=prompts[:16], new_tokens=8, concurrency=16)
                for host in cluster.hosts:
                    host.limit(args.mbit)
                print(f"  {name}: deployed in {deployed['seconds']:.0f} s", file=sys.stderr, flush=True)
                for _ in range(args.runs):
                    found[name].append(measure(cluster, placement, near, prompts, args))
                    print(f"  {name}: {json.dumps(found[name][-1])}", file=sys.stderr, flush=True)
    rows = [
        {"placement": name, **{key: median(run[key] for run in found[name]) for key in found[name][0]}}
        for name in names
    ]
    return [{**row, "link_of_first": row["link_mb"] / rows[0]["link_mb"]} for row in rows]


def _stop(number: int, frame: Any) -> None:
    """Interrupt once: a second signal (`timeout` sends two) must not cut the removal of the hosts short."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Print the table and write bench-results/placement_end_to_end.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mbit", type=float, default=40.0, help="megabits per second each host may send")
    parser.add_argument("--slots-per-rank", type=int, default=10)
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        help="nodes to plan for. With a router on each host, every row is equally likely to cross the link, so fan-out "
        "is what counts; 2 places replicas on different hosts",
    )
    parser.add_argument("--min-replicas", type=int, default=1, help="replicas of every expert, on different shards")
    parser.add_argument("--load-cap", type=float, default=1.1)
    parser.add_argument(
        "--placements",
        default="linear,eplb,eplb+near,optimized,near",
        help="comma-separated, of " + ", ".join(PLANNERS) + f", each with or without {NEAR}",
    )
    parser.add_argument("--turns", type=int, default=1, help="deployments of each placement")
    parser.add_argument("--runs", type=int, help="runs of each deployment")
    parser.add_argument("--prompts", type=int, default=64, help="prompts per run")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--plan-seconds", type=float, default=10.0)
    args = parser.parse_args()
    args.runs = args.runs or (1 if args.quick else 3)
    if args.quick:
        args.prompts = 32
    signal.signal(signal.SIGTERM, _stop)
    try:
        rows = compare(args)
    except NamespacesRefusedError as refused:
        print(f"  skipped: network namespaces cannot be created here: {refused}")
        return
    print_table(
        f"Two hosts, {args.mbit:g} Mbit/s each, 2 routers, {NUM_SHARDS} shards of {args.slots_per_rank} slots",
        list(rows[0]), [list(row.values()) for row in rows],
    )  # fmt: skip
    save("placement_end_to_end", {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
