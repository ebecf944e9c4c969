"""The slots that a router may choose from: those of live shards, and near ones only where an expert has any.

L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from placement.rule.local_replicas import keep_local


class LiveSlots:
    """One epoch's slots of one router. `chosen_from_LER` (int32) is what `choose_replicas` reads, -1 for no slot."""

    def __init__(self, slots_LER: np.ndarray, local_R: np.ndarray | None = None) -> None:
        """`local_R` (bool) are the ranks whose replicas come first; None for no difference."""
        self._live_LER = np.array(slots_LER, np.int32)
        self._near_R = local_R
        self.chosen_from_LER = self._live_LER
        self._choose()

    def lose(self, rank: int) -> None:
        """Leave a rank out; where it was the near one, farther replicas are chosen from now on."""
        self._live_LER[:, :, rank] = -1
        self._choose()

    def _choose(self) -> None:
        if self._near_R is not None:
            self.chosen_from_LER = keep_local(self._live_LER, self._near_R)
