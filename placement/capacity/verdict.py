"""What a step costs with a placement, in seconds, term by term; and whether separate expert shards pay at all.

T tokens of a step, L layers, K experts of one token, R ranks, N nodes.

A layer's time is the router's own work, the rows' way out, the slowest shard, and the results' way back. Layers follow
each other, so a step is their sum. A row goes to a rank once, however many of its experts the rank holds, so bytes
follow from fan-out; the bytes that leave the router's node follow from the nodes a token visits.

- Wire, one direction: `bytes / bandwidth + latency` at the busiest end of each link class, which is the router that
  sends most or the shard that receives most. Classes work in parallel, so the slowest one counts.
- Shard: reading the weights of its activated experts, or computing its pairs if that takes longer (a roofline that a
  good kernel comes close to), divided by the shard's speed, plus the fixed cost of a call.
- Migration: the bytes of new replicas from their nearest source, for the shard that receives most, spread over the
  steps until the next plan.

Predictions apply the dispatch rule itself (`choose_replicas`) to batches drawn from the trace. Constants are given or
measured, see `placement.capacity.hardware`.
"""

from __future__ import annotations

from typing import NamedTuple

from placement.capacity.hardware import CPU_CORE, H100, Constants, ModelShape
from placement.capacity.step_cost import StepCost, migration_cost, step_cost
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
    """Whether separate shards pay against an engine that holds all experts; `why` is a line for a person."""

    pays: bool
    mesh_s: float
    engine_s: float
    why: str


def compare_with_engine(
    trace: ActivationTrace,
    placement: Placement,
    *,
    engine_gpus: int = 1,
    model_layers: int | None = None,
    model: ModelShape | None = None,
    constants: Constants = H100,
    topology: Topology | None = None,
    tokens: int = 64,
    **arguments: object,
) -> Verdict:
    """Predict whether disaggregation pays: the expert half of a step with the same tokens, on shards and in an engine.

    The engine splits every expert over `engine_gpus` GPUs of speed 1 (tensor parallel, with an all-reduce within the
    node after each layer) and needs memory for all experts of `model_layers` layers (None: those of the placement).
    It does not count that shards scale, fail and upgrade on their own, which may be worth a slower step.
    """
    if engine_gpus < 1:
        raise ValueError(f"engine_gpus is {engine_gpus}, expected at least 1")
    model = model or ModelShape()
    topology = topology or Topology.uniform(placement.num_ranks, placement.num_nodes)
    cost = step_cost(
        trace, placement, model=model, constants=constants, topology=topology, tokens=tokens, **arguments  # type: ignore[arg-type]
    )  # fmt: skip
    ids = trace.topk_ids
    pairs = float((ids >= 0).sum()) / max(1, len(ids) * trace.num_layers) * tokens
    weights_s = cost.activated * model.expert_bytes / (constants.memory_bytes_per_s * engine_gpus)
    flops_s = pairs * model.pair_flops / (constants.flops_per_s * engine_gpus)
    reduce_s = 0.0
    if engine_gpus > 1:
        link = topology.links.node
        reduce_s = 2 * (engine_gpus - 1) / engine_gpus * tokens * model.row_bytes / link.bandwidth_bytes_per_s
        reduce_s += 2 * link.latency_s
    engine_s = placement.num_layers * (max(weights_s, flops_s) + constants.call_s + reduce_s)
    needed = model.expert_bytes * placement.num_experts * (model_layers or placement.num_layers)
    room = int(topology.memory_bytes_R.min()) * engine_gpus
    if needed > room:
        why = (
            f"all experts take {_bytes(needed)}, an engine of {engine_gpus} GPUs has {_bytes(room)}: "
            "it cannot hold them"
        )
        return Verdict(True, cost.step_s, engine_s, why)
    pays = cost.step_s < engine_s
    parts = {
        "wire": float(cost.wire_s.sum()), "router": float(cost.router_s.sum()), "shards": float(cost.shard_s.sum()),
    }  # fmt: skip
    largest = max(parts, key=lambda name: parts[name])
    why = (
        f"{cost.step_s * 1e3:.3g} ms on {placement.num_ranks} shards ({largest} {parts[largest] / cost.step_s:.0%}) "
        f"against {engine_s * 1e3:.3g} ms in an engine of {engine_gpus} GPUs: it {'pays' if pays else 'does not pay'}"
    )
    return Verdict(pays, cost.step_s, engine_s, why)


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
