"""What to plan: the request for a model, and the problem of one layer that follows from it.

T tokens, K experts of one, E experts, R ranks, s slots of a rank, N nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from placement.capacity.replica_worth import Worth
from placement.linear import check_replicas_fit
from placement.rule.replica_choice import Nodes, block_of_nodes
from placement.search.balance import greedy_balance
from placement.search.balance_search import BalanceProblem
from placement.speeds import check_speeds, work_of_speeds

MOST_DOMAIN_EXCESS = 0.5  # of a domain's largest rank load over the mean, however many domains there are
EXCESS_WEIGHT = 40.0  # cost of a rank's load above what is planned for: visits a token, for each mean load


@dataclass(frozen=True)
class PlanRequest:
    """What a placement must keep to, and what it should be good at.

    Attributes:
        num_ranks, num_nodes: ranks are dealt to nodes in order, equally many each.
        slots_per_rank: slots of every rank, or one number for each; 0 for a rank that is lost or to be drained.
        load_cap: largest allowed rank load over the mean (by speed), on tokens like those of the trace.
        min_replicas: replicas of every expert, on different nodes (ranks, if there is one node).
        objective: `fan_out`, or `balance` for balance alone.
        node_weight: cost of a visited node, in visited ranks.
        prefer_local_replicas: plan for a router on every node that takes replicas on its own node first. Routers have
            equal shares of the tokens. `node_weight` is then the extra cost of a rank visited on another node.
        replica_budget: replicas beyond the first `min_replicas`, in all layers together, spread over layers by what
            they gain; None fills every slot.
        worth: what steps and machines a replica must pay on to fill a slot; None: every slot is filled.
        speeds: relative speed of each rank; None: all equal.
        copy_price: with a current placement, visits a token that each expert to be copied must save in its layer: what
            its bytes take, spread over the time until the next plan.
        max_moves: with a current placement, how many slots of each layer may change; None: any number.
        load_source: `auto`, `sets` or `counts`, see `ActivationTrace.load`.
        seed: the same request, trace and seed give the same placement, unless `seconds` cut the search short.
        effort: size of the search; 1 is a few seconds for each layer of 64 experts. None: what suits `seconds` at a
            nominal speed, about half that of a 2023 server core; 1 if `seconds` is None too.
        seconds: bound on the whole call. A safety stop: the result depends on the clock only if the bound was reached,
            and then `PlanResult.cut` and a note say so.
    """

    num_ranks: int
    num_nodes: int
    slots_per_rank: int | tuple[int, ...]
    load_cap: float = 1.05
    min_replicas: int = 1
    objective: str = "fan_out"
    node_weight: float = 4.0
    prefer_local_replicas: bool = False
    replica_budget: int | None = None
    worth: Worth | None = None
    speeds: tuple[float, ...] | None = None
    copy_price: float = 0.02
    max_moves: int | None = None
    load_source: str = "auto"
    seed: int = 0
    effort: float | None = None
    seconds: float | None = None

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
        if self.prefer_local_replicas and self.num_nodes < 2:
            raise ValueError(f"prefer_local_replicas is set on {self.num_nodes} node, expected at least 2 nodes")
        if not self.node_weight >= 0:
            raise ValueError(f"node_weight is {self.node_weight}, expected 0 or more")
        if self.speeds is not None:
            check_speeds(self.speeds, self.num_ranks)
        if self.max_moves is not None and self.max_moves < 0:
            raise ValueError(f"max_moves is {self.max_moves}, expected 0 or more")
        if not self.copy_price >= 0:
            raise ValueError(f"copy_price is {self.copy_price}, expected 0 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}, expected more than 0")
        if self.effort is not None and not 0 <= self.effort < math.inf:
            raise ValueError(f"effort is {self.effort}, expected a finite number, 0 or more")

    @property
    def open_slots_R(self) -> np.ndarray:
        """int64 [R]: slots of each rank."""
        return np.broadcast_to(np.asarray(self.slots_per_rank, np.int64), (self.num_ranks,))

    @property
    def node_of_rank_R(self) -> np.ndarray:
        """int32 [R]."""
        return (np.arange(self.num_ranks) // (self.num_ranks // self.num_nodes)).astype(np.int32)

    def check_experts(self, num_experts: int) -> None:
        """Raise ValueError, in one line, if the slots cannot hold the experts of a layer."""
        slots, needed = int(self.open_slots_R.sum()), num_experts * self.min_replicas
        if slots < needed:
            each = f" in {self.min_replicas} replicas" if self.min_replicas > 1 else ""
            raise ValueError(f"{slots} slots cannot hold {num_experts} experts{each}: at least {needed} are needed")
        if self.num_nodes == 1:
            fits = np.minimum(self.open_slots_R, num_experts)
        else:
            fits = np.minimum(self.open_slots_R.reshape(self.num_nodes, -1).sum(1), num_experts)
        # Replicas stand on different nodes, so a node can take each expert only once.
        if int(fits.sum()) < needed:
            where = "nodes" if self.num_nodes > 1 else "ranks"
            raise ValueError(
                f"the slots of the {where} cannot hold {self.min_replicas} replicas of {num_experts} experts apart"
            )


def canonical_order(ids_TK: np.ndarray, load_E: np.ndarray, seed: int) -> np.ndarray:
    """int64 [E]: experts by load, heaviest first; ties by the tokens that want them, not by their numbers."""
    mark_T = np.random.default_rng(seed).random(len(ids_TK))
    used = ids_TK >= 0
    mark_E = np.bincount(
        np.where(used, ids_TK, 0).ravel(), weights=(mark_T[:, None] * used).ravel(), minlength=len(load_E)
    )
    return np.lexsort((mark_E, -load_E))


def rank_targets(load_E: np.ndarray, request: PlanRequest) -> np.ndarray:
    """float64 [R]: the load of each rank in perfect balance, by speed; next to nothing for a rank without slots."""
    usable_R = np.where(request.open_slots_R > 0, np.asarray(request.speeds or (1.0,) * request.num_ranks), 0.0)
    return np.maximum(load_E.sum() * usable_R / usable_R.sum(), 1e-9)


def greedy_slots(load_E: np.ndarray, request: PlanRequest, max_filled: int) -> np.ndarray:
    """Slots int32 [R, s] by greedy balancing alone; ties are decided by the order of `load_E`."""
    target_R = rank_targets(load_E, request)
    return greedy_balance(
        load_E, request.open_slots_R, request.node_of_rank_R, request.num_nodes, target_R / target_R.max(),
        request.min_replicas, max_filled,
    )  # fmt: skip


class DomainLoads(NamedTuple):
    """The domains of a layer's tokens, and what ranks are allowed of each.

    `domain_T` int [T]; `load_ED` float64 [E, D]; `target_RD` and `allowed_RD` float64 [R, D], as in `LayerProblem`;
    `cap_D`, largest rank load over the mean.
    """

    domain_T: np.ndarray
    load_ED: np.ndarray
    target_RD: np.ndarray
    allowed_RD: np.ndarray
    cap_D: np.ndarray


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One layer: tokens in random order, experts in canonical order, and the limits that hold.

    `ids` int32 [T, K]; `load` float64 [E]; `pair_weight` float64 [E], load of one pair; `open_slots` int64 [R];
    `target` float64 [R], load of each rank in perfect balance; `allowed` float64 [R], what is planned for, somewhat
    below `load_cap` times that. `arrival` int64 [T]: where the first, second, ... token to arrive stands in `ids`, None
    if in order. The order of arrival decides ties between replicas and, with `prefer_local_replicas`, which node's
    router has a token: routers take turns. With `domains`, limits hold for each of them alone too: M mixes of the
    traffic, all of it first. `home` bool [E, R]: who holds what now; every other copy costs `copy_cost` visits. None:
    nothing is held.
    """

    ids: np.ndarray
    load: np.ndarray
    pair_weight: np.ndarray
    open_slots: np.ndarray
    node_of_rank: np.ndarray
    num_nodes: int
    node_weight: float
    min_replicas: int
    max_filled: int
    target: np.ndarray
    allowed: np.ndarray
    load_cap: float
    arrival: np.ndarray | None = None
    prefer_local_replicas: bool = False
    speeds: tuple[float, ...] | None = None
    domains: DomainLoads | None = None
    home: np.ndarray | None = None
    copy_cost: float = 0.0

    @property
    def num_mixes(self) -> int:
        return 1 + (0 if self.domains is None else len(self.domains.cap_D))

    @property
    def mix_T(self) -> np.ndarray:
        """int32 [T]: the mix of each token's domain; 0 without domains."""
        if self.domains is None:
            return np.zeros(self.num_tokens, np.int32)
        return (1 + self.domains.domain_T).astype(np.int32)

    @property
    def load_EM(self) -> np.ndarray:
        """float64 [E, M]."""
        return self._of_mixes(self.load, None if self.domains is None else self.domains.load_ED)

    @property
    def target_RM(self) -> np.ndarray:
        """float64 [R, M]."""
        return self._of_mixes(self.target, None if self.domains is None else self.domains.target_RD)

    @property
    def allowed_RM(self) -> np.ndarray:
        """float64 [R, M]."""
        return self._of_mixes(self.allowed, None if self.domains is None else self.domains.allowed_RD)

    @property
    def cap_M(self) -> np.ndarray:
        """float64 [M]."""
        return np.concatenate([[self.load_cap], [] if self.domains is None else self.domains.cap_D])

    def _of_mixes(self, of_all: np.ndarray, of_domains: np.ndarray | None) -> np.ndarray:
        columns = [of_all[:, None]] if of_domains is None else [of_all[:, None], of_domains]
        return np.ascontiguousarray(np.concatenate(columns, axis=1))

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
    def work(self) -> np.ndarray:
        """int64 [R]: what a pair counts on each rank, in the rule."""
        return work_of_speeds(self.speeds, self.num_ranks)

    @property
    def nodes(self) -> Nodes:
        """The nodes as compiled code takes them."""
        block = int(block_of_nodes(self.node_of_rank, self.num_nodes))
        return Nodes(self.node_of_rank, self.num_nodes, block, self.work)

    @property
    def balance(self) -> BalanceProblem:
        """The part of the problem that is about loads alone."""
        return BalanceProblem(self.load[:, None], self.target[:, None], self.nodes, self.min_replicas, self.max_filled)

    @property
    def joint_balance(self) -> BalanceProblem:
        """The same of all mixes, each against its cap."""
        capped_RM = self.target_RM * self.cap_M
        return BalanceProblem(self.load_EM, capped_RM, self.nodes, self.min_replicas, self.max_filled)

    @property
    def has_replicas(self) -> bool:
        return self.max_filled > self.num_experts

    @property
    def home_T(self) -> np.ndarray:
        """int32 [T]: the node of each token's router, with `prefer_local_replicas`."""
        turn_T = np.arange(self.num_tokens, dtype=np.int32) % self.num_nodes
        if self.arrival is None:
            return turn_T
        home_T = np.empty_like(turn_T)
        home_T[self.arrival] = turn_T
        return home_T

    @property
    def weight_of_node(self) -> float:
        """Weight of a visited node in the energy; 0 with a single node, where it decides nothing."""
        return self.node_weight if self.num_nodes > 1 else 0.0


def domain_excess(load_cap: float, num_domains: int) -> float:
    """How far the largest rank load of a domain may be above the mean, in means; see `domain_loads`."""
    return min((load_cap - 1) * num_domains, MOST_DOMAIN_EXCESS)


def domain_loads(problem: LayerProblem, domain_T: np.ndarray) -> DomainLoads:
    """Loads and limits of each domain that has tokens.

    What a domain is above an even load counts in all of the traffic by its share. So with D domains each may be D times
    as far above as all of the traffic, at most `MOST_DOMAIN_EXCESS`; by the average share, since a rare domain must not
    be left to be uneven.
    """
    _, domain_T = np.unique(domain_T, return_inverse=True)
    num_domains, num_experts = int(domain_T.max()) + 1, problem.num_experts
    used = problem.ids >= 0
    key_P = problem.ids[used] * num_domains + np.broadcast_to(domain_T[:, None], used.shape)[used]
    load_ED = np.bincount(key_P, problem.pair_weight[problem.ids[used]], num_experts * num_domains)
    load_ED = load_ED.reshape(num_experts, num_domains)
    load_D, tokens_D = load_ED.sum(0), np.bincount(domain_T, minlength=num_domains)
    excess_D = np.full(num_domains, domain_excess(problem.load_cap, num_domains))
    guard_D = [
        load_guard(1 + excess, int(tokens), problem.ids.shape[1], problem.num_ranks, problem.has_replicas)
        for excess, tokens in zip(excess_D, tokens_D, strict=True)
    ]
    target_RD = np.maximum(problem.target[:, None] / problem.target.sum() * load_D, 1e-9)
    return DomainLoads(domain_T, load_ED, target_RD, target_RD * (1 + excess_D - guard_D), 1 + excess_D)


def first_tokens(problem: LayerProblem, num_tokens: int) -> LayerProblem:
    """The same layer with only its first tokens, a fair sample; loads stay those of all tokens."""
    if num_tokens >= problem.num_tokens:
        return problem
    ids_TK = problem.ids[:num_tokens]
    sets_E = np.bincount(ids_TK[ids_TK >= 0], minlength=problem.num_experts)
    domains = problem.domains
    if domains is not None:
        domains = domains._replace(domain_T=domains.domain_T[:num_tokens])
    return replace(
        problem,
        ids=ids_TK,
        pair_weight=problem.load / np.maximum(sets_E, 1),
        arrival=None,
        domains=domains,
        copy_cost=problem.copy_cost * num_tokens / problem.num_tokens,
    )


def load_guard(load_cap: float, num_tokens: int, top_k: int, num_ranks: int, has_replicas: bool) -> float:
    """How far below the cap to plan, so that unseen tokens keep to it too.

    A rank's load in a sample of n pairs is off by about 1 / sqrt(n), in the planning tokens and in others, and the
    worst rank counts. With replicas, balance is cheap and a larger guard pays; without them, the guard takes less of
    what the cap leaves.
    """
    pairs_of_rank = max(num_tokens * top_k / num_ranks, 1.0)
    share, errors = (0.75, 1.6) if has_replicas else (0.65, 0.9)
    return float(min(share * (load_cap - 1), errors / np.sqrt(pairs_of_rank)))
