"""How good a layer's slots are on its planning tokens, by the rule that dispatch uses.

T tokens, K experts of one, E experts, R ranks, s slots of a rank, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from placement.rule.evaluate import count_visits
from placement.rule.local_replicas import choose_local_first
from placement.rule.replica_choice import choose_replicas
from placement.search.annealing import EXCESS_TOLERANCE
from placement.search.problem import EXCESS_WEIGHT, LayerProblem


@dataclass(frozen=True)
class LayerScore:
    """Figures of a layer on its planning tokens.

    `excess`: load above what is allowed, in allowed loads, summed over ranks; `over`: that of the worst rank.
    `above`: the largest load over its target, in caps: 1 for a rank at its cap, in the mix of traffic where that is
    most. `far_fan_out`: ranks visited on other nodes than the token's router; NaN without `prefer_local_replicas`.
    """

    excess: float
    over: float
    above: float
    energy: float
    fan_out: float
    node_fan_out: float
    far_fan_out: float
    balancedness: float
    load_R: np.ndarray

    @property
    def key(self) -> tuple[float, float]:
        """Less is better: load above what is allowed first, then visits."""
        return (max(0.0, self.over - EXCESS_TOLERANCE), self.energy)

    def plain_key(self, limit: float) -> tuple[float, float]:
        """Less is better: first how far the largest rank load is above the limit, in caps, then visits."""
        return (max(0.0, self.above - limit - 1e-9), self.energy)

    def guarded_key(self, limit: float, num_tokens: int) -> tuple[float, float]:
        """Like `plain_key`, but load below the limit and above what was planned for costs visits."""
        above = max(0.0, self.over - EXCESS_TOLERANCE)
        return (self.plain_key(limit)[0], self.energy / max(num_tokens, 1) + EXCESS_WEIGHT * above)


class Scored(NamedTuple):
    """Slots int32 [R, s] of a layer, the rank int32 [T, K] chosen for each expert, and the score of that."""

    slots: np.ndarray
    rank_TK: np.ndarray
    score: LayerScore


def slot_table(experts_Rs: np.ndarray, num_experts: int) -> np.ndarray:
    """int32 [E, R]: the slot of each expert on each rank, -1 if none, as `choose_replicas` takes it."""
    num_ranks, num_slots = experts_Rs.shape
    table_ER = np.full((num_experts, num_ranks), -1, np.int32)
    rank_N, slot_N = np.nonzero(experts_Rs >= 0)
    table_ER[experts_Rs[rank_N, slot_N], rank_N] = rank_N * num_slots + slot_N
    return table_ER


def copies_of(problem: LayerProblem, experts_Rs: np.ndarray) -> int:
    """Slots whose expert their rank does not hold now; 0 where nothing is held."""
    if problem.home is None:
        return 0
    rank_N, slot_N = np.nonzero(experts_Rs >= 0)
    return int((~problem.home[experts_Rs[rank_N, slot_N], rank_N]).sum())


def assign(problem: LayerProblem, experts_Rs: np.ndarray) -> np.ndarray:
    """int32 [T, K]: the rank that the rule chooses for each expert."""
    in_order = problem.arrival is None or not problem.has_replicas
    ids_TK = problem.ids if in_order else np.ascontiguousarray(problem.ids[problem.arrival])
    table_ER = slot_table(experts_Rs, problem.num_experts)
    if problem.prefer_local_replicas:
        rank_TK = choose_local_first(ids_TK, table_ER, problem.node_of_rank, problem.num_nodes, problem.work)
    else:
        rank_TK = np.empty(ids_TK.shape, np.int32)
        loads_R = np.zeros(problem.num_ranks, np.int64)
        choose_replicas(ids_TK, table_ER, problem.node_of_rank, problem.num_nodes, problem.work, loads_R, rank_TK)
    if in_order:
        return rank_TK
    shuffled_TK = np.empty_like(rank_TK)
    shuffled_TK[problem.arrival] = rank_TK
    return shuffled_TK


def score_slots(problem: LayerProblem, experts_Rs: np.ndarray) -> Scored:
    """Apply the rule to the planning tokens, and score the result."""
    rank_TK = assign(problem, experts_Rs)
    used = rank_TK >= 0
    weight = problem.pair_weight[np.where(used, problem.ids, 0)] * used
    load_RM = np.empty((problem.num_ranks, problem.num_mixes))
    load_RM[:, 0] = np.bincount(np.where(used, rank_TK, 0).ravel(), weight.ravel(), minlength=problem.num_ranks)
    if problem.domains is not None:
        key_TK = np.where(used, rank_TK, 0) * problem.num_mixes + problem.mix_T[:, None]
        load_RM[:, 1:] = np.bincount(key_TK.ravel(), weight.ravel(), load_RM.size).reshape(load_RM.shape)[:, 1:]
    load_R = load_RM[:, 0]
    ranks = count_visits(rank_TK)
    nodes = problem.num_tokens
    if problem.num_nodes > 1:
        nodes = count_visits(np.where(used, problem.node_of_rank[rank_TK], -1))
    weighted, far_fan_out = nodes, float("nan")
    if problem.prefer_local_replicas:
        is_remote = used & (problem.node_of_rank[rank_TK] != problem.home_T[:, None])
        weighted = count_visits(np.where(is_remote, rank_TK, -1))
        far_fan_out = weighted / problem.num_tokens
    above_RM = np.maximum(load_RM / problem.allowed_RM - 1, 0)
    layer_score = LayerScore(
        excess=float(above_RM.sum()),
        over=float(above_RM.max()),
        above=float((load_RM / (problem.target_RM * problem.cap_M)).max()),
        energy=ranks + problem.weight_of_node * weighted + problem.copy_cost * copies_of(problem, experts_Rs),
        fan_out=ranks / problem.num_tokens,
        node_fan_out=nodes / problem.num_tokens,
        far_fan_out=far_fan_out,
        balancedness=float(1 / (load_R / problem.target).max()) if load_R.any() else 1.0,
        load_R=load_R,
    )
    return Scored(experts_Rs, rank_TK, layer_score)
