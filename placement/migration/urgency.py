"""Which copy of a migration is worth most: what nobody holds, then what a leaving rank alone holds, then load moved.

L layers, E experts, R ranks, s slots of a rank.
"""

from __future__ import annotations

import numpy as np

from placement.migration.layer import MigrationError
from placement.placement import EMPTY

Urgency = tuple[int, float]  # sorts the most urgent first


class Urgencies:
    """The urgency of each copy of `target_LRs`, seen from `start_LRs`.

    `load_LE` says how much each expert is used (None: all the same). A copy buys the load that its rank takes off the
    heaviest holder, times the difference of their loads, or what `value_LE` says; per byte of `sizes_L`.
    """

    def __init__(
        self,
        start_LRs: np.ndarray,
        target_LRs: np.ndarray,
        sizes_L: np.ndarray,
        num_experts: int,
        load_LE: np.ndarray | None,
        value_LE: np.ndarray | None,
    ) -> None:
        shape = (len(start_LRs), num_experts)
        for name, given in (("load_LE", load_LE), ("value_LE", value_LE)):
            if given is not None and (np.shape(given) != shape or not np.isfinite(given).all()):
                raise MigrationError(f"{name} is {list(np.shape(given))}, expected {list(shape)} finite numbers")
        load = np.ones(shape) if load_LE is None else np.asarray(load_LE, float)
        # Layers alike: an even load of a rank is 1.
        used = max(int((target_LRs != EMPTY).any((0, 2)).sum()), 1)
        load = load * (used / np.maximum(load.sum(1, keepdims=True), 1e-300))
        layer_N, rank_N, slot_N = np.nonzero(start_LRs != EMPTY)
        expert_N = start_LRs[layer_N, rank_N, slot_N]
        count_LE = np.zeros(shape)
        np.add.at(count_LE, (layer_N, expert_N), 1)
        share_LE = load / np.maximum(count_LE, 1)
        load_LR = np.zeros((len(start_LRs), start_LRs.shape[1]))
        np.add.at(load_LR, (layer_N, rank_N), share_LE[layer_N, expert_N])
        heaviest_LE = np.zeros(shape)
        np.maximum.at(heaviest_LE, (layer_N, expert_N), load_LR[layer_N, rank_N])
        stays_R = (target_LRs != EMPTY).any((0, 2))
        kept_LE = np.zeros(shape, bool)
        kept_LE[layer_N[stays_R[rank_N]], expert_N[stays_R[rank_N]]] = True
        tier_LE = np.where(count_LE == 0, 0, np.where(kept_LE, 2, 1))
        self._tier: list[list[int]] = tier_LE.tolist()
        # Lists: they are asked for one number at a time.
        per_byte_L1 = 1 / sizes_L[:, None]
        self._load_LR: list[list[float]] = load_LR.tolist()
        self._heaviest: list[list[float]] = heaviest_LE.tolist()
        self._share: list[list[float]] = np.asarray(share_LE * per_byte_L1).tolist()
        self._value: list[list[float]] | None = None
        if value_LE is not None:
            worth_LE = np.asarray(value_LE, float) * per_byte_L1
            self._value = worth_LE.tolist()

    def of(self, layer: int, expert: int, rank: int) -> Urgency:
        tier = self._tier[layer][expert]
        if tier == 2:
            if self._value is not None:
                return tier, -self._value[layer][expert]
            gap = self._heaviest[layer][expert] - self._load_LR[layer][rank]
            return tier, -self._share[layer][expert] * gap
        return tier, -self._share[layer][expert]
