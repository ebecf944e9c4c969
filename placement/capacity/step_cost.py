"""The cost of one step with a placement, layer by layer, on batches drawn from a trace.

T tokens of a step, L layers, K experts of one token, E experts, R ranks, I routers.

Each router dispatches its own tokens and waits for its own answers. Only what meets at a shard is computed together
(`placement.capacity.turns`), so tokens of different routers read an expert's weights as often as they come apart.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from placement.capacity.hardware import H100, Constants, ModelShape, busy_seconds
from placement.capacity.residency import Offload, Residents
from placement.capacity.turns import Turn, Visit, layer_seconds
from placement.placement import Placement, check_same_model
from placement.rule.evaluate import count_visits
from placement.rule.local_replicas import keep_local
from placement.rule.replica_choice import check_top_k, choose_replicas
from placement.topology import LINK_CLASSES, Link, Topology
from placement.traces.trace import ActivationTrace, TraceError

PAIR_HEADER_BYTES = 8  # slot and weight of one expert of a row


@dataclass(frozen=True, eq=False)
class StepCost:
    """Seconds of each layer, float64 [L], averaged over routers and batches; what they follow from; bytes of a step.

    `shard_s` is the slowest shard's call for a router's rows alone, `wait_s` what others' rows add: those before, and
    those in the same call. `copy_s` is the part of `shard_s` in which experts come into memory, and `hit_rate` the
    share of experts that were in it; 0 and 1 unless shards offload. `link_s` (of a router) and `link_bytes` (of all)
    are by link class, both directions together, in all layers. `busiest_activated` and `busiest_pairs` are of the
    slowest call, averaged over layers; `activated` is what all tokens of a layer want. `migration_s` is the whole
    migration, not spread over steps.
    """

    router_s: np.ndarray
    wire_s: np.ndarray
    shard_s: np.ndarray
    wait_s: np.ndarray
    weights_s: np.ndarray
    flops_s: np.ndarray
    copy_s: np.ndarray
    hit_rate: float
    link_s: dict[str, float]
    link_bytes: dict[str, float]
    fan_out: float
    node_fan_out: float
    busiest_activated: float
    busiest_pairs: float
    activated: float
    call_s: float
    tokens: int
    num_routers: int
    migration_s: float
    migration_bytes: int
    steps_between_plans: int

    @property
    def step_s(self) -> float:
        """Seconds of the expert half of one step, its share of the migration included."""
        layers_s = float((self.router_s + self.wire_s + self.shard_s + self.wait_s).sum())
        return layers_s + self.migration_s / self.steps_between_plans


def step_cost(
    trace: ActivationTrace,
    placement: Placement,
    *,
    model: ModelShape | None = None,
    constants: Constants = H100,
    topology: Topology | None = None,
    tokens: int = 64,
    router_nodes: Sequence[int] | None = None,
    prefer_local_replicas: bool = False,
    current: Placement | None = None,
    steps_between_plans: int = 2000,
    think_s: float = 0.0,
    batches: int = 8,
    seed: int = 0,
    offload: Offload | None = None,
) -> StepCost:
    """Predict a router's step, where all routers together have `tokens` tokens in theirs.

    Args:
        topology: None for shards with the placement's speeds and nodes, one rack, nominal links.
        router_nodes: the node of each router; routers share the tokens evenly. None: one router on each node.
        prefer_local_replicas: routers take replicas on their own node first.
        current: the placement in use, where the migration starts from.
        think_s: what a router does between two MoE layers, which leaves shards to others. It is no part of the cost.
        batches: how many batches to draw from the trace and average.
        offload: shards have some of their experts in memory only: each is held, and one that is not in memory costs its
            copy. What is in memory goes on from batch to batch; in the first one it is what the trace has most of.

    Raises ValueError if trace, placement and topology do not fit together, TraceError for a trace of counts alone.
    """
    model = model or ModelShape()
    topology = topology or topology_of(placement)
    check_same_model("the placement", placement, "the trace", trace)
    check_top_k(trace.topk_ids.shape[2])
    if not trace.has_sets:
        raise TraceError("the cost of a step follows from per-token sets; the trace holds only counts")
    if topology.num_ranks != placement.num_ranks:
        raise ValueError(f"the topology has {topology.num_ranks} ranks, the placement {placement.num_ranks}")
    if think_s < 0:
        raise ValueError(f"think_s is {think_s}, expected at least 0")
    for name, value in (("tokens", tokens), ("batches", batches), ("steps_between_plans", steps_between_plans)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    routers = list(range(topology.num_nodes)) if router_nodes is None else list(router_nodes)
    if not routers or min(routers) < 0 or max(routers) >= topology.num_nodes:
        raise ValueError(f"router_nodes is {routers}, expected nodes from 0 to {topology.num_nodes - 1}")
    routers = routers[:tokens]

    rng = np.random.default_rng(seed)
    num_layers = placement.num_layers
    class_IR = np.array([_classes_from(topology, node) for node in routers])
    local_IR = class_IR == 1 if prefer_local_replicas else np.zeros(class_IR.shape, bool)
    total: dict[str, float] = defaultdict(float)
    link_s: dict[str, float] = {}
    link_bytes: dict[str, float] = {}
    names = ("router", "wire", "shard", "wait", "weights", "flops", "copy")
    residents = None if offload is None else Residents(placement, trace.load(), offload)
    layer_s = {name: np.zeros(num_layers) for name in names}
    for batch in range(batches):
        drawn = rng.choice(trace.num_tokens, tokens, replace=tokens > trace.num_tokens)
        sub = trace.take(drawn)
        turns_IL: list[list[Turn]] = [[] for _ in routers]
        alone_IL = np.zeros((len(routers), num_layers))
        for layer in range(num_layers):
            ids_TK = sub.ids_of_layer(layer)
            dispatched = _dispatch(ids_TK, placement, layer, local_IR)
            activated_IR, pairs_IR = dispatched.used_IRE.sum(2), dispatched.pairs_IR
            weights_IR = activated_IR * model.expert_bytes / constants.memory_bytes_per_s / topology.speed_R
            flops_IR = pairs_IR * model.pair_flops / constants.flops_per_s / topology.speed_R
            call_IR = busy_seconds(activated_IR, pairs_IR, model, constants, topology.speed_R)
            call_IR = np.where(pairs_IR > 0, call_IR + constants.call_s + constants.row_s * dispatched.rows_IR, 0.0)
            copy_IR = np.zeros(call_IR.shape)
            if offload is not None and residents is not None:
                copy_IR = offload.wait_s(residents.use(layer, dispatched.used_IRE), model.expert_bytes, think_s)
                call_IR = call_IR + copy_IR
            slowest_I = call_IR.argmax(1)
            for router, class_R in enumerate(class_IR):
                rows_R, pairs_R = dispatched.rows_IR[router], pairs_IR[router]
                out_s, out = _way(rows_R, rows_R * model.row_bytes + pairs_R * PAIR_HEADER_BYTES, class_R, topology)
                back_s, back = _way(rows_R, rows_R * model.row_bytes, class_R, topology)
                for found in (out_s, back_s):
                    for link_class, amount in found.items():
                        link_s[link_class] = link_s.get(link_class, 0.0) + amount / len(routers)
                for found in (out, back):
                    for link_class, amount in found.items():
                        link_bytes[link_class] = link_bytes.get(link_class, 0.0) + amount
                wire_out_s, wire_back_s = max(out_s.values(), default=0.0), max(back_s.values(), default=0.0)
                router_s = constants.router_s + constants.router_token_s * len(ids_TK[router :: len(routers)])
                router_s += constants.router_row_s * int(rows_R.sum())
                alone_s = float(call_IR[router].max())
                alone_IL[router, layer] = router_s + wire_out_s + wire_back_s + alone_s
                turns_IL[router].append(
                    Turn(
                        think_s + router_s + wire_out_s,
                        _visits(dispatched, router, len(routers) > 1, copy_IR[router]),
                        wire_back_s,
                    )
                )
                for name, spent_s in (("router", router_s), ("wire", wire_out_s + wire_back_s), ("shard", alone_s)):
                    layer_s[name][layer] += spent_s / len(routers)
            at = np.arange(len(routers)), slowest_I
            layer_s["weights"][layer] += weights_IR[at].mean()
            layer_s["flops"][layer] += flops_IR[at].mean()
            layer_s["copy"][layer] += copy_IR[at].mean()
            total["rows"] += int(dispatched.rows_IR.sum())
            total["nodes"] += dispatched.nodes
            total["activated"] += int(dispatched.used_IRE.any((0, 1)).sum())
            total["busiest_activated"] += float(activated_IR[at].mean())
            total["busiest_pairs"] += float(pairs_IR[at].mean())
        if len(routers) > 1:
            spent_IL = layer_seconds(turns_IL, model, constants, topology.speed_R, seed=seed + batch)
            # Never less than alone but for rounding.
            layer_s["wait"] += np.maximum(spent_IL - think_s - alone_IL, 0.0).mean(0)
    moved, migration_s = (0, 0.0) if current is None else migration_cost(current, placement, model, topology)
    times = batches * num_layers
    return StepCost(
        router_s=layer_s["router"] / batches,
        wire_s=layer_s["wire"] / batches,
        shard_s=layer_s["shard"] / batches,
        wait_s=layer_s["wait"] / batches,
        weights_s=layer_s["weights"] / batches,
        flops_s=layer_s["flops"] / batches,
        copy_s=layer_s["copy"] / batches,
        hit_rate=1.0 if residents is None else residents.hit_rate,
        link_s={name: value / batches for name, value in link_s.items()},
        link_bytes={name: value / batches for name, value in link_bytes.items()},
        fan_out=total["rows"] / (times * tokens),
        node_fan_out=total["nodes"] / (times * tokens),
        busiest_activated=total["busiest_activated"] / times,
        busiest_pairs=total["busiest_pairs"] / times,
        activated=total["activated"] / times,
        call_s=constants.call_s,
        tokens=tokens,
        num_routers=len(routers),
        migration_s=migration_s,
        migration_bytes=moved,
        steps_between_plans=steps_between_plans,
    )


def topology_of(placement: Placement) -> Topology:
    """Machines for a placement of which nothing else is known: its speeds and nodes, one rack, nominal links.

    Raises TopologyError if its nodes are not in the order of their ranks.
    """
    uniform = Topology.uniform(placement.num_ranks)
    nodes = np.zeros(placement.num_nodes, np.int32)
    return Topology(placement.node_of_rank_R, nodes, uniform.memory_bytes_R, placement.speed_R)


def migration_cost(current: Placement, target: Placement, model: ModelShape, topology: Topology) -> tuple[int, float]:
    """Bytes to copy, and seconds for the shard that receives most; each copy comes from the nearest source."""
    check_same_model("the current placement", current, "the target", target)
    if current.num_ranks != target.num_ranks:
        raise ValueError(f"the current placement has {current.num_ranks} ranks, the target {target.num_ranks}")
    distance_RR = topology.distance_RR
    class_bytes_RC = np.zeros((target.num_ranks, len(LINK_CLASSES)))
    for layer in range(target.num_layers):
        for rank in range(target.num_ranks):
            have = Counter(current.experts_of_rank(rank)[layer].tolist())
            want = Counter(target.experts_of_rank(rank)[layer].tolist())
            for expert, count in (want - have).items():
                if expert >= 0:
                    holders_H = np.flatnonzero(current.slots_LER[layer, expert] >= 0)
                    class_bytes_RC[rank, distance_RR[rank, holders_H].min()] += count * model.expert_bytes
    bandwidth_C = np.array([_link(topology, name).bandwidth_bytes_per_s for name in LINK_CLASSES])
    return int(class_bytes_RC.sum()), float((class_bytes_RC / bandwidth_C).sum(1).max())


def _classes_from(topology: Topology, node: int) -> np.ndarray:
    """int64 [R]: the link class between a router on a node and each rank."""
    rack_R = topology.rack_of_rank_R
    class_R = np.where(rack_R == topology.rack_of_node_N[node], 2, 3)
    return np.where(topology.node_of_rank_R == node, 1, class_R)


class _Dispatched(NamedTuple):
    """What each router sends in a layer: int64 [I, R] rows and pairs, bool [I, R, E] experts; node visits of all."""

    rows_IR: np.ndarray
    pairs_IR: np.ndarray
    used_IRE: np.ndarray
    nodes: int


def _dispatch(ids_TK: np.ndarray, placement: Placement, layer: int, local_IR: np.ndarray) -> _Dispatched:
    """One layer of all routers; `local_IR` bool: ranks whose replicas each takes first, all False for no preference."""
    num_routers, num_ranks = local_IR.shape
    rows_IR = np.zeros((num_routers, num_ranks), np.int64)
    pairs_IR = np.zeros((num_routers, num_ranks), np.int64)
    used_IRE = np.zeros((num_routers, num_ranks, placement.num_experts), bool)
    nodes = 0
    for router in range(num_routers):
        mine_TK = np.ascontiguousarray(ids_TK[router::num_routers])
        rank_TK = np.empty(mine_TK.shape, np.int32)
        load_R = np.zeros(num_ranks, np.int64)
        slots_ER = keep_local(placement.slots_LER[layer : layer + 1], local_IR[router])[0]
        choose_replicas(
            mine_TK, slots_ER, placement.node_of_rank_R, placement.num_nodes, placement.work_R, load_R, rank_TK
        )
        visits_TR = np.zeros((len(mine_TK), num_ranks + 1), bool)
        np.put_along_axis(visits_TR, rank_TK.astype(np.int64), True, axis=1)  # -1 goes into the last column
        visits_TR = visits_TR[:, :num_ranks]
        rows_IR[router] = visits_TR.sum(0)
        chosen = rank_TK >= 0
        pairs_IR[router] = np.bincount(rank_TK[chosen], minlength=num_ranks)
        used_IRE[router, rank_TK[chosen], mine_TK[chosen]] = True
        node_TK = np.where(chosen, placement.node_of_rank_R[rank_TK], -1)
        nodes += count_visits(node_TK)
    return _Dispatched(rows_IR, pairs_IR, used_IRE, nodes)


def _visits(dispatched: _Dispatched, router: int, with_experts: bool, copy_R: np.ndarray) -> tuple[Visit, ...]:
    """Nobody asks which experts a lone router wants."""
    found = []
    for rank in np.flatnonzero(dispatched.rows_IR[router]).tolist():
        experts = 0
        if with_experts:
            used_E = np.packbits(dispatched.used_IRE[router, rank], bitorder="little")
            experts = int.from_bytes(used_E.tobytes(), "little")
        rows, pairs = int(dispatched.rows_IR[router, rank]), int(dispatched.pairs_IR[router, rank])
        found.append(Visit(rank, rows, pairs, experts, float(copy_R[rank])))
    return tuple(found)


def _way(
    rows_R: np.ndarray, bytes_R: np.ndarray, class_R: np.ndarray, topology: Topology
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and bytes of one direction of one router, for each link class that carries anything."""
    seconds, carried = {}, {}
    for number, name in enumerate(LINK_CLASSES):
        of_class_R = (class_R == number) & (rows_R > 0)
        if of_class_R.any():
            link, nbytes = _link(topology, name), float(bytes_R[of_class_R].sum())
            seconds[name] = nbytes / link.bandwidth_bytes_per_s + link.latency_s
            seconds[name] += link.message_s * int(of_class_R.sum())
            carried[name] = nbytes
    return seconds, carried


def _link(topology: Topology, name: str) -> Link:
    return getattr(topology.links, name)  # type: ignore[no-any-return]
