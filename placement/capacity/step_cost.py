"""The cost of one step with a placement, layer by layer, on batches drawn from a trace.

T tokens of a step, L layers, K experts of one token, E experts, R ranks, I routers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placement.capacity.hardware import H100, Constants, ModelShape
from placement.placement import Placement, check_same_model
from placement.rule.local_replicas import keep_local
from placement.rule.replica_choice import check_top_k, choose_replicas
from placement.topology import LINK_CLASSES, Link, Topology
from placement.traces.trace import ActivationTrace, TraceError

PAIR_HEADER_BYTES = 8  # slot and weight of one expert of a row


@dataclass(frozen=True, eq=False)
class StepCost:
    """Seconds of each layer, float64 [L], averaged over batches; what they follow from; bytes of a step in all layers.

    `link_s` and `link_bytes` are by link class, both directions together. `busiest_activated` and `busiest_pairs` are
    those of the slowest shard, averaged over layers. `migration_s` is the whole migration, not spread over steps.
    """

    router_s: np.ndarray
    wire_s: np.ndarray
    shard_s: np.ndarray
    weights_s: np.ndarray
    flops_s: np.ndarray
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
        layers_s = float((self.router_s + self.wire_s + self.shard_s).sum())
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
    batches: int = 8,
    seed: int = 0,
) -> StepCost:
    """Predict a step of `tokens` tokens.

    Args:
        topology: None for equal shards, nodes as in the placement, one rack, nominal links.
        router_nodes: the node of each router; routers share the tokens evenly. None: one router on each node.
        prefer_local_replicas: routers take replicas on their own node first.
        current: the placement in use, where the migration starts from.
        batches: how many batches to draw from the trace and average.

    Raises ValueError if trace, placement and topology do not fit together, TraceError for a trace of counts alone.
    """
    model = model or ModelShape()
    topology = topology or Topology.uniform(placement.num_ranks, placement.num_nodes)
    check_same_model("the placement", placement, "the trace", trace)
    check_top_k(trace.topk_ids.shape[2])
    if not trace.has_sets:
        raise TraceError("the cost of a step follows from per-token sets; the trace holds only counts")
    if topology.num_ranks != placement.num_ranks:
        raise ValueError(f"the topology has {topology.num_ranks} ranks, the placement {placement.num_ranks}")
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
    total: Counter[str] = Counter()
    link_s: dict[str, float] = {}
    link_bytes: dict[str, float] = {}
    layer_s = {name: np.zeros(num_layers) for name in ("router", "wire", "shard", "weights", "flops")}
    for _ in range(batches):
        drawn = rng.choice(trace.num_tokens, tokens, replace=tokens > trace.num_tokens)
        sub = trace.take(drawn)
        for layer in range(num_layers):
            ids_TK = sub.ids_of_layer(layer)
            rows_IR, pairs_IR, used, nodes = _dispatch(ids_TK, placement, layer, local_IR)
            activated_R, pairs_R = used.sum(1), pairs_IR.sum(0)
            weights_R = activated_R * model.expert_bytes / constants.memory_bytes_per_s / topology.speed_R
            flops_R = pairs_R * model.pair_flops / constants.flops_per_s / topology.speed_R
            busy_R = np.maximum(weights_R, flops_R)
            slowest = int(busy_R.argmax())
            out_s, out = _way(rows_IR * model.row_bytes + pairs_IR * PAIR_HEADER_BYTES, class_IR, topology)
            back_s, back = _way(rows_IR * model.row_bytes, class_IR, topology)
            for into, found in ((link_s, out_s), (link_s, back_s), (link_bytes, out), (link_bytes, back)):
                for link_class, amount in found.items():
                    into[link_class] = into.get(link_class, 0.0) + amount
            router_tokens = -(-tokens // len(routers))
            layer_s["router"][layer] += constants.router_s + constants.router_token_s * router_tokens
            layer_s["wire"][layer] += max(out_s.values(), default=0.0) + max(back_s.values(), default=0.0)
            layer_s["shard"][layer] += busy_R[slowest] + constants.call_s
            layer_s["weights"][layer] += weights_R[slowest]
            layer_s["flops"][layer] += flops_R[slowest]
            total["rows"] += int(rows_IR.sum())
            total["nodes"] += nodes
            total["activated"] += int(used.any(0).sum())
            total["busiest_activated"] += int(activated_R[slowest])
            total["busiest_pairs"] += int(pairs_R[slowest])
    moved, migration_s = (0, 0.0) if current is None else migration_cost(current, placement, model, topology)
    times = batches * num_layers
    return StepCost(
        router_s=layer_s["router"] / batches,
        wire_s=layer_s["wire"] / batches,
        shard_s=layer_s["shard"] / batches,
        weights_s=layer_s["weights"] / batches,
        flops_s=layer_s["flops"] / batches,
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


def _dispatch(
    ids_TK: np.ndarray, placement: Placement, layer: int, local_IR: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """int64 [I, R] rows and pairs from each router, bool [R, E] activated experts, and the number of node visits.

    `local_IR` bool: ranks whose replicas each router takes first; all False for no preference.
    """
    num_routers, num_ranks = local_IR.shape
    rows_IR = np.zeros((num_routers, num_ranks), np.int64)
    pairs_IR = np.zeros((num_routers, num_ranks), np.int64)
    used_RE = np.zeros((num_ranks, placement.num_experts), bool)
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
        pairs_IR[router] = load_R
        used_RE[rank_TK[rank_TK >= 0], mine_TK[rank_TK >= 0]] = True
        nodes += int(visits_TR.reshape(len(mine_TK), placement.num_nodes, -1).any(2).sum())
    return rows_IR, pairs_IR, used_RE, nodes


def _way(bytes_IR: np.ndarray, class_IR: np.ndarray, topology: Topology) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and bytes of one direction, for each link class that carries anything."""
    seconds, carried = {}, {}
    for number, name in enumerate(LINK_CLASSES):
        of_class_IR = np.where(class_IR == number, bytes_IR, 0)
        if of_class_IR.any():
            link = _link(topology, name)
            busiest = max(of_class_IR.sum(1).max(), of_class_IR.sum(0).max())
            seconds[name] = float(busiest / link.bandwidth_bytes_per_s + link.latency_s)
            carried[name] = float(of_class_IR.sum())
    return seconds, carried


def _link(topology: Topology, name: str) -> Link:
    return getattr(topology.links, name)  # type: ignore[no-any-return]
