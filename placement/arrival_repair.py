"""Last step of a search with replicas: keep the load cap in the order in which tokens arrive.

The rule for choosing replicas breaks ties by the load so far, so with replicas the load of ranks depends on the order
of tokens: text of one domain after the other leaves more to even out than a shuffle of all. The searches run on
shuffled tokens, where any prefix is a fair sample; this hill climb looks at the whole trace in its own order.

T tokens, K experts of one, E experts, R ranks, s slots of a rank.
"""

from __future__ import annotations

import numpy as np

from placement.problem import EXCESS_WEIGHT, LayerProblem
from placement.scoring import LayerScore, Scored, score_slots
from placement.search_clock import SearchClock

WITHIN_NODE = 0.8


def _cost(problem: LayerProblem, found: LayerScore) -> float:
    """Visits a token, and what breaking the cap costs in them."""
    return found.energy / max(problem.num_tokens, 1) + EXCESS_WEIGHT * found.excess


def _legal_swap(problem: LayerProblem, slots_Rs: np.ndarray, a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether the experts of two slots may change places: none twice on a rank, copies stay apart."""
    expert_a, expert_b = int(slots_Rs[a]), int(slots_Rs[b])
    if expert_a == expert_b or (slots_Rs[b[0]] == expert_a).any() or (slots_Rs[a[0]] == expert_b).any():
        return False
    if problem.min_copies > 1 and problem.node_of_rank[a[0]] != problem.node_of_rank[b[0]]:
        for expert, source, target in ((expert_a, a[0], b[0]), (expert_b, b[0], a[0])):
            ranks = np.nonzero((slots_Rs == expert).any(1))[0] if expert >= 0 else np.empty(0, np.int64)
            nodes = problem.node_of_rank[ranks[ranks != source]]
            if (nodes == problem.node_of_rank[target]).any():
                return False
    return True


def repair_load(problem: LayerProblem, start: Scored, tries: int, seed: tuple[int, ...], clock: SearchClock) -> Scored:
    """Swap experts between ranks while that lowers visits plus excess. Never worse than the start.

    `tries` proposals at most, fewer when the clock runs out. While a rank is above the cap, proposals start there.
    """
    rng = np.random.default_rng(seed)
    best, num_slots = start, start.slots.shape[1]
    least = _cost(problem, best.score)
    for _ in range(tries):
        if clock.left() <= 0:
            break
        found = best.score
        above_R = np.maximum(found.load_R / problem.allowed - 1, 0)
        if found.excess <= 0:
            above_R[:] = 1
        below_R = np.maximum(1 - found.load_R / problem.allowed, 0) + 1e-3
        source = int(rng.choice(problem.num_ranks, p=above_R / above_R.sum()))
        below_R[source] = 0
        if problem.num_nodes > 1 and rng.random() < WITHIN_NODE:
            # Most of what has to be evened out can be inside a node, where it costs no visited node.
            below_R = np.where(problem.node_of_rank == problem.node_of_rank[source], below_R, 0)
            if not below_R.any():
                continue
        target = int(rng.choice(problem.num_ranks, p=below_R / below_R.sum()))
        a = (source, int(rng.integers(num_slots)))
        b = (target, int(rng.integers(num_slots)))
        # Closed slots (below empty) stay where they are.
        if min(best.slots[a], best.slots[b]) < -1 or not _legal_swap(problem, best.slots, a, b):
            continue
        trial_Rs = best.slots.copy()
        trial_Rs[a], trial_Rs[b] = trial_Rs[b], trial_Rs[a]
        trial = score_slots(problem, trial_Rs)
        cost = _cost(problem, trial.score)
        if cost < least:
            best, least = trial, cost
    return best
