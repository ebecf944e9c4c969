"""Which expert each slot of all layers holds, and the figures that choices are made by, all layers at once.

L layers, E experts, R ranks, W slots of a rank (padded), N nodes. Loads are in any unit; replicas share their expert's
load evenly. `even` is a layer's load over the sum of speeds: what a rank of speed 1 should have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from placement.placement import EMPTY


@dataclass(frozen=True, eq=False)
class Frame:
    """What does not change while a target is sought.

    `load_LE` float64 [L, E], above 0; `slots_R` int64 [R], 0 for ranks that are not used; `spare_slots` of them stay
    empty where that can be; `node_R` int64 [R]; `speed_R` float64 [R]. Replicas int64 [L, E]: `needed_LE` against loss,
    and `kept_LE`, at least as many, so that no share of a hot expert is more than a rank should have.
    """

    load_LE: np.ndarray
    slots_R: np.ndarray
    spare_slots: int
    needed_LE: np.ndarray
    kept_LE: np.ndarray
    node_R: np.ndarray
    num_nodes: int
    speed_R: np.ndarray
    spread: bool  # whether needed replicas must be on different nodes

    @cached_property
    def used_R(self) -> np.ndarray:
        """bool [R]."""
        return self.slots_R > 0

    @cached_property
    def limit_R(self) -> np.ndarray:
        """int64 [R]: slots to fill at most while there is a choice."""
        return np.maximum(self.slots_R - self.spare_slots, 0)

    @cached_property
    def weight_R(self) -> np.ndarray:
        """float64 [R]: 1 / speed."""
        return 1.0 / self.speed_R

    @cached_property
    def even_L(self) -> np.ndarray:
        return self.load_LE.sum(1) / self.speed_R[self.used_R].sum()

    def of_layers(self, layers: np.ndarray) -> Frame:
        """The same for some of the layers."""
        return Frame(
            self.load_LE[layers],
            self.slots_R,
            self.spare_slots,
            self.needed_LE[layers],
            self.kept_LE[layers],
            self.node_R,
            self.num_nodes,
            self.speed_R,
            self.spread,
        )


@dataclass(frozen=True, eq=False)
class State:
    """`map_LRW` int64 [L, R, W]: the expert in each slot, -1 for none; no expert twice on one rank. Figures follow."""

    frame: Frame
    map_LRW: np.ndarray

    @property
    def num_layers(self) -> int:
        return len(self.map_LRW)

    @cached_property
    def filled_LRW(self) -> np.ndarray:
        return self.map_LRW >= 0

    @cached_property
    def key_LRW(self) -> np.ndarray:
        """int64: layer * E + expert, of filled slots; layer * E of empty ones."""
        layer_L = np.arange(self.num_layers) * self.frame.load_LE.shape[1]
        return layer_L[:, None, None] + np.maximum(self.map_LRW, 0)

    def by_expert(self, value_LRW: np.ndarray) -> np.ndarray:
        """float64 [L, E]: a value of filled slots, summed over an expert's replicas."""
        weights = np.where(self.filled_LRW, value_LRW, 0.0).ravel()
        size = self.frame.load_LE.size
        return np.bincount(self.key_LRW.ravel(), weights, size).reshape(self.frame.load_LE.shape)

    def of_slots(self, value_LE: np.ndarray) -> np.ndarray:
        """[L, R, W]: a value of experts, of the expert in each slot (any for an empty slot)."""
        return value_LE.ravel()[self.key_LRW]

    @cached_property
    def count_LE(self) -> np.ndarray:
        """int64 [L, E]: replicas."""
        return self.by_expert(np.ones(self.map_LRW.shape)).astype(np.int64)

    @cached_property
    def held_LR(self) -> np.ndarray:
        """int64 [L, R]: filled slots."""
        return self.filled_LRW.sum(2)

    @cached_property
    def on_LRE(self) -> np.ndarray:
        """bool [L, R, E]."""
        on_LRE = np.zeros((*self.map_LRW.shape[:2], self.frame.load_LE.shape[1]), bool)
        layer, rank, slot = np.nonzero(self.filled_LRW)
        on_LRE[layer, rank, self.map_LRW[layer, rank, slot]] = True
        return on_LRE

    @cached_property
    def share_LE(self) -> np.ndarray:
        """float64 [L, E]: load of one replica; of an expert without one, all its load."""
        return self.frame.load_LE / np.maximum(self.count_LE, 1)

    @cached_property
    def share_LRW(self) -> np.ndarray:
        return np.where(self.filled_LRW, self.of_slots(self.share_LE), 0.0)

    @cached_property
    def load_LR(self) -> np.ndarray:
        """float64 [L, R]: load over speed."""
        return self.share_LRW.sum(2) * self.frame.weight_R

    @cached_property
    def unevenness_L(self) -> np.ndarray:
        """float64 [L]: sum over ranks of speed * (load / speed)²; least if all are even."""
        return (self.load_LR**2 * self.frame.speed_R).sum(1)

    @cached_property
    def on_node_LEN(self) -> np.ndarray:
        """int64 [L, E, N]: replicas on each node."""
        num_nodes = self.frame.num_nodes
        key_LRW = self.key_LRW * num_nodes + self.frame.node_R[None, :, None]
        size = self.frame.load_LE.size * num_nodes
        flat = np.bincount(key_LRW.ravel(), self.filled_LRW.ravel().astype(float), size)
        return flat.astype(np.int64).reshape(*self.frame.load_LE.shape, num_nodes)

    @cached_property
    def reach_LE(self) -> np.ndarray:
        """int64 [L, E]: what counts towards the needed replicas: nodes that hold the expert if they must differ."""
        return (self.on_node_LEN > 0).sum(2) if self.frame.spread else self.count_LE

    @cached_property
    def last_on_node_LRW(self) -> np.ndarray:
        """bool: whether the slot's expert has no other replica on the slot's node."""
        key_LRW = self.key_LRW * self.frame.num_nodes + self.frame.node_R[None, :, None]
        return self.on_node_LEN.ravel()[key_LRW] == 1

    @cached_property
    def surplus_LRW(self) -> np.ndarray:
        """bool: slots whose replica is neither needed nor kept for its load."""
        spare_LE = self.count_LE > np.maximum(self.frame.kept_LE, 1)
        if not self.frame.spread:
            return self.filled_LRW & self.of_slots(spare_LE)
        # The last replica on a node may go only if enough nodes remain.
        reached_LE = self.reach_LE > np.maximum(self.frame.needed_LE, 1)
        return self.filled_LRW & self.of_slots(spare_LE) & (~self.last_on_node_LRW | self.of_slots(reached_LE))

    @cached_property
    def drop_cost_LRW(self) -> np.ndarray:
        """float64: what dropping the replica of a slot adds to `unevenness_L`; inf where it is needed."""
        if not self.surplus_LRW.any():
            return np.full(self.map_LRW.shape, np.inf)
        share, load = self.share_LRW, self.load_LR[:, :, None]
        weight = self.frame.weight_R[None, :, None]
        count = self.of_slots(self.count_LE)
        more = share / np.maximum(count - 1, 1)  # what each other replica gets
        others = self.of_slots(self.holder_load_LE) - load
        others_weight = self.of_slots(self.holder_weight_LE) - weight
        cost = weight * share**2 - 2 * share * load + 2 * more * others + more**2 * others_weight
        return np.where(self.surplus_LRW, cost, np.inf)

    @cached_property
    def holder_load_LE(self) -> np.ndarray:
        """float64 [L, E]: `load_LR` summed over the ranks that hold the expert."""
        return self.by_expert(np.broadcast_to(self.load_LR[:, :, None], self.map_LRW.shape))

    @cached_property
    def holder_weight_LE(self) -> np.ndarray:
        return self.by_expert(np.broadcast_to(self.frame.weight_R[None, :, None], self.map_LRW.shape))

    def free_slot(self, layer_N: np.ndarray, rank_N: np.ndarray) -> np.ndarray:
        """int64 [N]: the first empty slot of a rank in a layer; it must have one."""
        usable = np.arange(self.map_LRW.shape[2]) < self.frame.slots_R[rank_N][:, None]
        return np.argmax(~self.filled_LRW[layer_N, rank_N] & usable, axis=1)

    def of_layers(self, layers: np.ndarray) -> State:
        """The same for some of the layers."""
        return State(self.frame.of_layers(layers), self.map_LRW[layers])


def start_map(map_LRs: np.ndarray, slots_R: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [L, R, W]: what is held, without second copies on a rank; left out is what a rank has no slot for.

    Experts stay in their slots where a rank has those slots, else they move to its front.
    """
    num_layers, given_ranks, given_width = map_LRs.shape
    width = max(int(slots_R.max()), 1)
    map_LRW = np.full((num_layers, num_ranks, width), EMPTY, np.int64)
    for rank in range(min(num_ranks, given_ranks)):
        slots = int(slots_R[rank])
        if not slots:
            continue
        row_Ls = map_LRs[:, rank].astype(np.int64)
        order = np.argsort(row_Ls, axis=1, kind="stable")
        sorted_Ls = np.take_along_axis(row_Ls, order, 1)
        twice = np.zeros_like(sorted_Ls, bool)
        twice[:, 1:] = (sorted_Ls[:, 1:] == sorted_Ls[:, :-1]) & (sorted_Ls[:, 1:] >= 0)
        if twice.any():
            np.put_along_axis(row_Ls, order, np.where(twice, EMPTY, sorted_Ls), 1)
        if (row_Ls[:, slots:] >= 0).any():
            row_Ls = np.take_along_axis(row_Ls, np.argsort(row_Ls < 0, axis=1, kind="stable"), 1)
        kept = min(slots, given_width)
        map_LRW[:, rank, :kept] = row_Ls[:, :kept]
    return map_LRW
