"""What a search with replicas may change at a time: two slots swap experts, or one slot takes another replica.

E experts, R ranks, s slots of a rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from placement.compiled import compiled
from placement.placement import EMPTY
from placement.rule.replica_choice import Holders, Nodes
from placement.search.annealing import as_int64
from placement.search.replicas.holders import CLOSED, add_holder, has_holder, is_spread, remove_holder
from placement.xorshift import random_below


class Move(NamedTuple):
    """Slot `slot` of `rank` gives up expert `leaving` for `coming`; either may be -1, nothing.

    In a swap, `coming` is what slot `other_slot` of `other_rank` held, and `leaving` goes there. Otherwise
    `other_rank` is -1: `coming` is one more replica, and `leaving` loses one. A `rank` of -1 is no move at all.
    """

    rank: int
    slot: int
    leaving: int
    other_rank: int
    other_slot: int
    coming: int


class SwapChance(NamedTuple):
    """A move is a swap where `random_below(draws)` is `first` or more and below `end`; otherwise one more replica."""

    first: int
    end: int
    draws: int


@compiled(forceinline=True)
def no_move() -> Move:
    return Move(-1, 0, EMPTY, -1, 0, EMPTY)


@compiled(forceinline=True)
def propose_move(
    rank: int,
    experts_Rs: np.ndarray,
    holders: Holders,
    num_free: int,
    chance: SwapChance,
    random_1: np.ndarray,
) -> Move:
    """A random move of a slot of `rank` that puts no expert on a rank twice, or no move.

    `num_free`: how many empty slots may still be filled. The last replica of an expert only moves by swaps.
    """
    num_ranks, num_slots = experts_Rs.shape
    slot = random_below(random_1, num_slots)
    leaving = as_int64(experts_Rs[rank, slot])
    if leaving == CLOSED:
        return no_move()
    other_rank, other_slot = as_int64(-1), as_int64(0)
    swap = leaving >= 0 and holders.count_E[leaving] == 1
    if not swap:
        draw = random_below(random_1, chance.draws)
        swap = chance.first <= draw < chance.end
    if swap:
        other_rank = random_below(random_1, num_ranks)
        other_slot = random_below(random_1, num_slots)
        coming = as_int64(experts_Rs[other_rank, other_slot])
        if other_rank == rank or coming == CLOSED or leaving == coming:
            return no_move()
        if leaving >= 0 and has_holder(holders, leaving, other_rank):
            return no_move()
    else:
        coming = as_int64(random_below(random_1, len(holders.count_E)))
        if leaving == EMPTY and num_free <= 0:
            return no_move()
    if coming >= 0 and has_holder(holders, coming, rank):
        return no_move()
    return Move(rank, slot, leaving, other_rank, other_slot, coming)


@compiled(forceinline=True)
def propose_return(
    rank: int, experts_Rs: np.ndarray, holders: Holders, home_ER: np.ndarray, num_free: int, random_1: np.ndarray
) -> Move:
    """A random move that brings an expert back to a `rank` that holds it now, so needs no copy of it, or no move."""
    num_experts, slot = len(holders.count_E), random_below(random_1, experts_Rs.shape[1])
    leaving = as_int64(experts_Rs[rank, slot])
    first = random_below(random_1, num_experts)
    coming = as_int64(-1)
    for i in range(num_experts):
        expert = (first + i) % num_experts
        if home_ER[expert, rank] and not has_holder(holders, expert, rank):
            coming = as_int64(expert)
            break
    if leaving == CLOSED or coming < 0 or (leaving == EMPTY and num_free <= 0):
        return no_move()
    if leaving == EMPTY or holders.count_E[leaving] > 1:
        return Move(rank, slot, leaving, -1, 0, coming)
    # The last replica goes where the expert that comes back stands.
    other_rank = as_int64(holders.rank_ER[coming, random_below(random_1, holders.count_E[coming])])
    for other_slot in range(experts_Rs.shape[1]):
        if experts_Rs[other_rank, other_slot] == coming:
            return Move(rank, slot, leaving, other_rank, as_int64(other_slot), coming)
    return no_move()


@compiled(forceinline=True)
def move_holders(holders: Holders, move: Move) -> None:
    """Update the holders of both experts; slots stay as they are."""
    if move.leaving >= 0:
        remove_holder(holders, move.leaving, move.rank)
        if move.other_rank >= 0:
            add_holder(holders, move.leaving, move.other_rank)
    if move.coming >= 0:
        add_holder(holders, move.coming, move.rank)
        if move.other_rank >= 0:
            remove_holder(holders, move.coming, move.other_rank)


@compiled(forceinline=True)
def restore_holders(holders: Holders, move: Move) -> None:
    """Undo `move_holders`."""
    if move.coming >= 0:
        remove_holder(holders, move.coming, move.rank)
        if move.other_rank >= 0:
            add_holder(holders, move.coming, move.other_rank)
    if move.leaving >= 0:
        if move.other_rank >= 0:
            remove_holder(holders, move.leaving, move.other_rank)
        add_holder(holders, move.leaving, move.rank)


@compiled(forceinline=True)
def keeps_spread(holders: Holders, move: Move, nodes: Nodes, min_replicas: int) -> bool:
    """Whether both experts still have replicas on enough nodes, asked after `move_holders`."""
    if move.leaving >= 0 and not is_spread(holders, move.leaving, nodes, min_replicas):
        return False
    return move.coming < 0 or is_spread(holders, move.coming, nodes, min_replicas)


@compiled(forceinline=True)
def move_slots(experts_Rs: np.ndarray, move: Move) -> int:
    """Carry out a move; returns by how many more slots are filled, 0 or 1."""
    experts_Rs[move.rank, move.slot] = move.coming
    if move.other_rank >= 0:
        experts_Rs[move.other_rank, move.other_slot] = move.leaving
        return 0
    return 1 if move.leaving < 0 else 0
