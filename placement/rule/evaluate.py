"""How good a placement is on a trace, by the rule that dispatch uses: fan-out, node fan-out, load, rows.

T tokens, L layers, K experts of one token, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from placement.placement import Placement, check_same_model
from placement.rule.local_replicas import choose_local_first
from placement.rule.replica_choice import check_top_k, choose_replicas
from placement.rule.steps import STEP_TOKENS, StepFigures, evaluate_steps
from placement.traces.trace import ActivationTrace


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures of each layer: float64 [L], and float64 [L, R] loads in (token, expert) pairs.

    `far_fan_out`: ranks visited on other nodes than the token's router, with a router on every node and tokens shared
    evenly. `fan_out_histogram` int64 [L, K + 1]: how many tokens visit each number of ranks. `rows_LR` int64: rows sent
    to each rank; a token's row goes there once, however many of its experts the rank holds. Without sampled sets,
    fan-outs are NaN, rows and histogram 0, and loads those of an even split. `steps`: what single steps see,
    which is less even than the whole trace.
    """

    fan_out: np.ndarray
    node_fan_out: np.ndarray
    far_fan_out: np.ndarray
    balancedness: np.ndarray
    balancedness_even_split: np.ndarray
    load_LR: np.ndarray
    rows_LR: np.ndarray
    fan_out_histogram: np.ndarray
    tokens: int
    steps: tuple[StepFigures, ...] = ()

    def summary(self) -> dict[str, float]:
        """Means over layers, the worst layer's balancedness, and for steps of each size balancedness and fan-out."""
        of_steps = {}
        for step in self.steps:
            of_steps[f"balancedness_{step.tokens}"] = float(step.balancedness.mean())
            of_steps[f"fan_out_{step.tokens}"] = float(step.fan_out.mean())
        return {
            "fan_out": float(self.fan_out.mean()),
            "node_fan_out": float(self.node_fan_out.mean()),
            "far_fan_out": float(self.far_fan_out.mean()),
            "balancedness": float(self.balancedness.mean()),
            "balancedness_even_split": float(self.balancedness_even_split.mean()),
            "worst_balancedness": float(self.balancedness.min()),
            "tokens": self.tokens,
            **of_steps,
        }


def balancedness_of(load_LR: np.ndarray, speed_R: np.ndarray | None = None) -> np.ndarray:
    """float64 [L]: mean over max of the rank loads; 1 for a layer without load.

    With speeds: the time of the slowest rank if loads were in proportion to speeds, over its time as they are.
    """
    speed_R = np.ones(load_LR.shape[1]) if speed_R is None else speed_R
    most_L = (load_LR / speed_R).max(1)
    return np.where(most_L > 0, load_LR.sum(1) / speed_R.sum() / np.where(most_L > 0, most_L, 1.0), 1.0)


def even_split_loads(placement: Placement, load_LE: np.ndarray) -> np.ndarray:
    """float64 [L, R]: rank loads when replicas share their expert's load evenly."""
    map_LS = placement.physical_to_logical_map
    share_LE = load_LE / placement.logical_replica_count
    held_LS = np.where(map_LS >= 0, np.take_along_axis(share_LE, np.maximum(map_LS, 0), axis=1), 0.0)
    return held_LS.reshape(placement.num_layers, placement.num_ranks, -1).sum(2)


def dispatch_trace(placement: Placement, topk_ids_TLK: np.ndarray, prefer_local_replicas: bool = False) -> np.ndarray:
    """int32 [L, T, K]: the rank that dispatch chooses for each expert, tokens in order, loads starting at zero.

    `prefer_local_replicas`: chosen by a router on every node, see `choose_local_first`.
    """
    rank_LTK = np.full((placement.num_layers, topk_ids_TLK.shape[0], topk_ids_TLK.shape[2]), -1, np.int32)
    node_of_rank_R = placement.node_of_rank_R
    for layer in range(placement.num_layers):
        ids_TK = np.ascontiguousarray(topk_ids_TLK[:, layer], dtype=np.int32)
        slots_ER = placement.slots_LER[layer]
        if prefer_local_replicas:
            rank_LTK[layer] = choose_local_first(
                ids_TK, slots_ER, node_of_rank_R, placement.num_nodes, placement.work_R
            )
        else:
            loads_R = np.zeros(placement.num_ranks, np.int64)
            choose_replicas(
                ids_TK, slots_ER, node_of_rank_R, placement.num_nodes, placement.work_R, loads_R, rank_LTK[layer]
            )
    return rank_LTK


def evaluate(
    placement: Placement,
    trace: ActivationTrace,
    prefer_local_replicas: bool = False,
    step_tokens: Sequence[int] = STEP_TOKENS,
) -> Evaluation:
    """Apply the dispatch rule to every token of the trace; `prefer_local_replicas` as set for the routers.

    A token that wants an expert twice counts it once. `step_tokens`: sizes of the steps that `evaluate_steps` looks at.
    Raises ValueError if the trace is of another model.
    """
    check_same_model("the placement", placement, "the trace", trace)
    num_layers, num_ranks = placement.num_layers, placement.num_ranks
    even_LR = even_split_loads(placement, trace.load("sets" if trace.has_sets else "counts"))
    even_balance = balancedness_of(even_LR, placement.speed_R)
    top_k = trace.topk_ids.shape[2]
    if not trace.has_sets:
        unknown = np.full(num_layers, np.nan)
        nothing = np.zeros((num_layers, num_ranks), np.int64)
        histogram = np.zeros((num_layers, top_k + 1), np.int64)
        return Evaluation(unknown, unknown, unknown, even_balance, even_balance, even_LR, nothing, histogram, 0)
    check_top_k(top_k)
    fan_out, node_fan_out, far_fan_out = np.zeros((3, num_layers))
    load_LR = np.zeros((num_layers, num_ranks))
    rows_LR = np.zeros((num_layers, num_ranks), np.int64)
    histogram = np.zeros((num_layers, top_k + 1), np.int64)
    ids_TLK = np.stack([trace.ids_of_layer(layer) for layer in range(num_layers)], axis=1)
    home_T = np.arange(len(ids_TLK)) % placement.num_nodes
    for layer, rank_TK in enumerate(dispatch_trace(placement, ids_TLK, prefer_local_replicas)):
        load_LR[layer] = np.bincount(rank_TK[rank_TK >= 0], minlength=num_ranks)
        ordered = np.sort(rank_TK, axis=1)
        first = np.ones(ordered.shape, bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        first &= ordered >= 0
        rows_LR[layer] = np.bincount(ordered[first], minlength=num_ranks)
        histogram[layer] = np.bincount(first.sum(1), minlength=top_k + 1)
        fan_out[layer] = first.sum() / len(rank_TK)
        node_TK = np.where(rank_TK >= 0, placement.node_of_rank_R[rank_TK], -1)
        node_fan_out[layer] = count_visits(node_TK) / len(rank_TK)
        far_fan_out[layer] = count_visits(np.where(node_TK != home_T[:, None], rank_TK, -1)) / len(rank_TK)
    balance = balancedness_of(load_LR, placement.speed_R)
    return Evaluation(
        fan_out, node_fan_out, far_fan_out, balance, even_balance, load_LR, rows_LR, histogram, trace.num_tokens,
        evaluate_steps(placement, trace, step_tokens, prefer_local_replicas),
    )  # fmt: skip


def on_machines(
    placement: Placement, speeds: Sequence[float] | None = None, slots_per_rank: int | Sequence[int] | None = None
) -> Placement:
    """The placement on these machines: ranks with these speeds (None: those that it carries) and numbers of slots.

    So that plans made with and without knowing the machines are scored on the same ones. Raises ValueError if a rank
    holds more experts of a layer than it has slots, or numbers do not fit the ranks.
    """
    if slots_per_rank is not None:
        given = [slots_per_rank] * placement.num_ranks if isinstance(slots_per_rank, int) else list(slots_per_rank)
        if len(given) != placement.num_ranks:
            raise ValueError(f"slots_per_rank are {given}, expected one for each of {placement.num_ranks} ranks")
        map_LRs = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1)
        held_LR = (map_LRs >= 0).sum(2)
        over = np.argwhere(held_LR > np.array(given))
        if over.size:
            layer, rank = over[0].tolist()
            raise ValueError(
                f"layer {layer}: rank {rank} holds {held_LR[layer, rank]} experts, but has {given[rank]} slots "
                f"({len(over)} such places in all)"
            )
    return placement if speeds is None else replace(placement, speeds=tuple(speeds))


def count_visits(group_TK: np.ndarray) -> int:
    """Distinct groups that each token visits, summed over tokens; -1 is no group."""
    ordered = np.sort(group_TK, axis=1)
    new = np.ones(ordered.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return int((new & (ordered >= 0)).sum())
