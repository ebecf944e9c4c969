"""What one copy would do to the unevenness of a layer: an expert moved, or given another replica. All layers at once.

L layers, E experts, R ranks, W slots of a rank. A cost is what `State.unevenness_L` grows by; inf where that may not
be.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from placement.placement import EMPTY
from placement.search.few_copies.state import State


class Change(NamedTuple):
    """The best change of its kind in each layer; all [L].

    `rank` and `slot` are where the expert is now; `to` is the rank that gets it. `keeps` is whether it also stays.
    """

    cost_L: np.ndarray
    rank_L: np.ndarray
    slot_L: np.ndarray
    to_L: np.ndarray
    keeps_L: np.ndarray


def lightest(state: State, open_LR: np.ndarray) -> np.ndarray:
    """int64 [L]: the open rank with least load; any where none is open."""
    return np.argmin(np.where(open_LR, state.load_LR, np.inf), axis=1)


def heaviest_of(state: State, among_LR: np.ndarray) -> np.ndarray:
    """int64 [L]: the rank with most load among some; the heaviest of all where there are none."""
    among_LR = np.where(np.any(among_LR, axis=1, keepdims=True), among_LR, state.frame.used_R)
    return np.argmax(np.where(among_LR, state.load_LR, -np.inf), axis=1)


def moves_to(state: State, to_L: np.ndarray, open_L: np.ndarray, from_LR: np.ndarray | None = None) -> Change:
    """The best move of any expert to one rank of each layer, from ranks of `from_LR`."""
    every = np.arange(state.num_layers)
    frame, share = state.frame, state.share_LRW
    on_LE = state.on_LRE[every, to_L]
    to_weight, to_load = frame.weight_R[to_L][:, None, None], state.load_LR[every, to_L][:, None, None]
    weight, load = frame.weight_R[None, :, None], state.load_LR[:, :, None]
    cost = share * (share * (weight + to_weight) + 2 * (to_load - load))
    legal = state.filled_LRW & ~state.of_slots(on_LE) & open_L[:, None, None]
    if from_LR is not None:
        legal &= from_LR[:, :, None]
    if frame.spread:
        on_node_LE = state.on_node_LEN[every, :, frame.node_R[to_L]] > 0
        same = frame.node_R[None, :, None] == frame.node_R[to_L][:, None, None]
        legal &= same | ~state.last_on_node_LRW | ~state.of_slots(on_node_LE) | state.of_slots(_has_enough(state))
    return _best_slot(np.where(legal, cost, np.inf), to_L, False)


def replicas_to(state: State, to_L: np.ndarray, open_L: np.ndarray) -> Change:
    """The best further replica of any expert on one rank of each layer."""
    every = np.arange(state.num_layers)
    frame = state.frame
    legal = (~state.on_LRE[every, to_L]) & (state.count_LE > 0) & open_L[:, None]
    share = frame.load_LE / (state.count_LE + 1)
    less = state.share_LE - share  # what each other replica gives away
    cost = (
        -2 * less * state.holder_load_LE
        + less**2 * state.holder_weight_LE
        + share * (share * frame.weight_R[to_L][:, None] + 2 * state.load_LR[every, to_L][:, None])
    )
    cost = np.where(legal, cost, np.inf)
    expert_L = np.argmin(cost, axis=1)
    # Any slot that holds it says which expert it is.
    where = np.argmax((state.map_LRW == expert_L[:, None, None]).reshape(state.num_layers, -1), axis=1)
    rank_L, slot_L = np.divmod(where, state.map_LRW.shape[2])
    return Change(cost[every, expert_L], rank_L, slot_L, to_L, np.ones(state.num_layers, bool))


def moves_from(state: State, rank_L: np.ndarray, open_LR: np.ndarray, drop_LR: np.ndarray | None = None) -> Change:
    """The best move of an expert of one rank of each layer to an open rank.

    `drop_LR` is a slot of each rank whose replica makes way, see `cheapest_drop`.
    """
    every = np.arange(state.num_layers)
    frame = state.frame
    share = state.share_LRW[every, rank_L][:, :, None]
    weight, load = frame.weight_R[rank_L][:, None, None], state.load_LR[every, rank_L][:, None, None]
    to_weight, (to_load, extra) = frame.weight_R[None, None, :], _target_loads(state, drop_LR)
    cost = share * (share * (weight + to_weight) + 2 * (to_load - load)) + extra
    expert_LW = np.maximum(state.map_LRW[every, rank_L], 0)
    legal = _may_take(state, rank_L, expert_LW, open_LR)
    if frame.spread:
        there = state.on_node_LEN[every[:, None], expert_LW][:, :, frame.node_R] > 0  # [L, W, R]
        same = frame.node_R[None, None, :] == frame.node_R[rank_L][:, None, None]
        may_leave = ~state.last_on_node_LRW[every, rank_L] | _has_enough(state)[every[:, None], expert_LW]
        legal &= same | ~there | may_leave[:, :, None]
    return _best_target(np.where(legal, cost, np.inf), rank_L, False)


def replicas_from(state: State, rank_L: np.ndarray, open_LR: np.ndarray, drop_LR: np.ndarray | None = None) -> Change:
    """The best further replica, on an open rank, of an expert of one rank of each layer; `drop_LR` as above."""
    every = np.arange(state.num_layers)
    frame = state.frame
    expert_LW = np.maximum(state.map_LRW[every, rank_L], 0)
    at = (every[:, None], expert_LW)
    share = (frame.load_LE[at] / (state.count_LE[at] + 1))[:, :, None]
    less = state.share_LE[at][:, :, None] - share
    to_load, extra = _target_loads(state, drop_LR)
    cost = (
        -2 * less * state.holder_load_LE[at][:, :, None]
        + less**2 * state.holder_weight_LE[at][:, :, None]
        + share * (share * frame.weight_R[None, None, :] + 2 * to_load)
        + extra
    )
    legal = _may_take(state, rank_L, expert_LW, open_LR)
    return _best_target(np.where(legal, cost, np.inf), rank_L, True)


def best_of(changes: list[Change]) -> Change:
    """The cheapest of several kinds in each layer; the first of equals."""
    cost = np.stack([change.cost_L for change in changes])
    kind_L = np.argmin(cost, axis=0)
    every = np.arange(cost.shape[1])
    return Change(*(np.stack(parts)[kind_L, every] for parts in zip(*changes, strict=True)))


def apply(state: State, change: Change, layers: np.ndarray, drop_LR: np.ndarray | None = None) -> np.ndarray:
    """int64 [L, R, W]: the map after the changes of some layers, in the targets' empty slots or those of `drop_LR`."""
    map_LRW = state.map_LRW.copy()
    rank, slot, to = change.rank_L[layers], change.slot_L[layers], change.to_L[layers]
    to_slot = state.free_slot(layers, to) if drop_LR is None else drop_LR[layers, to]
    map_LRW[layers, to, to_slot] = state.map_LRW[layers, rank, slot]
    leaves = ~change.keeps_L[layers]
    map_LRW[layers[leaves], rank[leaves], slot[leaves]] = EMPTY
    return map_LRW


def cheapest_drop(state: State) -> np.ndarray:
    """int64 [L, R]: the slot of each rank whose replica costs least to drop, -1 if all are needed."""
    slot_LR = np.argmin(state.drop_cost_LRW, axis=2)
    return np.where(np.isfinite(state.drop_cost_LRW.min(2)), slot_LR, -1)


def _target_loads(state: State, drop_LR: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | float]:
    """[L, 1, R]: the load of each rank, and the price, once a replica has made way there.

    How a rank that gets more of that expert feels it is left out; who applies the change compares exactly.
    """
    if drop_LR is None:
        return state.load_LR[:, None, :], 0.0
    at = np.maximum(drop_LR, 0)[:, :, None]
    share_LR = np.take_along_axis(state.share_LRW, at, 2)[:, :, 0] * state.frame.weight_R
    price_LR = np.take_along_axis(state.drop_cost_LRW, at, 2)[:, :, 0]
    return (state.load_LR - share_LR)[:, None, :], np.where(drop_LR >= 0, price_LR, 0.0)[:, None, :]


def _has_enough(state: State) -> np.ndarray:
    """bool [L, E]: whether an expert may be on one node less."""
    return state.reach_LE > state.frame.needed_LE


def _may_take(state: State, rank_L: np.ndarray, expert_LW: np.ndarray, open_LR: np.ndarray) -> np.ndarray:
    """bool [L, W, R]: whether a rank is open and lacks the expert of a slot."""
    every = np.arange(state.num_layers)
    on_LWR = state.on_LRE.transpose(0, 2, 1)[every[:, None], expert_LW]
    return state.filled_LRW[every, rank_L][:, :, None] & ~on_LWR & open_LR[:, None, :]


def _best_slot(cost_LRW: np.ndarray, to_L: np.ndarray, keeps: bool) -> Change:
    num_layers, _, width = cost_LRW.shape
    flat = cost_LRW.reshape(num_layers, -1)
    best_L = np.argmin(flat, axis=1)
    rank_L, slot_L = np.divmod(best_L, width)
    every = np.arange(num_layers)
    return Change(flat[every, best_L], rank_L, slot_L, to_L, np.full(num_layers, keeps))


def _best_target(cost_LWR: np.ndarray, rank_L: np.ndarray, keeps: bool) -> Change:
    num_layers, _, num_ranks = cost_LWR.shape
    flat = cost_LWR.reshape(num_layers, -1)
    best_L = np.argmin(flat, axis=1)
    slot_L, to_L = np.divmod(best_L, num_ranks)
    every = np.arange(num_layers)
    return Change(flat[every, best_L], rank_L, slot_L, to_L, np.full(num_layers, keeps))
