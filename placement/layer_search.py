"""Search for the slots of one layer: how the compiled searches are put together.

T tokens, E experts, R ranks, s slots of a rank, N nodes, I items, G groups. Without replicas the swap search decides
alone: nodes first, then ranks inside each node, then both. With replicas the replica search follows, on the rule that
dispatch uses; where tokens, experts and ranks are too many for the time, replicas keep a fixed share of the tokens
instead (the share that the rule gives them), and the swap search places them.
"""

from __future__ import annotations

import numpy as np

from placement.arrival_repair import repair_load
from placement.balance import best_balance, greedy_balance
from placement.bitsets import assigned_token_bits, random_state, token_bits
from placement.problem import CLOSED, EMPTY, LayerProblem, LayerScore, assign, closed_slots, score
from placement.replica_search import anneal_replicas, tokens_by_expert
from placement.search_clock import SearchClock
from placement.swap_search import anneal_swaps

# Nominal cost of a proposal, in seconds: what a search is sized by (about half the speed of a 2023 server core).
SWAP_SECONDS, SWAP_SECONDS_A_WORD = 0.4e-6, 2.0e-9
COVER_SECONDS, COVER_SECONDS_NODES = 0.05e-6, 0.10e-6
# A replica search with fewer proposals than this for each (slot, rank) does worse than swaps of fixed shares.
MIN_PROPOSALS = 6
PENALTY = (0.5, 20.0)
REPAIR_TRIES = 1500
SCORE_SECONDS = 3.0e-6  # nominal cost of scoring one token of a layer anew


def greedy_start(problem: LayerProblem, seed: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots by greedy balancing, and the same after a search for balance; int32 [R, s] both."""
    greedy_Rs = greedy_balance(
        problem.load,
        problem.open_slots,
        problem.node_of_rank,
        problem.num_nodes,
        problem.target / problem.target.max(),
        problem.min_copies,
        problem.max_filled,
    )
    balanced_Rs, _ = best_balance(
        problem.load, greedy_Rs, problem.node_of_rank, problem.num_nodes, problem.target, problem.min_copies,
        problem.max_filled, iterations, seed,
    )  # fmt: skip
    return greedy_Rs, balanced_Rs


class _Items:
    """Slots as items of the swap search: experts or replicas with fixed tokens, empty slots, closed slots."""

    def __init__(self, problem: LayerProblem, experts_Rs: np.ndarray) -> None:
        self.shape = experts_Rs.shape
        self.expert_I = experts_Rs.ravel().astype(np.int32)
        self.items_Rs = np.arange(experts_Rs.size, dtype=np.int32).reshape(experts_Rs.shape)
        item_ER = np.full((problem.num_experts, len(experts_Rs)), -1, np.int32)
        rank_N, slot_N = np.nonzero(experts_Rs >= 0)
        item_ER[experts_Rs[rank_N, slot_N], rank_N] = self.items_Rs[rank_N, slot_N]
        held = self.expert_I >= 0
        self.load_I: np.ndarray = np.zeros(experts_Rs.size)
        if held.sum() == problem.num_experts:
            self.bits_IW = np.zeros((experts_Rs.size, (problem.num_tokens + 63) // 64), np.uint64)
            self.bits_IW[held] = token_bits(problem.ids, problem.num_experts)[self.expert_I[held]]
            self.load_I[held] = problem.load[self.expert_I[held]]
        else:
            rank_TK = assign(problem, experts_Rs)
            self.bits_IW = assigned_token_bits(problem.ids, rank_TK, item_ER, experts_Rs.size)
            used = rank_TK >= 0
            item_N = item_ER[problem.ids[used], rank_TK[used]]
            self.load_I = np.bincount(item_N, problem.pair_weight[problem.ids[used]], minlength=experts_Rs.size)

    def experts(self, items_Rs: np.ndarray) -> np.ndarray:
        """Slots int32 [R, s] of where the items stand."""
        return self.expert_I[items_Rs]


def _run_swaps(
    problem: LayerProblem,
    items: _Items,
    items_Gs: np.ndarray,
    parent_G: np.ndarray,
    allowed_G: np.ndarray,
    weights: tuple[float, float],
    within_parents: bool,
    heat: tuple[float, float],
    iterations: int,
    seed: tuple[int, ...],
    clock: SearchClock,
) -> tuple[np.ndarray, tuple[float, float]]:
    """One schedule of the swap search; the best items int32 [G, s] and their (excess, visits)."""
    state_1 = random_state(*seed)
    current_Gs = items_Gs.astype(np.int32).copy()
    group_I = np.empty(len(items.expert_I), np.int32)
    group_I[current_Gs.ravel()] = np.repeat(np.arange(len(current_Gs)), current_Gs.shape[1])
    best_Gs, best_2 = current_Gs.copy(), np.array([np.inf, np.inf])
    unit = problem.num_tokens / problem.num_experts * sum(weights)
    scale = sum(weights)

    def run(begin: float, end: float, count: int) -> None:
        anneal_swaps(
            items.bits_IW, items.load_I, items.expert_I, current_Gs, group_I, parent_G, allowed_G, weights[0],
            weights[1], within_parents, problem.min_copies > 1, problem.num_tokens, PENALTY[0] * scale,
            PENALTY[1] * scale, heat[0] * unit, heat[1] * unit, begin, end, count, state_1, best_Gs, best_2,
        )  # fmt: skip

    clock.run_schedule(run, iterations)
    return best_Gs, (float(best_2[0]), float(best_2[1]))


def search_swaps(
    problem: LayerProblem, start_Rs: np.ndarray, seconds: float, seed: tuple[int, ...], clock: SearchClock
) -> np.ndarray:
    """The best placement that swaps reach from a start, in about `seconds` of nominal time; slots int32 [R, s]."""
    items = _Items(problem, start_Rs)
    cost = SWAP_SECONDS + SWAP_SECONDS_A_WORD * items.bits_IW.shape[1]
    total = max(2000, int(seconds / cost))
    parent_R = problem.node_of_rank
    levels = 3 if problem.num_nodes > 1 else 1
    # A restart is worth more than a longer run once a run is some hundred proposals for each pair of slots.
    restarts = int(np.clip(total / levels // max(400 * start_Rs.size * 8, 1), 1, 12))
    per_run = total // (restarts * levels)
    best_Rs: np.ndarray | None = None
    best_key = (np.inf, np.inf)
    for restart in range(restarts):
        share = clock.share(1 / (restarts - restart))
        items_Rs = items.items_Rs
        if problem.num_nodes > 1:
            # Ranks inside a node cannot be filled to the brim as well: half of what the cap leaves is theirs.
            allowed_N = problem.allowed.reshape(problem.num_nodes, -1).sum(1)
            target_N = problem.target.reshape(problem.num_nodes, -1).sum(1)
            node_items, _ = _run_swaps(
                problem, items, items_Rs.reshape(problem.num_nodes, -1), np.arange(problem.num_nodes, dtype=np.int32),
                (allowed_N + target_N) / 2, (1.0, 0.0), False, (2.0, 0.05), per_run, (*seed, restart, 1),
                share.share(1 / 3),
            )  # fmt: skip
            items_Rs = node_items.reshape(items.shape)
            items_Rs = _spread_closed(items, items_Rs, start_Rs)
            items_Rs, _ = _run_swaps(
                problem, items, items_Rs, parent_R, problem.allowed, (1.0, 0.0), True, (1.0, 0.05), per_run,
                (*seed, restart, 2), share.share(1 / 2),
            )  # fmt: skip
        joint_heat = (1.0, 0.05) if problem.num_nodes == 1 else (0.2, 0.02)
        items_Rs, key = _run_swaps(
            problem, items, items_Rs, parent_R, problem.allowed, (1.0, problem.weight_of_node), False, joint_heat,
            per_run, (*seed, restart, 3), share,
        )  # fmt: skip
        if best_Rs is None or key < best_key:
            best_Rs, best_key = items_Rs, key
        if clock.left() <= 0:
            break
    assert best_Rs is not None
    return items.experts(best_Rs)


def _spread_closed(items: _Items, items_Rs: np.ndarray, start_Rs: np.ndarray) -> np.ndarray:
    """Items of each node back on ranks such that closed slots stand where they were."""
    if not (start_Rs == CLOSED).any():
        return items_Rs
    per_node = start_Rs.shape[0] * start_Rs.shape[1]
    result = items.items_Rs.copy()
    nodes = items_Rs.size // per_node if per_node else 1
    for node in range(nodes):
        rows = slice(node * start_Rs.shape[0] // nodes, (node + 1) * start_Rs.shape[0] // nodes)
        closed = start_Rs[rows] == CLOSED
        node_items = items_Rs[rows].ravel()
        result[rows][~closed] = node_items[items.expert_I[node_items] != CLOSED]
    return result


def proposal_seconds(problem: LayerProblem) -> float:
    """Nominal time of one proposal of the replica search."""
    pairs = float((problem.ids >= 0).sum())
    return 2 * pairs / problem.num_experts * (COVER_SECONDS if problem.num_nodes == 1 else COVER_SECONDS_NODES)


def search_replicas(
    problem: LayerProblem,
    start_Rs: np.ndarray,
    seconds: float,
    heat: tuple[float, float],
    seed: tuple[int, ...],
    clock: SearchClock,
) -> np.ndarray:
    """The best slots int32 [R, s] that the replica search meets from a start, in about `seconds` of nominal time."""
    token_N, start_E = tokens_by_expert(problem.ids, problem.num_experts)
    current_Rs = start_Rs.astype(np.int32).copy()
    chunk_Rs = current_Rs.copy()
    best_Rs, best_key = current_Rs.copy(), score(problem, current_Rs).key
    state_1 = random_state(*seed)
    scale = 1 + problem.weight_of_node
    unit = problem.num_tokens / problem.num_experts * (1 + problem.weight_of_node / 2)

    def run(begin: float, end: float, count: int) -> None:
        # Inside a part ties are broken by loads as they stand, not in the order of tokens: each part's best is scored
        # by the rule proper before it counts.
        nonlocal best_key
        best_2 = np.array([np.inf, np.inf])
        anneal_replicas(
            problem.ids, token_N, start_E, problem.pair_weight, current_Rs, problem.node_of_rank, problem.num_nodes,
            problem.weight_of_node, problem.min_copies, problem.max_filled, problem.allowed, PENALTY[0] * scale,
            PENALTY[1] * scale, heat[0] * unit, heat[1] * unit, begin, end, count, state_1, chunk_Rs, best_2,
        )  # fmt: skip
        for slots_Rs in (chunk_Rs, current_Rs):
            key = score(problem, slots_Rs).key
            if key < best_key:
                best_key = key
                best_Rs[:] = slots_Rs

    clock.run_schedule(run, max(200, int(seconds / proposal_seconds(problem))), chunks=48)
    return best_Rs


def node_problem(problem: LayerProblem) -> LayerProblem:
    """The same layer with nodes in the place of ranks."""
    nodes = problem.num_nodes
    target_N = problem.target.reshape(nodes, -1).sum(1)
    allowed_N = (problem.allowed.reshape(nodes, -1).sum(1) + target_N) / 2
    return LayerProblem(
        ids=problem.ids,
        load=problem.load,
        pair_weight=problem.pair_weight,
        open_slots=problem.open_slots.reshape(nodes, -1).sum(1),
        node_of_rank=np.arange(nodes, dtype=np.int32),
        num_nodes=1,
        node_weight=0.0,
        min_copies=problem.min_copies,
        max_filled=min(problem.max_filled, nodes * problem.num_experts),
        target=target_N,
        allowed=allowed_N,
    )


def slots_from_nodes(problem: LayerProblem, experts_Ns: np.ndarray) -> np.ndarray:
    """Slots int32 [R, s] with the experts of each node dealt to its ranks, heaviest first to the lightest."""
    slots_Rs = closed_slots(problem.open_slots)
    per_node = problem.num_ranks // problem.num_nodes
    filled_R = np.zeros(problem.num_ranks, np.int64)
    load_R = np.zeros(problem.num_ranks)
    for node, experts in enumerate(experts_Ns):
        ranks = np.arange(node * per_node, (node + 1) * per_node)
        for expert in sorted(experts[experts >= 0].tolist(), key=lambda e: (-problem.load[e], e)):
            free = filled_R[ranks] < problem.open_slots[ranks]
            rank = ranks[int(np.argmin(np.where(free, load_R[ranks] / problem.target[ranks], np.inf)))]
            slots_Rs[rank, filled_R[rank]] = expert
            filled_R[rank] += 1
            load_R[rank] += problem.load[expert]
    return slots_Rs


def search_layer(
    problem: LayerProblem,
    starts: list[np.ndarray],
    seconds: float,
    seed: int,
    clock: SearchClock,
) -> tuple[np.ndarray, LayerScore]:
    """The best slots found for a layer and their score; `starts` (slots int32 [R, s]) are among the candidates."""
    candidates = list(starts)
    if not problem.has_replicas:
        candidates.append(search_swaps(problem, starts[0], seconds, (seed, 1), clock.share(0.95)))
    elif seconds / proposal_seconds(problem) < MIN_PROPOSALS * starts[0].size * problem.num_ranks:
        fixed_Rs = starts[0]
        for turn in range(2):  # the rule shares tokens anew in between
            fixed_Rs = search_swaps(problem, fixed_Rs, seconds / 2, (seed, 2, turn), clock.share((0.5, 0.9)[turn]))
            candidates.append(fixed_Rs)
    elif problem.num_nodes == 1:
        candidates.append(search_replicas(problem, starts[0], 0.75 * seconds, (1.0, 0.1), (seed, 3), clock.share(0.75)))
        best_Rs = min(candidates, key=lambda slots: score(problem, slots).key)
        candidates.append(search_replicas(problem, best_Rs, 0.2 * seconds, (0.1, 0.02), (seed, 4), clock.share(0.9)))
    else:
        nodes = node_problem(problem)
        start_Ns = closed_slots(nodes.open_slots)
        first, _ = greedy_start(nodes, seed, 2000)
        start_Ns[:, : first.shape[1]] = first
        nodes_Ns = search_replicas(nodes, start_Ns, 0.2 * seconds, (0.5, 0.05), (seed, 5), clock.share(0.25))
        ranks_Rs = search_swaps(
            problem, slots_from_nodes(problem, nodes_Ns), 0.1 * seconds, (seed, 6), clock.share(0.2)
        )
        candidates.append(ranks_Rs)
        candidates.append(search_replicas(problem, ranks_Rs, 0.65 * seconds, (0.1, 0.01), (seed, 7), clock.share(0.95)))
    if problem.has_replicas:
        # What balance alone starts from keeps to the cap already; it is what the searches found that needs the repair.
        found = candidates[len(starts) :]
        best_Rs = min(found, key=lambda slots: score(problem, slots).energy)
        # Sized beforehand like every search: what the clock happens to leave must not decide the result.
        tries = min(REPAIR_TRIES, int(0.1 * seconds / (SCORE_SECONDS * problem.num_tokens)))
        candidates.append(repair_load(problem, best_Rs, tries, (seed, 8), clock))
    scored = [(score(problem, slots), n, slots) for n, slots in enumerate(candidates)]
    best = min(scored, key=lambda entry: (entry[0].key, entry[1]))
    return best[2], best[0]


__all__ = ["CLOSED", "EMPTY", "greedy_start", "search_layer", "search_replicas", "search_swaps"]
