"""Balance alone, from loads: baselines and a search for the least possible largest rank load.

E experts, R ranks, s slots of a rank, N nodes. Every replica takes an equal share of its expert's load (that is what
load counts alone allow one to assume). Slots are int32 [R, s]: -1 is an empty slot, -2 one that the rank does not have.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.placement import EMPTY
from placement.search.replicas.holders import CLOSED, add_holder, has_holder, node_spread, remove_holder
from placement.xorshift import random_below, random_state, random_unit

NORM = 16  # power of the mean that stands in for the maximum, smooth enough to search on


def even_split_load(experts_Rs: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """float64 [R]: load of each rank when the replicas of an expert share its load evenly."""
    held_Rs = experts_Rs >= 0
    count_E = np.bincount(experts_Rs[held_Rs], minlength=len(load_E))
    share_E = load_E / np.maximum(count_E, 1)
    return np.where(held_Rs, share_E[np.where(held_Rs, experts_Rs, 0)], 0.0).sum(1)


def greedy_replica_counts(load_E: np.ndarray, num_slots: int, max_copies: int, min_replicas: int = 1) -> np.ndarray:
    """int64 [E]: copies of each expert; each further slot goes to the expert with most load a copy.

    As DeepSeek's EPLB does, but no expert gets more than `max_copies`. Slots that no expert can use stay free.
    """
    count_E = np.full(len(load_E), min_replicas, np.int64)
    for _ in range(num_slots - int(count_E.sum())):
        share_E = np.where(count_E < max_copies, load_E / count_E, -1.0)
        expert = int(np.argmax(share_E))
        if share_E[expert] < 0:
            break
        count_E[expert] += 1
    return count_E


def greedy_balance(
    load_E: np.ndarray,
    open_slots_R: np.ndarray,
    node_of_rank_R: np.ndarray,
    num_nodes: int,
    speed_R: np.ndarray,
    min_replicas: int = 1,
    max_filled: int | None = None,
) -> np.ndarray:
    """Slots int32 [R, s] by greedy balancing: copies by load, then the heaviest copy onto the lightest rank.

    `open_slots_R` int [R]: slots of each rank; `speed_R` float [R]: a rank of speed 2 takes twice the load. The first
    `min_replicas` copies of an expert stand on different nodes. Raises ValueError if the experts do not fit.
    """
    num_experts, num_ranks = len(load_E), len(open_slots_R)
    num_slots = min(int(open_slots_R.sum()), max_filled if max_filled is not None else int(open_slots_R.sum()))
    usable = int((open_slots_R > 0).sum())
    if num_slots < num_experts * min_replicas:
        raise ValueError(f"{num_slots} slots cannot hold {num_experts} experts with {min_replicas} copies each")
    count_E = greedy_replica_counts(load_E, num_slots, usable, min_replicas)
    slots_Rs = np.full((num_ranks, int(open_slots_R.max())), EMPTY, np.int32)
    slots_Rs[np.arange(slots_Rs.shape[1])[None, :] >= open_slots_R[:, None]] = CLOSED
    filled_R = np.zeros(num_ranks, np.int64)
    load_R = np.zeros(num_ranks)
    on_ER = np.zeros((num_experts, num_ranks), bool)
    # Experts that are bound to several nodes first: they are the hardest to place.
    copies = [(count_E[e] > 1 and min_replicas > 1, load_E[e] / count_E[e], -e) for e in range(num_experts)]
    for expert in sorted(range(num_experts), key=lambda e: copies[e], reverse=True):
        share = load_E[expert] / count_E[expert]
        for copy in range(int(count_E[expert])):
            free_R = (filled_R < open_slots_R) & ~on_ER[expert]
            if 0 < copy < min_replicas and num_nodes > 1:
                free_R &= ~np.isin(node_of_rank_R, node_of_rank_R[on_ER[expert]])
            if not free_R.any():
                if copy < min_replicas:
                    return _round_robin(load_E, open_slots_R, node_of_rank_R, num_nodes, min_replicas)
                break
            after_R = np.where(free_R, (load_R + share) / np.maximum(speed_R, 1e-12), np.inf)
            rank = int(np.argmin(after_R))
            slots_Rs[rank, filled_R[rank]] = expert
            filled_R[rank] += 1
            load_R[rank] += share
            on_ER[expert, rank] = True
    return slots_Rs


def _round_robin(
    load_E: np.ndarray, open_slots_R: np.ndarray, node_of_rank_R: np.ndarray, num_nodes: int, min_replicas: int
) -> np.ndarray:
    """Slots that hold exactly `min_replicas` of each expert on different nodes, dealt to where most slots are free."""
    num_ranks = len(open_slots_R)
    slots_Rs = np.full((num_ranks, int(open_slots_R.max())), EMPTY, np.int32)
    slots_Rs[np.arange(slots_Rs.shape[1])[None, :] >= open_slots_R[:, None]] = CLOSED
    free_R = open_slots_R.astype(np.int64).copy()
    domain_R = node_of_rank_R if num_nodes > 1 else np.arange(num_ranks)
    for expert in np.argsort(-load_E, kind="stable"):
        free_D = np.bincount(domain_R, weights=free_R)
        for domain in np.argsort(-free_D, kind="stable")[:min_replicas]:
            rank = int(np.argmax(np.where(domain_R == domain, free_R, -1)))
            if free_R[rank] < 1:
                raise ValueError(
                    f"the slots of the nodes do not allow {min_replicas} copies of every expert on different "
                    f"{'nodes' if num_nodes > 1 else 'ranks'}"
                )
            slots_Rs[rank, open_slots_R[rank] - free_R[rank]] = expert
            free_R[rank] -= 1
    return slots_Rs


@compiled()
def _power(x: float) -> float:
    x *= x
    x *= x
    x *= x
    return x * x


@compiled()
def search_balance(
    load_E: np.ndarray,
    experts_Rs: np.ndarray,
    node_of_rank_R: np.ndarray,
    num_nodes: int,
    target_R: np.ndarray,
    min_replicas: int,
    max_filled: int,
    heat_from: float,
    heat_to: float,
    iterations: int,
    state_1: np.ndarray,
) -> float:
    """Anneal `experts_Rs` towards the least `max(load / target)` under an even split; returns that, the best met.

    Moves are swaps of two slots and another copy in place of one. `target_R` float64 [R]: the load that each rank
    would have in perfect balance. `experts_Rs` holds the best slots met afterwards.
    """
    num_experts = len(load_E)
    num_ranks, num_slots = experts_Rs.shape
    num_holders_E = np.zeros(num_experts, np.int32)
    holders_ER = np.empty((num_experts, num_ranks), np.int32)
    load_R = np.zeros(num_ranks)
    filled = 0
    for r in range(num_ranks):
        for i in range(num_slots):
            if experts_Rs[r, i] >= 0:
                add_holder(holders_ER, num_holders_E, experts_Rs[r, i], r)
                filled += 1
    for e in range(num_experts):
        for h in range(num_holders_E[e]):
            load_R[holders_ER[e, h]] += load_E[e] / num_holders_E[e]
    largest = 0.0
    energy = 0.0
    for r in range(num_ranks):
        largest = max(largest, load_R[r] / target_R[r])
        energy += _power(load_R[r] / target_R[r])
    norm = energy ** (1.0 / NORM)
    best = largest
    best_experts_Rs = experts_Rs.copy()
    new_load_R = load_R.copy()
    heat = heat_from
    for step in range(iterations):
        if step % 64 == 0:
            heat = heat_from * (heat_to / heat_from) ** (step / iterations)
        p = random_below(state_1, num_ranks)
        i = random_below(state_1, num_slots)
        a = experts_Rs[p, i]
        if a == CLOSED:
            continue
        q = -1
        j = 0
        if (a >= 0 and num_holders_E[a] == 1) or random_below(state_1, 4) > 0:
            q = random_below(state_1, num_ranks)
            j = random_below(state_1, num_slots)
            b = experts_Rs[q, j]
            if q == p or b == CLOSED or a == b or (a >= 0 and has_holder(holders_ER, num_holders_E, a, q)):
                continue
        else:
            b = random_below(state_1, num_experts)
            if a == EMPTY and filled >= max_filled:
                continue
        if b >= 0 and has_holder(holders_ER, num_holders_E, b, p):
            continue

        # Only ranks that hold a or b change; their loads are taken back one by one if the move is refused.
        new_energy = energy
        if q >= 0:
            moved = 0.0
            if a >= 0:
                moved += load_E[a] / num_holders_E[a]
            if b >= 0:
                moved -= load_E[b] / num_holders_E[b]
            new_energy -= _power(load_R[p] / target_R[p]) + _power(load_R[q] / target_R[q])
            new_load_R[p] = load_R[p] - moved
            new_load_R[q] = load_R[q] + moved
            new_energy += _power(new_load_R[p] / target_R[p]) + _power(new_load_R[q] / target_R[q])
        else:
            for side in range(2):
                expert = a if side == 0 else b
                gains = 2 * side - 1
                if expert < 0:
                    continue
                count = num_holders_E[expert]
                before = load_E[expert] / count
                after = load_E[expert] / (count + gains)
                for h in range(count):
                    r = holders_ER[expert, h]
                    if gains < 0 and r == p:
                        new_load_R[r] -= before
                    else:
                        new_load_R[r] += after - before
                if gains > 0:
                    new_load_R[p] += after
            new_energy = 0.0
            for r in range(num_ranks):
                new_energy += _power(new_load_R[r] / target_R[r])
        new_norm = max(new_energy, 1e-300) ** (1.0 / NORM)
        accepted = new_norm - norm <= -heat * np.log(random_unit(state_1))
        if accepted:
            if a >= 0:
                remove_holder(holders_ER, num_holders_E, a, p)
                if q >= 0:
                    add_holder(holders_ER, num_holders_E, a, q)
            if b >= 0:
                add_holder(holders_ER, num_holders_E, b, p)
                if q >= 0:
                    remove_holder(holders_ER, num_holders_E, b, q)
            if min_replicas > 1 and (
                (a >= 0 and node_spread(holders_ER, num_holders_E, a, node_of_rank_R, num_nodes) < min_replicas)
                or (b >= 0 and node_spread(holders_ER, num_holders_E, b, node_of_rank_R, num_nodes) < min_replicas)
            ):
                accepted = False
                if b >= 0:
                    remove_holder(holders_ER, num_holders_E, b, p)
                    if q >= 0:
                        add_holder(holders_ER, num_holders_E, b, q)
                if a >= 0:
                    if q >= 0:
                        remove_holder(holders_ER, num_holders_E, a, q)
                    add_holder(holders_ER, num_holders_E, a, p)
        if not accepted:
            if q >= 0:
                new_load_R[p], new_load_R[q] = load_R[p], load_R[q]
            else:
                new_load_R[:] = load_R
            continue
        load_R[:] = new_load_R
        energy, norm = new_energy, new_norm
        experts_Rs[p, i] = b
        if q >= 0:
            experts_Rs[q, j] = a
        elif a < 0:
            filled += 1
        largest = 0.0
        for r in range(num_ranks):
            largest = max(largest, load_R[r] / target_R[r])
        if largest < best - 1e-12:
            best = largest
            best_experts_Rs[:] = experts_Rs
    experts_Rs[:] = best_experts_Rs
    return best


def best_balance(
    load_E: np.ndarray,
    start_Rs: np.ndarray,
    node_of_rank_R: np.ndarray,
    num_nodes: int,
    target_R: np.ndarray,
    min_replicas: int,
    max_filled: int,
    iterations: int,
    seed: int,
    restarts: int = 2,
) -> tuple[np.ndarray, float]:
    """The best of several searches from `start_Rs`, and its `max(load / target)`; never worse than the start."""
    best_Rs = start_Rs.copy()
    best = search_balance(
        load_E,
        best_Rs,
        node_of_rank_R,
        num_nodes,
        target_R,
        min_replicas,
        max_filled,
        1e-4,
        1e-5,
        0,
        random_state(seed),
    )
    for restart in range(restarts):
        slots_Rs = start_Rs.copy()
        heat = (0.01, 0.05)[restart % 2]
        found = search_balance(
            load_E, slots_Rs, node_of_rank_R, num_nodes, target_R, min_replicas, max_filled, heat, 2e-5, iterations,
            random_state(seed, restart),
        )  # fmt: skip
        if found < best:
            best, best_Rs = found, slots_Rs
    return best_Rs, best
