"""The slots that a router may choose from: those of live shards, and only local ones where an expert has any.

L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from placement.rule.local_replicas import keep_local


class LiveSlots:
    """One router's slots in one epoch. `choose_replicas` reads `chosen_from_LER` (int32, -1 for no slot)."""

    def __init__(self, slots_LER: np.ndarray, local_R: np.ndarray | None = None) -> None:
        """Replicas on the ranks `local_R` (bool) come first; None prefers no rank."""
        self._live_LER = np.array(slots_LER, np.int32)
        self._local_R = local_R
        self.chosen_from_LER = self._live_LER
        self._choose()

    def lose(self, rank: int) -> None:
        """Leave a rank out; experts that were local to it alone are chosen from other ranks from now on."""
        self._live_LER[:, :, rank] = -1
        self._choose()

    def _choose(self) -> None:
        if self._local_R is not None:
            self.chosen_from_LER = keep_local(self._live_LER, self._local_R)
