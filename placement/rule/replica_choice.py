"""The rule that picks the replica of each expert for each token, shared by routers and planner.

T tokens, K experts of a token, E logical experts, R ranks, N nodes, J a few of them.

Tokens are taken in order. Among the ranks that hold experts the token still wants, the rule takes the rank that holds
most of them; on a tie the rank with less load so far, then the lower index. With several nodes it picks the node first:
the one that holds most, on a tie one the token already visits, then the one whose least loaded rank has less load, then
the lower index. Load is counted in work: a (token, expert) pair is `work_R[r]` on rank r, 1 where all ranks
are equally fast, more on slower ones. This is greedy set cover: fan-out is within ln K + 1 of the least possible, and
nearly always equal to it.

Then, all choices of the batch being known, `even_out` takes pairs off the ranks that have most of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from placement.compiled import compiled
from placement.rule.bits import lowest_bit, popcount
from placement.rule.even_out import even_out
from placement.rule.sole_holders import take_sole_holders

MAX_TOP_K = 63  # the experts a token still wants are bits of an int64


class Nodes(NamedTuple):
    """The node of each rank: int32 [R], 0 to `num` - 1. `block` is what `block_of_nodes` returns.

    `work_R` int64: what a pair counts on each rank, see `placement.speeds.work_of_speeds`.
    """

    of_rank_R: np.ndarray
    num: int
    block: int
    work_R: np.ndarray


class Holders(NamedTuple):
    """The ranks that hold each expert: `rank_ER[e, : count_E[e]]`, both int32, in no particular order."""

    count_E: np.ndarray
    rank_ER: np.ndarray


class CoverScratch(NamedTuple):
    """Work space of `cover_token`. The int64 arrays are 0 before and after a call; `touched_*` are int32."""

    held_R: np.ndarray
    held_N: np.ndarray
    visited_N: np.ndarray
    touched_R: np.ndarray
    touched_N: np.ndarray


@compiled()
def cover_scratch(num_ranks: int, num_nodes: int) -> CoverScratch:
    """Scratch for any number of tokens."""
    return CoverScratch(
        np.zeros(num_ranks, np.int64),
        np.zeros(num_nodes, np.int64),
        np.zeros(num_nodes, np.int64),
        np.empty(num_ranks, np.int32),
        np.empty(num_nodes, np.int32),
    )


@compiled()
def block_of_nodes(node_of_rank_R: np.ndarray, num_nodes: int) -> int:
    """Ranks of a node if ranks are dealt to nodes in order, equally many each; else 0."""
    per_node = len(node_of_rank_R) // num_nodes
    for r in range(len(node_of_rank_R)):
        if per_node == 0 or node_of_rank_R[r] != r // per_node:
            return 0
    return per_node


@compiled()
def _least_load_of_node(node: int, nodes: Nodes, rank_load_R: np.ndarray) -> int:
    least = np.int64(-1)
    first, last = 0, len(rank_load_R)
    if nodes.block > 0:
        first, last = node * nodes.block, (node + 1) * nodes.block
    for r in range(first, last):
        if nodes.of_rank_R[r] == node and (least < 0 or rank_load_R[r] < least):
            least = rank_load_R[r]
    return int(least)


@compiled()
def _best_node(
    held_N: np.ndarray, touched_J: np.ndarray, left: int, visited_N: np.ndarray, nodes: Nodes, rank_load_R: np.ndarray
) -> int:
    """The node to visit next, among `touched_J`; `visited_N[n]` is 1 where the token already visits n."""
    best = -1
    best_key = np.int64(0)
    best_load = np.int64(-1)  # computed on ties only
    for n in touched_J:
        cover = popcount(held_N[n] & left)
        if cover == 0:
            continue
        key = 2 * cover + visited_N[n]
        if key < best_key:
            continue
        load = np.int64(-1)
        if key == best_key:
            if best_load < 0:
                best_load = _least_load_of_node(best, nodes, rank_load_R)
            load = _least_load_of_node(n, nodes, rank_load_R)
            if load > best_load or (load == best_load and n > best):
                continue
        best, best_key, best_load = n, key, load
    return best


@compiled()
def _best_holder(holders_J: np.ndarray, visited_N: np.ndarray, nodes: Nodes, rank_load_R: np.ndarray) -> int:
    """The rank for one expert on its own: node first, as in `_best_node`, then the least loaded rank there."""
    best = -1
    best_node_load = np.int64(-1)
    for r in holders_J:
        node = nodes.of_rank_R[r]
        load = _least_load_of_node(node, nodes, rank_load_R)
        if best >= 0:
            other = nodes.of_rank_R[best]
            if node == other:
                if rank_load_R[r] > rank_load_R[best] or (rank_load_R[r] == rank_load_R[best] and r > best):
                    continue
            elif visited_N[node] != visited_N[other]:
                if visited_N[node] == 0:
                    continue
            elif load > best_node_load or (load == best_node_load and node > other):
                continue
        best, best_node_load = r, load
    return int(best)


@compiled(inline="always")
def cover_token(
    wanted_K: np.ndarray,
    num_wanted: int,
    holders: Holders,
    nodes: Nodes,
    rank_load_R: np.ndarray,
    chosen_E: np.ndarray,
    scratch: CoverScratch,
) -> tuple[int, int]:
    """Choose for one token; returns the number of ranks and of nodes that it visits (1 node where there is only one).

    `wanted_K[:num_wanted]` are distinct experts with at least one holder. Writes `chosen_E` for them and adds to
    `rank_load_R`, int64.
    """
    num_holders_E, holders_ER = holders.count_E, holders.rank_ER
    node_of_rank_R, num_nodes, per_node, work_R = nodes.of_rank_R, nodes.num, nodes.block, nodes.work_R
    held_R, held_N, visited_N = scratch.held_R, scratch.held_N, scratch.visited_N
    touched_R, touched_N = scratch.touched_R, scratch.touched_N
    # Bit i of held_R[r]: rank r holds the token's i-th wanted expert.
    num_touched = 0
    num_touched_nodes = 0
    for i in range(num_wanted):
        expert = wanted_K[i]
        bit = np.int64(1) << i
        for j in range(num_holders_E[expert]):
            r = holders_ER[expert, j]
            if held_R[r] == 0:
                touched_R[num_touched] = r
                num_touched += 1
            held_R[r] |= bit
            if num_nodes > 1:
                n = node_of_rank_R[r]
                if held_N[n] == 0:
                    touched_N[num_touched_nodes] = n
                    num_touched_nodes += 1
                held_N[n] |= bit
    left = (np.int64(1) << num_wanted) - 1
    ranks_visited = 0
    nodes_visited = 1
    if num_nodes > 1:
        nodes_visited = 0
    while left:
        node = -1
        if num_nodes > 1:
            most = np.int64(0)
            for j in range(num_touched_nodes):
                most = max(most, popcount(held_N[touched_N[j]] & left))
            if most == 1:
                # Every node holds at most one of those left: the choices are independent.
                while left:
                    expert = wanted_K[lowest_bit(left)]
                    left &= left - 1
                    best = holders_ER[expert, 0]
                    if num_holders_E[expert] > 1:
                        held_by_J = holders_ER[expert, : num_holders_E[expert]]
                        best = _best_holder(held_by_J, visited_N, nodes, rank_load_R)
                    node = node_of_rank_R[best]
                    nodes_visited += 1 - visited_N[node]
                    visited_N[node] = 1
                    chosen_E[expert] = best
                    rank_load_R[best] += work_R[best]
                    ranks_visited += 1
                break
            node = _best_node(held_N, touched_N[:num_touched_nodes], left, visited_N, nodes, rank_load_R)
            nodes_visited += 1 - visited_N[node]
            visited_N[node] = 1
        best = -1
        best_cover = np.int64(0)
        in_block = node >= 0 and per_node > 0
        for j in range(per_node if in_block else num_touched):
            r = node * per_node + j if in_block else touched_R[j]
            if node >= 0 and not in_block and node_of_rank_R[r] != node:
                continue
            cover = popcount(held_R[r] & left)
            if cover > best_cover:
                best = r
                best_cover = cover
            elif cover == best_cover and cover > 0:
                load = rank_load_R[r]
                if load < rank_load_R[best] or (load == rank_load_R[best] and r < best):
                    best = r
        if best_cover == 1 and num_nodes == 1:
            # Every rank holds at most one of those left: the choices are independent.
            while left:
                expert = wanted_K[lowest_bit(left)]
                left &= left - 1
                best = holders_ER[expert, 0]
                for j in range(1, num_holders_E[expert]):
                    r = holders_ER[expert, j]
                    load = rank_load_R[r]
                    if load < rank_load_R[best] or (load == rank_load_R[best] and r < best):
                        best = r
                chosen_E[expert] = best
                rank_load_R[best] += work_R[best]
                ranks_visited += 1
            break
        taken = held_R[best] & left
        left &= ~taken
        rank_load_R[best] += best_cover * work_R[best]
        ranks_visited += 1
        while taken:
            chosen_E[wanted_K[lowest_bit(taken)]] = best
            taken &= taken - 1
    for j in range(num_touched):
        held_R[touched_R[j]] = 0
    for j in range(num_touched_nodes):
        held_N[touched_N[j]] = 0
        visited_N[touched_N[j]] = 0
    return ranks_visited, nodes_visited


@compiled()
def choose_replicas(
    topk_ids_TK: np.ndarray,
    slots_ER: np.ndarray,
    node_of_rank_R: np.ndarray,
    num_nodes: int,
    work_R: np.ndarray,
    rank_load_R: np.ndarray,
    rank_TK: np.ndarray,
) -> None:
    """Choose a rank for each expert of each token.

    Args:
        topk_ids_TK: int32 [T, K], logical experts; negative ids are padding. An expert that occurs twice in a row
            counts once and gets one rank.
        slots_ER: int32 [E, R], slot of each expert on each rank, -1 where it has no live slot.
        node_of_rank_R: int32 [R], 0 to num_nodes - 1.
        num_nodes: nodes; 1 leaves them out of the choice.
        work_R: int64 [R], what a pair counts on each rank.
        rank_load_R: int64 [R], the work that each rank has received so far; added to.
        rank_TK: int32 [T, K], written: the chosen rank, -1 where the id is no expert or has no live slot.

    Raises ValueError if K is above 63. Single-threaded, releases the GIL, callable from other numba functions.
    """
    num_tokens, top_k = topk_ids_TK.shape
    num_experts, num_ranks = slots_ER.shape
    if top_k > 63:
        raise ValueError("top-k above 63")
    before_R = rank_load_R.copy()
    start = take_sole_holders(topk_ids_TK, slots_ER, work_R, rank_load_R, rank_TK)
    if start == num_tokens:
        return
    choosing_T = np.empty(num_tokens, np.int32)
    num_choosing = 0
    # Holders are looked up when an expert is first met: -1 not yet, else their number.
    num_holders_E = np.full(num_experts, -1, np.int32)
    holders_ER = np.empty((num_experts, num_ranks), np.int32)
    seen_in_E = np.full(num_experts, -1, np.int32)
    chosen_E = np.empty(num_experts, np.int32)
    wanted_K = np.empty(top_k, np.int32)
    holders = Holders(num_holders_E, holders_ER)
    nodes = Nodes(node_of_rank_R, num_nodes, block_of_nodes(node_of_rank_R, num_nodes), work_R)
    scratch = cover_scratch(num_ranks, num_nodes)

    for t in range(start, num_tokens):
        num_wanted = 0
        several = False
        for k in range(top_k):
            expert = topk_ids_TK[t, k]
            if expert < 0 or expert >= num_experts or seen_in_E[expert] == t:
                continue
            seen_in_E[expert] = t
            count = num_holders_E[expert]
            if count < 0:
                count = 0
                for r in range(num_ranks):
                    if slots_ER[expert, r] >= 0:
                        holders_ER[expert, count] = r
                        count += 1
                num_holders_E[expert] = count
            if count == 0:
                chosen_E[expert] = -1
                continue
            if count > 1:
                several = True
            chosen_E[expert] = holders_ER[expert, 0]
            wanted_K[num_wanted] = expert
            num_wanted += 1

        if not several:
            for i in range(num_wanted):
                rank_load_R[chosen_E[wanted_K[i]]] += work_R[chosen_E[wanted_K[i]]]
        else:
            choosing_T[num_choosing] = t
            num_choosing += 1
            cover_token(wanted_K, num_wanted, holders, nodes, rank_load_R, chosen_E, scratch)

        for k in range(top_k):
            expert = topk_ids_TK[t, k]
            rank_TK[t, k] = chosen_E[expert] if 0 <= expert < num_experts else -1
    if num_choosing:
        even_out(
            topk_ids_TK,
            choosing_T[:num_choosing],
            num_holders_E,
            holders_ER,
            node_of_rank_R,
            work_R,
            before_R,
            rank_load_R,
            rank_TK,
        )


def check_top_k(top_k: int) -> None:
    """Raise ValueError if a token has more experts than the rule can take."""
    if top_k > MAX_TOP_K:
        raise ValueError(f"top-k is {top_k}, at most {MAX_TOP_K} is supported")
