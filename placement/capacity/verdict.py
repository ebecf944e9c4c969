"""What a step costs with a placement, in seconds, term by term; and whether separate expert shards pay at all.

T tokens of a step, L layers, K experts of one token, R ranks, N nodes.

A layer's time is the router's own work, the rows' way out, the slowest shard, and the results' way back. Layers follow
each other, so a step is their sum. A row goes to a rank once, however many of its experts the rank holds, so bytes
follow from fan-out; the bytes that leave the router's node follow from the nodes a token visits.

- Wire, one direction: `bytes / bandwidth + latency` at the router's end of each link class, and what its messages cost
  there. Classes work in parallel, so the slowest one counts.
- Shard: reading the weights of its activated experts and computing its pairs, as far as one hides the other, divided by
  the shard's speed, plus the fixed cost of a call and of its rows.
- Other routers: what waits for a layer is computed together, the rest waits (`placement.capacity.turns`).
- Migration: the bytes of new replicas from their nearest source, for the shard that receives most, spread over the
  steps until the next plan.

Predictions apply the dispatch rule itself (`choose_replicas`) to batches drawn from the trace. Constants are given or
measured, see `placement.capacity.hardware`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from placement.capacity.hardware import CPU_CORE, H100, Constants, ModelShape, busy_seconds
from placement.capacity.step_cost import StepCost, migration_cost, step_cost, topology_of
from placement.placement import Placement
from placement.topology import LINK_CLASSES, Topology
from placement.traces.trace import ActivationTrace


class CostTerm(NamedTuple):
    """One line of an explanation. A term with an indented name is part of the one above it, not added again."""

    term: str
    seconds: float
    how: str


def explain_cost(trace: ActivationTrace, placement: Placement, **arguments: object) -> list[CostTerm]:
    """Every term of a step; arguments as for `step_cost`. The last term is the whole step."""
    cost = step_cost(trace, placement, **arguments)  # type: ignore[arg-type]
    num_layers = placement.num_layers
    terms = [
        CostTerm(
            "router", float(cost.router_s.sum()),
            f"{num_layers} layers: plan, pack, unpack and combine {cost.tokens} tokens on {cost.num_routers} routers",
        ),
        CostTerm(
            "wire", float(cost.wire_s.sum()),
            f"a router's, out and back, the slowest link class of each layer; fan-out {cost.fan_out:.2f}, "
            f"node fan-out {cost.node_fan_out:.2f}",
        ),
    ]  # fmt: skip
    terms += [
        CostTerm(
            f"  link {name}", cost.link_s[name],
            f"{_bytes(cost.link_bytes[name])} a step of all routers",
        )
        for name in LINK_CLASSES if name in cost.link_s
    ]  # fmt: skip
    terms += [
        CostTerm(
            "slowest shard", float(cost.shard_s.sum()),
            f"a router's own rows; reading and computing overlap; {cost.call_s * 1e6:.0f} us a call",
        ),
        CostTerm(
            "  weights read", float(cost.weights_s.sum()),
            f"{cost.busiest_activated:.1f} activated experts on it, of {cost.activated:.1f} in the layer",
        ),
        CostTerm(
            "  computing", float(cost.flops_s.sum()), f"{cost.busiest_pairs:.1f} (token, expert) pairs on it"
        ),
    ]  # fmt: skip
    if cost.num_routers > 1:
        terms.append(CostTerm("other routers", float(cost.wait_s.sum()), "their rows before and in the same calls"))
    if cost.migration_bytes:
        terms.append(
            CostTerm(
                "migration", cost.migration_s / cost.steps_between_plans,
                f"{_bytes(cost.migration_bytes)} in {cost.migration_s:.3g} s, "
                f"spread over {cost.steps_between_plans} steps",
            )
        )  # fmt: skip
    return [
        *terms,
        CostTerm("step", cost.step_s, f"{cost.tokens / cost.step_s:,.0f} tokens/s through the expert layers"),
    ]


class Verdict(NamedTuple):
    """Whether separate shards pay on as many GPUs as an engine has; `why` is a line for a person."""

    pays: bool
    mesh_s: float
    engine_s: float
    gpus: int
    why: str


def compare_with_engine(
    trace: ActivationTrace,
    placement: Placement,
    *,
    model_layers: int | None = None,
    dense_bytes: int = 0,
    model: ModelShape | None = None,
    constants: Constants = H100,
    topology: Topology | None = None,
    tokens: int = 64,
    router_nodes: Sequence[int] | None = None,
    **arguments: object,
) -> Verdict:
    """Predict whether disaggregation pays: the expert half of a step with the same tokens on equally many GPUs.

    The mesh has a GPU for each shard and each router. The engine splits every expert over as many (tensor parallel, an
    all-reduce after each layer, across nodes if the shards stand on several) and goes at the pace of the slowest GPU.
    Neither the dense half of a step counts, for which the mesh has only its routers, nor that shards scale, fail and
    upgrade on their own, which may be worth a slower step.

    Args:
        model_layers: MoE layers of the model, for memory; None: those of the placement.
        dense_bytes: all but routed experts, for memory: all of it on each router, its share on each GPU of the engine.

    A side that lacks memory loses. GPUs of routers have as much as the smallest shard's.
    """
    if dense_bytes < 0:
        raise ValueError(f"dense_bytes is {dense_bytes}, expected at least 0")
    model = model or ModelShape()
    topology = topology or topology_of(placement)
    cost = step_cost(
        trace, placement, model=model, constants=constants, topology=topology, tokens=tokens,
        router_nodes=router_nodes, **arguments,  # type: ignore[arg-type]
    )  # fmt: skip
    gpus = placement.num_ranks + (topology.num_nodes if router_nodes is None else len(router_nodes))
    engine_s = placement.num_layers * _engine_layer_s(trace, cost, model, constants, topology, gpus)
    layers = model_layers or placement.num_layers
    mesh_lack = _mesh_lacks(placement, model, topology, layers, dense_bytes)
    needed = model.expert_bytes * placement.num_experts * layers + dense_bytes
    room = int(topology.memory_bytes_R.min()) * gpus
    if mesh_lack is not None or needed > room:
        engine = f"an engine of {gpus} GPUs needs {_bytes(needed)} and has {_bytes(room)}"
        pays = mesh_lack is None
        why = f"{engine}: it cannot hold them" if pays else f"{mesh_lack}; {engine}"
        return Verdict(pays, cost.step_s, engine_s, gpus, why)
    pays = cost.step_s < engine_s
    parts = {
        "wire": float(cost.wire_s.sum()), "router": float(cost.router_s.sum()),
        "shards": float((cost.shard_s + cost.wait_s).sum()),
    }  # fmt: skip
    largest = max(parts, key=lambda name: parts[name])
    why = (
        f"{cost.step_s * 1e3:.3g} ms on {placement.num_ranks} shards and {gpus - placement.num_ranks} routers "
        f"({largest} {parts[largest] / cost.step_s:.0%}) against {engine_s * 1e3:.3g} ms in an engine of {gpus} GPUs: "
        f"it {'pays' if pays else 'does not pay'}"
    )
    return Verdict(pays, cost.step_s, engine_s, gpus, why)


def _engine_layer_s(
    trace: ActivationTrace, cost: StepCost, model: ModelShape, constants: Constants, topology: Topology, gpus: int
) -> float:
    """Seconds of a layer in an engine of `gpus` GPUs that computes all tokens in one call."""
    ids = trace.topk_ids
    pairs = float((ids >= 0).sum()) / max(1, len(ids) * trace.num_layers) * cost.tokens
    activated_1, pairs_1, speed_1 = (
        np.array([value]) for value in (cost.activated / gpus, pairs / gpus, topology.speed_R.min())
    )
    busy_s = float(busy_seconds(activated_1, pairs_1, model, constants, speed_1)[0])
    link = topology.links.node if topology.num_nodes == 1 else topology.links.rack
    reduce_s = 2 * (gpus - 1) / gpus * cost.tokens * model.row_bytes / link.bandwidth_bytes_per_s + 2 * link.latency_s
    return busy_s + constants.call_s + constants.row_s * cost.tokens + reduce_s


def _mesh_lacks(
    placement: Placement, model: ModelShape, topology: Topology, layers: int, dense_bytes: int
) -> str | None:
    """What does not fit a shard or a router, in words; None if all does."""
    filled_LR = (placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1) >= 0).sum(2)
    needed_R = filled_LR.sum(0) * model.expert_bytes * layers / placement.num_layers
    lacking = np.flatnonzero(needed_R > topology.memory_bytes_R)
    if lacking.size:
        rank = int(lacking[0])
        return (
            f"shard {rank} needs {_bytes(needed_R[rank])} for its experts and has "
            f"{_bytes(float(topology.memory_bytes_R[rank]))}"
        )
    smallest = int(topology.memory_bytes_R.min())
    if dense_bytes > smallest:
        return f"a router needs {_bytes(dense_bytes)} for the dense layers and has {_bytes(smallest)}"
    return None


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


__all__ = [
    "CPU_CORE",
    "H100",
    "Constants",
    "CostTerm",
    "ModelShape",
    "StepCost",
    "Verdict",
    "compare_with_engine",
    "explain_cost",
    "migration_cost",
    "step_cost",
]
