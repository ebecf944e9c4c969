"""What is to be planned: the request for a model, and the problem of one layer that follows from it.

T tokens, K experts of one, E experts, R ranks, s slots of a rank, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.replica_choice import MAX_TOP_K, choose_replicas
from placement.replica_search import CLOSED, EMPTY, EXCESS_TOLERANCE
from placement.tables import Placement, check_replicas_fit


@dataclass(frozen=True)
class PlanRequest:
    """What a placement must keep to, and what it shall be good at.

    Attributes:
        num_ranks, num_nodes: ranks are dealt to nodes in order, equally many each.
        slots_per_rank: slots of every rank, or of each; 0 for a rank that is lost or shall be drained.
        load_cap: largest rank load over the mean (by speed) that is allowed, on tokens like those of the trace.
        min_replicas: copies of every expert, on different nodes (ranks, if there is one node).
        objective: `fan_out`, or `balance` for balance alone.
        node_weight: what a visited node costs, in visited ranks.
        replica_budget: copies beyond the first `min_replicas` in all layers together, spread over layers by what
            they gain; None fills every slot.
        speeds: relative speed of each rank, None: all equal.
        max_moves: with a current placement, how many slots may change in each layer; None: any number.
        load_source: `auto`, `sets` or `counts`, see `ActivationTrace.load`.
        seed: same request, trace and seed give the same placement, as long as time is not short (see `seconds`).
        seconds: bound on the whole call. The search is sized for it beforehand, at a nominal speed, so that on a
            machine at least that fast the result does not depend on the clock; a slower one cuts the search short.
        effort: without `seconds`, size of the search; 1 is about ten seconds for three layers of 64 experts.
    """

    num_ranks: int
    num_nodes: int
    slots_per_rank: int | tuple[int, ...]
    load_cap: float = 1.05
    min_replicas: int = 1
    objective: str = "fan_out"
    node_weight: float = 4.0
    replica_budget: int | None = None
    speeds: tuple[float, ...] | None = None
    max_moves: int | None = None
    load_source: str = "auto"
    seed: int = 0
    seconds: float | None = None
    effort: float = 1.0

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.num_nodes < 1:
            raise ValueError(f"{self.num_ranks} ranks on {self.num_nodes} nodes: each must be at least 1")
        if self.num_ranks % self.num_nodes:
            raise ValueError(f"{self.num_ranks} ranks cannot be dealt evenly to {self.num_nodes} nodes")
        if not isinstance(self.slots_per_rank, int) and len(self.slots_per_rank) != self.num_ranks:
            raise ValueError(f"slots are given for {len(self.slots_per_rank)} ranks, there are {self.num_ranks}")
        if min(self.open_slots_R) < 0 or max(self.open_slots_R) < 1:
            raise ValueError(
                f"slots per rank are {self.slots_per_rank}, expected at least 1 on some rank and none below 0"
            )
        if not self.load_cap >= 1:
            raise ValueError(f"load cap is {self.load_cap}, expected at least 1 (largest rank load over the mean)")
        if self.min_replicas < 1:
            raise ValueError(f"min_replicas is {self.min_replicas}, expected at least 1")
        check_replicas_fit(self.min_replicas, self.num_ranks, self.num_nodes)
        if self.objective not in ("fan_out", "balance"):
            raise ValueError(f"objective is {self.objective!r}, expected fan_out or balance")
        if not self.node_weight >= 0:
            raise ValueError(f"node_weight is {self.node_weight}, expected 0 or more")
        if self.speeds is not None and (len(self.speeds) != self.num_ranks or not min(self.speeds) > 0):
            raise ValueError(f"speeds must be {self.num_ranks} numbers above 0, got {self.speeds}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}, expected more than 0")

    @property
    def open_slots_R(self) -> np.ndarray:
        """int64 [R]: slots of each rank."""
        return np.broadcast_to(np.asarray(self.slots_per_rank, np.int64), (self.num_ranks,))

    @property
    def node_of_rank_R(self) -> np.ndarray:
        """int32 [R]."""
        return (np.arange(self.num_ranks) // (self.num_ranks // self.num_nodes)).astype(np.int32)

    def check_experts(self, num_experts: int) -> None:
        """Raise ValueError, in one line, if the experts of a layer cannot be placed."""
        slots, needed = int(self.open_slots_R.sum()), num_experts * self.min_replicas
        if slots < needed:
            copies = f" in {self.min_replicas} copies" if self.min_replicas > 1 else ""
            raise ValueError(f"{slots} slots cannot hold {num_experts} experts{copies}: at least {needed} are needed")
        if self.num_nodes == 1:
            fits = np.minimum(self.open_slots_R, num_experts)
        else:
            fits = np.minimum(self.open_slots_R.reshape(self.num_nodes, -1).sum(1), num_experts)
        # Copies of one expert stand on different nodes: each can take every expert once at most.
        if int(fits.sum()) < needed:
            where = "nodes" if self.num_nodes > 1 else "ranks"
            raise ValueError(
                f"the slots of the {where} cannot hold {self.min_replicas} copies of {num_experts} experts apart"
            )


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One layer: tokens in random order, experts in canonical order, and the limits that hold.

    `ids` int32 [T, K]; `load` float64 [E]; `pair_weight` float64 [E], load of one pair; `open_slots` int64 [R];
    `target` float64 [R], load of each rank in perfect balance; `allowed` float64 [R]; `arrival` int64 [T], where
    the token that came first, second, ... stands in `ids`, None if as they stand: it decides ties between replicas.
    """

    ids: np.ndarray
    load: np.ndarray
    pair_weight: np.ndarray
    open_slots: np.ndarray
    node_of_rank: np.ndarray
    num_nodes: int
    node_weight: float
    min_copies: int
    max_filled: int
    target: np.ndarray
    allowed: np.ndarray
    arrival: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_experts(self) -> int:
        return len(self.load)

    @property
    def num_ranks(self) -> int:
        return len(self.open_slots)

    @property
    def has_replicas(self) -> bool:
        return self.max_filled > self.num_experts

    @property
    def weight_of_node(self) -> float:
        """Weight of a visited node in the energy; with a single node it decides nothing."""
        return self.node_weight if self.num_nodes > 1 else 0.0


@dataclass(frozen=True)
class LayerScore:
    """How a layer fares on its planning tokens, by the rule that the router dispatches by."""

    excess: float
    energy: float
    fan_out: float
    node_fan_out: float
    balancedness: float
    load_R: np.ndarray

    @property
    def key(self) -> tuple[float, float]:
        """Less is better: first the load above what is allowed, then the visits."""
        return (max(0.0, self.excess - EXCESS_TOLERANCE), self.energy)


def slot_table(experts_Rs: np.ndarray, num_experts: int) -> np.ndarray:
    """int32 [E, R]: the slot of each expert on each rank, -1 if none, as the rule for choosing replicas wants it."""
    num_ranks, num_slots = experts_Rs.shape
    table_ER = np.full((num_experts, num_ranks), -1, np.int32)
    rank_N, slot_N = np.nonzero(experts_Rs >= 0)
    table_ER[experts_Rs[rank_N, slot_N], rank_N] = rank_N * num_slots + slot_N
    return table_ER


def assign(problem: LayerProblem, experts_Rs: np.ndarray) -> np.ndarray:
    """int32 [T, K]: the rank that the rule fetches each expert from."""
    in_order = problem.arrival is None or not problem.has_replicas
    rank_TK = np.empty(problem.ids.shape, np.int32)
    choose_replicas(
        problem.ids if in_order else np.ascontiguousarray(problem.ids[problem.arrival]),
        slot_table(experts_Rs, problem.num_experts),
        problem.node_of_rank,
        problem.num_nodes,
        np.zeros(problem.num_ranks, np.int64),
        rank_TK,
    )
    if in_order:
        return rank_TK
    shuffled_TK = np.empty_like(rank_TK)
    shuffled_TK[problem.arrival] = rank_TK
    return shuffled_TK


def count_visits(group_TK: np.ndarray) -> int:
    """Distinct groups that tokens visit, summed over tokens; -1 counts as none."""
    ordered = np.sort(group_TK, axis=1)
    new = np.ones(ordered.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return int((new & (ordered >= 0)).sum())


def score(problem: LayerProblem, experts_Rs: np.ndarray) -> LayerScore:
    """Apply the rule to the planning tokens."""
    rank_TK = assign(problem, experts_Rs)
    used = rank_TK >= 0
    weight = problem.pair_weight[np.where(used, problem.ids, 0)] * used
    load_R = np.bincount(np.where(used, rank_TK, 0).ravel(), weights=weight.ravel(), minlength=problem.num_ranks)
    ranks = count_visits(rank_TK)
    nodes = problem.num_tokens
    if problem.num_nodes > 1:
        nodes = count_visits(np.where(used, problem.node_of_rank[rank_TK], -1))
    relative_R = load_R / problem.target
    return LayerScore(
        excess=float(np.maximum(load_R / problem.allowed - 1, 0).sum()),
        energy=ranks + problem.weight_of_node * nodes,
        fan_out=ranks / problem.num_tokens,
        node_fan_out=nodes / problem.num_tokens,
        balancedness=float(1 / max(relative_R.max(), 1e-12)),
        load_R=load_R,
    )


def closed_slots(open_slots_R: np.ndarray) -> np.ndarray:
    """int32 [R, s]: empty slots, and -2 for those that a rank does not have."""
    slots_Rs = np.full((len(open_slots_R), int(open_slots_R.max())), EMPTY, np.int32)
    slots_Rs[np.arange(slots_Rs.shape[1])[None, :] >= open_slots_R[:, None]] = CLOSED
    return slots_Rs


def load_guard(load_cap: float, num_tokens: int, top_k: int, num_ranks: int, has_replicas: bool) -> float:
    """How much below the cap to plan, so that tokens that were not seen keep to it.

    The load of a rank in a sample of n pairs is off by about 1 / sqrt(n), in the planning tokens and in others alike,
    and the worst rank counts. With replicas, evenness is cheap and a larger guard pays; without, the guard takes half
    of what the cap leaves at most.
    """
    pairs_of_rank = max(num_tokens * top_k / num_ranks, 1.0)
    share, errors = (0.75, 1.6) if has_replicas else (0.5, 0.9)
    return float(min(share * (load_cap - 1), errors / np.sqrt(pairs_of_rank)))


def check_trace_fits(num_layers: int, num_experts: int, placement: Placement) -> None:
    """Raise ValueError if a placement is of another model than the trace."""
    if (placement.num_layers, placement.num_experts) != (num_layers, num_experts):
        raise ValueError(
            f"the placement has {placement.num_layers} layers of {placement.num_experts} experts, "
            f"the trace {num_layers} of {num_experts}"
        )


def check_top_k(top_k: int) -> None:
    """Raise ValueError beyond what the rule for choosing replicas takes."""
    if top_k > MAX_TOP_K:
        raise ValueError(f"top-k is {top_k}, at most {MAX_TOP_K} is supported")
