"""The state of a search with replicas: slots, who holds what, and what the rule for choosing replicas makes of it.

T tokens, K experts of one, E experts, R ranks, s slots of a rank, Q routers (see `holders`), P (token, expert) pairs, M
mixes of the traffic: all of it, then each domain. All are NamedTuples of arrays, which compiled code passes on at no
cost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from placement.compiled import compiled
from placement.rule.replica_choice import CoverScratch, Holders, Nodes, cover_scratch, cover_token
from placement.search.problem import LayerProblem
from placement.search.replicas.holders import (
    RouterHolders,
    collect_holders,
    count_remote_ranks,
    update_local_holders,
)


class Tokens(NamedTuple):
    """What tokens want; never changed. Tokens are in random order.

    `ids_TK` int32, distinct experts, -1 at the end of a row; `width_T` int64, how many there are; `router_T` int32, the
    token's router; `mix_T` int32, its domain's mix, 0 for none; `pair_weight_E` float64, the load of one pair.
    `token_P[start_E[e] : start_E[e + 1]]` are the tokens that want expert e, int32, ascending.
    """

    ids_TK: np.ndarray
    width_T: np.ndarray
    router_T: np.ndarray
    mix_T: np.ndarray
    pair_weight_E: np.ndarray
    token_P: np.ndarray
    start_E: np.ndarray


class Limits(NamedTuple):
    """What slots must keep to, and what a visited node costs, in visited ranks; `allowed_RM` float64, largest loads.

    A slot whose expert its rank does not hold in `home_ER`, bool, costs `copy_cost`, in visits.
    """

    nodes: Nodes
    node_weight: float
    min_replicas: int
    max_filled: int
    allowed_RM: np.ndarray
    home_ER: np.ndarray
    copy_cost: float


class Covering(NamedTuple):
    """What the rule makes of the slots as they stand.

    `pairs_QR` int64, the work that each router sent to each rank; `load_RM` and `load_ERM` float64; `rank_TK` int16,
    the rank chosen for each expert of a token; `visits_T` float64, weighted visits.
    """

    pairs_QR: np.ndarray
    load_RM: np.ndarray
    load_ERM: np.ndarray
    rank_TK: np.ndarray
    visits_T: np.ndarray


class Trial(NamedTuple):
    """What a move would make of it: `pairs_QR` and `load_RM` after it, and the tokens covered again, row by row."""

    pairs_QR: np.ndarray
    load_RM: np.ndarray
    token_T: np.ndarray
    rank_TK: np.ndarray
    visits_T: np.ndarray


class State(NamedTuple):
    """All that a search changes. `experts_Rs` int32: -1 an empty slot, -2 one that the rank does not have."""

    experts_Rs: np.ndarray
    routers: RouterHolders
    covering: Covering
    trial: Trial
    chosen_E: np.ndarray
    scratch: CoverScratch


@compiled()
def pairs_by_expert(ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """`token_P` and `start_E` of `Tokens`."""
    num_tokens, top_k = ids_TK.shape
    start_E = np.zeros(num_experts + 1, np.int64)
    for t in range(num_tokens):
        for k in range(top_k):
            if ids_TK[t, k] >= 0:
                start_E[ids_TK[t, k] + 1] += 1
    for e in range(num_experts):
        start_E[e + 1] += start_E[e]
    next_E = start_E[:-1].copy()
    token_P = np.empty(start_E[num_experts], np.int32)
    for t in range(num_tokens):
        for k in range(top_k):
            expert = ids_TK[t, k]
            if expert >= 0:
                token_P[next_E[expert]] = t
                next_E[expert] += 1
    return token_P, start_E


def tokens_of(problem: LayerProblem) -> Tokens:
    """The tokens of a layer, each with its router."""
    token_P, start_E = pairs_by_expert(problem.ids, problem.num_experts)
    width_T = (problem.ids >= 0).sum(1)
    router_T = 1 + problem.home_T if problem.prefer_local_replicas else np.zeros(problem.num_tokens, np.int32)
    return Tokens(problem.ids, width_T, router_T, problem.mix_T, problem.pair_weight, token_P, start_E)


def limits_of(problem: LayerProblem) -> Limits:
    """The limits of a layer."""
    home_ER = np.ones((problem.num_experts, problem.num_ranks), bool) if problem.home is None else problem.home
    return Limits(
        problem.nodes,
        problem.weight_of_node,
        problem.min_replicas,
        problem.max_filled,
        problem.allowed_RM,
        home_ER,
        problem.copy_cost,
    )


def state_of(problem: LayerProblem, experts_Rs: np.ndarray) -> State:
    """A state with a copy of the slots, int32 [R, s]; `cover_all` fills in the rest."""
    num_tokens, top_k = problem.ids.shape
    num_experts, num_ranks = problem.num_experts, problem.num_ranks
    num_routers = 1 + problem.num_nodes if problem.prefer_local_replicas else 1
    return State(
        experts_Rs.astype(np.int32),
        RouterHolders(
            np.zeros((num_routers, num_experts), np.int32), np.empty((num_routers, num_experts, num_ranks), np.int32)
        ),
        Covering(
            np.zeros((num_routers, num_ranks), np.int64),
            np.zeros((num_ranks, problem.num_mixes)),
            np.zeros((num_experts, num_ranks, problem.num_mixes)),
            np.empty((num_tokens, top_k), np.int16),
            np.zeros(num_tokens),
        ),
        Trial(
            np.empty((num_routers, num_ranks), np.int64),
            np.empty((num_ranks, problem.num_mixes)),
            np.empty(num_tokens, np.int32),
            np.empty((num_tokens, top_k), np.int16),
            np.empty(num_tokens),
        ),
        np.empty(num_experts, np.int32),
        cover_scratch(num_ranks, problem.num_nodes),
    )


@compiled(forceinline=True)
def all_holders(routers: RouterHolders) -> Holders:
    """The holders as router 0 sees them: all."""
    return Holders(routers.count_QE[0], routers.rank_QER[0])


@compiled(inline="always")
def cover(
    ids_TK: np.ndarray,
    t: int,
    width: int,
    router: int,
    routers: RouterHolders,
    limits: Limits,
    pairs_QR: np.ndarray,
    chosen_E: np.ndarray,
    scratch: CoverScratch,
) -> float:
    """Apply the rule to one token; returns its weighted visits. Its ranks are in `chosen_E` afterwards."""
    wanted_K = ids_TK[t]
    holders = Holders(routers.count_QE[router], routers.rank_QER[router])
    ranks, nodes = cover_token(wanted_K, width, holders, limits.nodes, pairs_QR[router], chosen_E, scratch)
    if router > 0:
        nodes = count_remote_ranks(wanted_K, width, chosen_E, limits.nodes, router - 1)
    return ranks + limits.node_weight * nodes


@compiled(forceinline=True)
def add_load(load_RM: np.ndarray, rank: int, mix: int, weight: float) -> None:
    """Add one pair's load to a rank, in all of the traffic and in its own mix, if it has one."""
    load_RM[rank, 0] += weight
    if mix > 0:
        load_RM[rank, mix] += weight


@compiled()
def cover_all(tokens: Tokens, limits: Limits, state: State) -> tuple[int, float]:
    """Apply the rule to all tokens, from the slots alone; returns filled slots, and weighted visits of all tokens."""
    routers, covering, chosen_E, scratch = state.routers, state.covering, state.chosen_E, state.scratch
    ids_TK, width_T, router_T, pair_weight_E = tokens.ids_TK, tokens.width_T, tokens.router_T, tokens.pair_weight_E
    pairs_QR, load_RM, load_ERM = covering.pairs_QR, covering.load_RM, covering.load_ERM
    rank_TK, visits_T, mix_T = covering.rank_TK, covering.visits_T, tokens.mix_T
    filled = collect_holders(all_holders(routers), state.experts_Rs)
    for e in range(len(load_ERM)):
        update_local_holders(routers, e, limits.nodes)
    pairs_QR[:] = 0
    load_RM[:] = 0.0
    load_ERM[:] = 0.0
    visits = 0.0
    for t in range(len(ids_TK)):
        width = width_T[t]
        visits_T[t] = cover(ids_TK, t, width, router_T[t], routers, limits, pairs_QR, chosen_E, scratch)
        visits += visits_T[t]
        for k in range(width):
            expert = ids_TK[t, k]
            rank = chosen_E[expert]
            rank_TK[t, k] = rank
            add_load(load_RM, rank, mix_T[t], pair_weight_E[expert])
            add_load(load_ERM[expert], rank, mix_T[t], pair_weight_E[expert])
    return filled, visits


@compiled()
def cover_rows(
    tokens: Tokens, limits: Limits, state: State, first: int, end: int, change: float, squares: float
) -> tuple[float, float]:
    """Cover the tokens of some rows of the trial again.

    Returns `change` and `squares` with the changes of the rows' weighted visits, and their squares, added.
    """
    # Members are looked up once: in the loop, each look-up would count references.
    routers, covering, trial = state.routers, state.covering, state.trial
    chosen_E, scratch = state.chosen_E, state.scratch
    ids_TK, width_T, router_T, pair_weight_E = tokens.ids_TK, tokens.width_T, tokens.router_T, tokens.pair_weight_E
    rank_TK, visits_T = covering.rank_TK, covering.visits_T
    work_R = limits.nodes.work_R
    pairs_QR, load_RM, token_T, mix_T = trial.pairs_QR, trial.load_RM, trial.token_T, tokens.mix_T
    new_rank_TK, new_visits_T = trial.rank_TK, trial.visits_T
    for row in range(first, end):
        t = token_T[row]
        width, router = width_T[t], router_T[t]
        for k in range(width):
            rank = rank_TK[t, k]
            pairs_QR[router, rank] -= work_R[rank]
            add_load(load_RM, rank, mix_T[t], -pair_weight_E[ids_TK[t, k]])
        of_token = cover(ids_TK, t, width, router, routers, limits, pairs_QR, chosen_E, scratch) - visits_T[t]
        for k in range(width):
            expert = ids_TK[t, k]
            rank = chosen_E[expert]
            new_rank_TK[row, k] = rank
            add_load(load_RM, rank, mix_T[t], pair_weight_E[expert])
        new_visits_T[row] = visits_T[t] + of_token
        change += of_token
        squares += of_token * of_token
    return change, squares


@compiled()
def accept_trial(tokens: Tokens, covering: Covering, trial: Trial, num_rows: int) -> None:
    """Take over the first rows of the trial."""
    ids_TK, width_T, pair_weight_E = tokens.ids_TK, tokens.width_T, tokens.pair_weight_E
    load_ERM, rank_TK, visits_T, mix_T = covering.load_ERM, covering.rank_TK, covering.visits_T, tokens.mix_T
    token_T, new_rank_TK, new_visits_T = trial.token_T, trial.rank_TK, trial.visits_T
    for row in range(num_rows):
        t = token_T[row]
        for k in range(width_T[t]):
            expert = ids_TK[t, k]
            add_load(load_ERM[expert], rank_TK[t, k], mix_T[t], -pair_weight_E[expert])
            add_load(load_ERM[expert], new_rank_TK[row, k], mix_T[t], pair_weight_E[expert])
            rank_TK[t, k] = new_rank_TK[row, k]
        visits_T[t] = new_visits_T[row]
    covering.pairs_QR[:] = trial.pairs_QR
    covering.load_RM[:] = trial.load_RM
