"""The commands of the planner and their options. What they do is in `plan` and `files`, imported when one is called."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from placement.command.arguments import (
    Domain,
    Json,
    NumExperts,
    Trace,
    TraceFormat,
    layers_argument,
    slots_argument,
    speeds_argument,
    step_tokens_argument,
)
from placement.command.ending import CommandGroup, refusing

PANEL = "Plan, from files (no service needed)"

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Plan placements from traces, score them, and hand them to other engines.",
)


class Objective(StrEnum):
    """What a plan is good at."""

    fan_out = "fan_out"
    balance = "balance"


class LoadSource(StrEnum):
    """Which loads a plan balances."""

    auto = "auto"
    sets = "sets"
    counts = "counts"


class Engine(StrEnum):
    """Who reads an exported placement."""

    vllm = "vllm"
    vllm_ascend = "vllm-ascend"
    sglang = "sglang"
    tensorrt_llm = "tensorrt-llm"


Speeds = Annotated[
    Any, typer.Option(parser=speeds_argument, metavar="LIST", help="Relative speed of each rank: 1,1,0.5,0.5.")
]


@app.command(rich_help_panel=PANEL)
def profile(
    url: Annotated[str, typer.Option(help="Base URL of the server, like http://127.0.0.1:8000.")],
    prompts: Annotated[
        Path, typer.Option(help="Text file, one chat a line, or .jsonl with prompt or messages, and domain.")
    ],
    out: Annotated[Path, typer.Option(help="Trace file to write (.npz).")],
    model: Annotated[str | None, typer.Option(help="Model name; by default the first that the server lists.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 64,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 8,
    timeout_s: Annotated[float, typer.Option(help="Bound on each request.")] = 120.0,
    api_key: Annotated[
        str | None, typer.Option(help="The server's key; by default the variable EXPERTMESH_API_KEY.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep what the routers recorded before.")] = False,
    as_json: Json = False,
) -> None:
    """Record a trace: send prompts to a running server, then fetch which experts its routers chose."""
    from placement.command import files

    with refusing():
        files.profile(url, prompts, out, model, max_tokens, concurrency, timeout_s, api_key, keep, as_json)


@app.command(rich_help_panel=PANEL)
def optimize(
    context: typer.Context,
    trace: Trace,
    ranks: Annotated[int, typer.Option(help="Ranks (shards).")],
    out: Annotated[Path, typer.Option(help="Placement file to write (JSON).")],
    trace_format: TraceFormat = "auto",
    num_experts: NumExperts = None,
    domain: Domain = None,
    nodes: Annotated[int, typer.Option(help="Nodes, each with as many ranks in order.")] = 1,
    slots_per_rank: Annotated[
        Any,
        typer.Option(
            parser=slots_argument,
            metavar="N or LIST",
            help="Slots of every rank, or a list with 0 for a rank to drain; by default as few as hold every expert.",
        ),
    ] = None,
    load_cap: Annotated[float, typer.Option(help="Largest rank load over the mean.")] = 1.05,
    min_replicas: Annotated[int, typer.Option(help="Replicas of every expert, on different nodes.")] = 1,
    objective: Annotated[Objective, typer.Option(help="Fan-out within the load cap, or balance alone.")] = (
        Objective.fan_out
    ),
    node_weight: Annotated[float, typer.Option(help="Cost of a visited node, in visited ranks.")] = 4.0,
    prefer_local_replicas: Annotated[
        bool,
        typer.Option(
            "--prefer-local-replicas",
            help="Plan for a router on every node that takes replicas on its own node first "
            "(transport.prefer_local_replicas); --node-weight is then the cost of a rank visited on another node.",
        ),
    ] = False,
    replica_budget: Annotated[
        int | None,
        typer.Option(help="Replicas beyond --min-replicas, in all layers together; by default every slot is filled."),
    ] = None,
    step_tokens: Annotated[
        Any,
        typer.Option(
            parser=step_tokens_argument,
            metavar="LIST",
            help="Leave out replicas that do not save time in steps of so many tokens (32,256) on an H100, where the "
            "load cap allows; by default every slot is filled.",
        ),
    ] = None,
    speeds: Speeds = None,
    loads: Annotated[LoadSource, typer.Option(help="Loads to balance.")] = LoadSource.auto,
    seconds: Annotated[float, typer.Option(help="Bound on the whole call.")] = 20.0,
    effort: Annotated[
        float | None,
        typer.Option(help="Size of the search, 1 for a thorough one; by default what suits --seconds."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same placement.")] = 0,
    current: Annotated[
        Path | None,
        typer.Option(help="Placement in use, maybe of other ranks: the plan starts there, and is never worse."),
    ] = None,
    copy_price: Annotated[
        float,
        typer.Option(help="Visits a token that each expert to be copied from --current must save in its layer."),
    ] = 0.02,
    max_moves: Annotated[int | None, typer.Option(help="How many slots of a layer may change from --current.")] = None,
    as_json: Json = False,
) -> None:
    """Plan a placement from a trace."""
    from placement.command import plan

    # Of the process, if it is one of its own: loading the interpreter and compiled code counts too.
    start_s = context.obj if isinstance(context.obj, float) else time.perf_counter()
    with refusing():
        request = plan.request(
            num_ranks=ranks,
            num_nodes=nodes,
            slots_per_rank=slots_per_rank,
            load_cap=load_cap,
            min_replicas=min_replicas,
            objective=objective.value,
            node_weight=node_weight,
            prefer_local_replicas=prefer_local_replicas,
            replica_budget=replica_budget,
            step_tokens=step_tokens,
            speeds=speeds,
            copy_price=copy_price,
            max_moves=max_moves,
            load_source=loads.value,
            seed=seed,
            effort=effort,
            seconds=seconds,
        )
        read = plan.read_trace(trace, trace_format, num_experts, domain)
        plan.optimize(read, request, current, out, start_s, as_json)


@app.command(rich_help_panel=PANEL)
def evaluate(
    trace: Trace,
    placement: Annotated[list[Path], typer.Option(help="Placement file; once for each.")],
    trace_format: TraceFormat = "auto",
    num_experts: NumExperts = None,
    domain: Domain = None,
    speeds: Speeds = None,
    slots_per_rank: Annotated[
        Any,
        typer.Option(
            parser=slots_argument,
            metavar="N or LIST",
            help="Slots of every rank, or a list; placements that need more are refused.",
        ),
    ] = None,
    prefer_local_replicas: Annotated[
        bool, typer.Option("--prefer-local-replicas", help="Routers take replicas on their own node first.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, layer by layer.")] = False,
) -> None:
    """Score placements on a trace: fan-out, balancedness and what follows from them."""
    from placement.command import plan

    with refusing():
        read = plan.read_trace(trace, trace_format, num_experts, domain)
        plan.evaluate(read, placement, speeds, slots_per_rank, prefer_local_replicas, as_json)


@app.command(rich_help_panel=PANEL)
def explain(
    trace: Trace,
    placement: Annotated[Path, typer.Option(help="Placement file.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    before: Annotated[Path | None, typer.Option(help="Placement to compare with; by default linear.")] = None,
    trace_format: TraceFormat = "auto",
    num_experts: NumExperts = None,
    as_json: Json = False,
) -> None:
    """Write a report on a placement: one HTML page, and its pictures as PNGs."""
    from placement.command import files, plan

    with refusing():
        files.explain(plan.read_trace(trace, trace_format, num_experts, None), placement, before, out, as_json)


@app.command(rich_help_panel=PANEL)
def export(
    placement: Annotated[Path, typer.Option(help="Placement file.")],
    engine: Annotated[Engine, typer.Option("--format", help="Engine that will read it.")],
    out: Annotated[Path, typer.Option(help="File to write: JSON, and YAML for TensorRT-LLM.")],
    layers: Annotated[
        Any,
        typer.Option(
            parser=layers_argument,
            metavar="LIST",
            help="SGLang, TensorRT-LLM: the decoder layer of each MoE layer: 1,2,3.",
        ),
    ] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(help="SGLang: decoder layers of the model.")] = None,
    fill_empty: Annotated[
        bool, typer.Option("--fill-empty", help="Fill empty slots, since engines have none.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a placement as another engine reads it."""
    from placement.command import files

    with refusing():
        files.export(placement, engine.value, out, layers, num_hidden_layers, fill_empty, as_json)
