"""The planner's commands: profile, optimize, evaluate, explain, export.

Bad input ends with a one-line error and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from placement.arguments import layers_argument, slots_argument, speeds_argument, step_tokens_argument
from placement.placement import Placement
from placement.progress import ProgressBar


def process_age_s() -> float:
    """Seconds since this process started, so that loading the interpreter and compiled code counts too.

    0 where the system does not say (it reads Linux's /proc).
    """
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime_s - started_ticks / os.sysconf("SC_CLK_TCK"))


def run_optimize(args: argparse.Namespace) -> int:
    """Plan, write JSON, print how good the plan is."""
    from placement.capacity.replica_worth import Worth
    from placement.search.optimizer import optimize
    from placement.search.problem import PlanRequest
    from placement.traces.importers import import_trace

    trace = import_trace(args.trace, args.format, args.num_experts)
    if args.domain:
        trace = trace.of_domain(args.domain)
    # Options are named after the request's fields.
    options = {field.name: getattr(args, field.name) for field in fields(PlanRequest) if field.name != "worth"}
    if args.step_tokens:
        options["worth"] = Worth(step_tokens=args.step_tokens)
    if args.slots_per_rank is None:
        # Ranks and replicas below 1 are for the request to refuse.
        needed = trace.num_experts * max(args.min_replicas, 1)
        options["slots_per_rank"] = -(-needed // max(args.num_ranks, 1))
    request = PlanRequest(**options)
    current = Placement.load(args.current) if args.current else None
    with ProgressBar("layers planned") as bar:
        result = optimize(trace, request, current, progress=bar.update, start_s=args.start_s)
    data = result.placement.to_json()
    data["planned"] = {
        "fan_out": _numbers(result.fan_out),
        "node_fan_out": _numbers(result.node_fan_out),
        "far_fan_out": _numbers(result.far_fan_out),
        "balancedness": _numbers(result.balancedness),
        "seconds": round(result.seconds, 3),
        "cut_short": result.cut,
        "seed": request.seed,
        "load_cap": request.load_cap,
        "prefer_local_replicas": request.prefer_local_replicas,
        "layers": list(trace.layers),
    }
    Path(args.out).write_text(json.dumps(data) + "\n")
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    figures = f"balancedness {result.balancedness.mean():.4f}"
    if request.prefer_local_replicas and trace.has_sets:
        figures = f"far fan-out {result.far_fan_out.mean():.4f}, {figures}"
    if trace.has_sets:
        figures = f"fan-out {result.fan_out.mean():.4f}, node fan-out {result.node_fan_out.mean():.4f}, {figures}"
    print(f"{args.out}: {figures} on the planning tokens, {result.seconds:.1f} s")
    return 0


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [None if value != value else round(float(value), 6) for value in values]


def run_evaluate(args: argparse.Namespace) -> int:
    """Print one row for each placement."""
    from placement.rule.evaluate import evaluate, on_machines
    from placement.traces.importers import import_trace

    trace = import_trace(args.trace, args.format, args.num_experts)
    if args.domain:
        trace = trace.of_domain(args.domain)
    rows = {}
    with ProgressBar("placements scored") as bar:
        for done, path in enumerate(args.placement, 1):
            try:
                placement = on_machines(Placement.load(path), args.speeds, args.slots_per_rank)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            evaluation = evaluate(placement, trace, args.prefer_local_replicas)
            rows[str(path)] = evaluation.summary() | {
                "layers": [
                    {"layer": layer, "fan_out": fan, "node_fan_out": node, "far_fan_out": far, "balancedness": even}
                    for layer, fan, node, far, even in zip(
                        trace.layers,
                        _numbers(evaluation.fan_out),
                        _numbers(evaluation.node_fan_out),
                        _numbers(evaluation.far_fan_out),
                        _numbers(evaluation.balancedness),
                        strict=True,
                    )
                ]
            }
            bar.update(done, len(args.placement))
    if args.json:
        unknown_is_null = {
            path: {name: None if value != value else value for name, value in row.items()} for path, row in rows.items()
        }
        print(json.dumps(unknown_is_null, allow_nan=False))
        return 0
    if not trace.has_sets:
        print(
            "note: the trace holds only counts: balancedness is that of an even split, fan-out is unknown",
            file=sys.stderr,
        )
    width = max(len("placement"), *(len(path) for path in rows))
    columns = [name for name in next(iter(rows.values())) if name not in ("layers", "tokens")]
    print(f"{'placement':{width}s}" + "".join(f"  {name}" for name in columns) + f"{'tokens':>10s}")
    for path, row in rows.items():
        cells = "".join(f"{row[name]:{len(name) + 2}.4f}" for name in columns)
        print(f"{path:{width}s}{cells}{row['tokens']:10d}")
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """Write the HTML report and its PNGs."""
    from placement.report.page import write_report
    from placement.traces.importers import import_trace

    trace = import_trace(args.trace, args.format, args.num_experts)
    before = Placement.load(args.before) if args.before else None
    with ProgressBar("layers drawn") as bar:
        written = write_report(trace, Placement.load(args.placement), before, args.out, progress=bar.update)
    for path in written:
        print(path)
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Write the placement as another engine reads it."""
    from placement.exports import export_sglang, export_tensorrt_llm, export_vllm, export_vllm_ascend, yaml_text

    if args.layers is not None and args.format not in ("sglang", "tensorrt-llm"):
        raise ValueError("--layers is for SGLang and TensorRT-LLM; vLLM counts only MoE layers")
    if args.num_hidden_layers is not None and args.format != "sglang":
        raise ValueError("--num-hidden-layers is for SGLang, whose map has a row for every decoder layer")
    # Both engines tell what a file holds by its name.
    suffixes = {"sglang": (".json",), "tensorrt-llm": (".yaml", ".yml")}.get(args.format)
    if suffixes and Path(args.out).suffix not in suffixes:
        raise ValueError(f"{args.out}: {args.format} reads files named {' or '.join(suffixes)}")
    placement, fill = Placement.load(args.placement), args.fill_empty
    if args.format == "tensorrt-llm":
        text = yaml_text(export_tensorrt_llm(placement, layers=args.layers, fill_empty=fill))
    elif args.format == "sglang":
        named, total = args.layers, args.num_hidden_layers
        text = json.dumps(export_sglang(placement, layers=named, num_hidden_layers=total, fill_empty=fill)) + "\n"
    else:
        export = export_vllm if args.format == "vllm" else export_vllm_ascend
        text = json.dumps(export(placement, fill_empty=fill)) + "\n"
    Path(args.out).write_text(text)
    print(args.out)
    return 0


def run_profile(args: argparse.Namespace) -> int:
    """Send prompts to a server, then fetch what it recorded."""
    from placement.traces.profile import profile_server, read_prompts

    prompts = read_prompts(args.prompts)
    with ProgressBar("prompts answered") as bar:
        trace = profile_server(
            args.url,
            prompts,
            model=args.model,
            max_tokens=args.max_tokens,
            concurrency=args.concurrency,
            timeout_s=args.timeout_s,
            progress=bar.update,
            api_key=args.api_key,
            keep=args.keep,
        )
    trace.save(args.out)
    print(f"{args.out}: {trace.num_tokens} tokens, {trace.num_layers} layers, {trace.num_experts} experts")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="placement", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def trace_options(command: argparse.ArgumentParser) -> None:
        command.add_argument("--trace", required=True, help="routing trace: .npz, vLLM's .npy, SGLang's .pt")
        command.add_argument("--format", default="auto", help="auto, expertmesh, olmoe, vllm or sglang")
        command.add_argument("--num-experts", type=int, help="experts of a layer, if the trace does not say")

    command = commands.add_parser("optimize", help="plan a placement from a trace")
    trace_options(command)
    command.add_argument("--domain", help="only the tokens of this domain")
    command.add_argument("--ranks", type=int, required=True, dest="num_ranks", metavar="RANKS", help="ranks (shards)")
    command.add_argument(
        "--nodes",
        type=int,
        default=1,
        dest="num_nodes",
        metavar="NODES",
        help="nodes, each with as many ranks in order",
    )
    command.add_argument(
        "--slots-per-rank",
        type=slots_argument,
        help="slots of every rank, or a list with 0 for a rank to drain; default: as few as hold every expert",
    )
    command.add_argument("--load-cap", type=float, default=1.05, help="largest rank load over the mean (default 1.05)")
    command.add_argument("--min-replicas", type=int, default=1, help="replicas of every expert, on different nodes")
    command.add_argument("--objective", default="fan_out", help="fan_out, or balance for balance alone")
    command.add_argument("--node-weight", type=float, default=4.0, help="cost of a visited node, in visited ranks")
    command.add_argument(
        "--prefer-local-replicas",
        action="store_true",
        help="plan for a router on every node that takes replicas on its own node first "
        "(transport.prefer_local_replicas); --node-weight is then the cost of a rank visited on another node",
    )
    command.add_argument(
        "--replica-budget",
        type=int,
        help="replicas beyond --min-replicas, in all layers together; default: fill every slot",
    )
    command.add_argument(
        "--step-tokens",
        type=step_tokens_argument,
        help="leave out replicas that do not save time in steps of so many tokens (32,256) on an H100, "
        "where the load cap allows; default: fill every slot",
    )
    command.add_argument("--speeds", type=speeds_argument, help="relative speed of each rank: 1,1,0.5,0.5")
    command.add_argument(
        "--loads", default="auto", dest="load_source", metavar="SOURCE", help="loads to balance: sets, counts or auto"
    )
    command.add_argument("--seconds", type=float, default=20.0, help="bound on the whole call (default 20)")
    command.add_argument(
        "--effort", type=float, help="size of the search, 1 for a thorough one; default: what suits --seconds"
    )
    command.add_argument("--seed", type=int, default=0, help="same seed, same placement (default 0)")
    command.add_argument(
        "--current", help="placement in use, maybe of other ranks; the plan is made from there, and is never worse"
    )
    command.add_argument(
        "--copy-price",
        type=float,
        default=0.02,
        help="visits a token that each expert to be copied from --current must save in its layer (default 0.02)",
    )
    command.add_argument("--max-moves", type=int, help="how many slots of a layer may change from --current")
    command.add_argument("--out", required=True, help="placement file to write (JSON)")
    command.set_defaults(run=run_optimize)

    command = commands.add_parser("evaluate", help="score placements on a trace, as a table")
    trace_options(command)
    command.add_argument("--domain", help="only the tokens of this domain")
    command.add_argument("--placement", nargs="+", required=True, help="placement files")
    command.add_argument("--json", action="store_true", help="JSON, layer by layer")
    command.add_argument(
        "--speeds", type=speeds_argument, help="relative speed of each rank, whatever placements carry: 1,1,0.5"
    )
    command.add_argument(
        "--slots-per-rank", type=slots_argument, help="slots of every rank, or a list; placements that need more fail"
    )
    command.add_argument(
        "--prefer-local-replicas", action="store_true", help="routers take replicas on their own node first"
    )
    command.set_defaults(run=run_evaluate)

    command = commands.add_parser("explain", help="write a self-contained HTML report, and its pictures as PNGs")
    trace_options(command)
    command.add_argument("--placement", required=True, help="placement file")
    command.add_argument("--before", help="placement to compare with; default: linear")
    command.add_argument("--out", required=True, help="folder to write to")
    command.set_defaults(run=run_explain)

    command = commands.add_parser("export", help="write a placement as another engine reads it")
    command.add_argument("--placement", required=True, help="placement file")
    command.add_argument(
        "--format",
        required=True,
        choices=("vllm", "vllm-ascend", "sglang", "tensorrt-llm"),
        help="engine that will read it",
    )
    command.add_argument(
        "--layers", type=layers_argument, help="SGLang, TensorRT-LLM: the decoder layer of each MoE layer: 1,2,3"
    )
    command.add_argument("--num-hidden-layers", type=int, help="SGLang: decoder layers of the model")
    command.add_argument("--fill-empty", action="store_true", help="fill empty slots, since engines have none")
    command.add_argument("--out", required=True, help="file to write: JSON, and YAML for TensorRT-LLM")
    command.set_defaults(run=run_export)

    command = commands.add_parser("profile", help="send prompts to a running server and write its trace")
    command.add_argument("--url", required=True, help="base URL of the server, like http://127.0.0.1:8000")
    command.add_argument(
        "--prompts", required=True, help="text file, one chat a line, or .jsonl with prompt or messages, and domain"
    )
    command.add_argument("--model", help="model name; default: the first that the server lists")
    command.add_argument("--max-tokens", type=int, default=64, help="tokens to generate for each prompt")
    command.add_argument("--concurrency", type=int, default=8, help="requests in flight")
    command.add_argument("--timeout-s", type=float, default=120.0, help="bound on each request")
    command.add_argument("--api-key", help="the server's key; default: the environment variable EXPERTMESH_API_KEY")
    command.add_argument("--keep", action="store_true", help="keep what the routers recorded before")
    command.add_argument("--out", required=True, help="trace file to write (.npz)")
    command.set_defaults(run=run_profile)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # A program's call (argv given) starts now; a command started with its process.
    start_s = time.perf_counter() - (process_age_s() if argv is None else 0.0)
    args = build_parser().parse_args(argv)
    args.start_s = start_s
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
