"""What a shard's own calls tell of the next layer: which slots were used after which, older calls counting less.

Legend: L MoE layers, S slots of a layer.
"""

from __future__ import annotations

import numpy as np

HALVED_AFTER = 4096
"""Calls of a layer after which what was counted before counts half."""


class Transitions:
    """Layer 0 follows the last one: a stream's next token."""

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self._after_LSS = np.zeros(
            (num_layers, num_slots, num_slots), np.float32
        )  # [layer, used, used in the next one]
        self._used_LS = np.zeros((num_layers, num_slots), np.float32)
        self._calls_L = np.zeros(num_layers, np.int64)
        self._width_L = np.ones(num_layers, np.float32)
        self._last: tuple[int, np.ndarray] | None = None

    def note(self, layer: int, slots_U: np.ndarray) -> None:
        """A call of `layer` used these slots. Calls that skip a layer, as several routers make them, tell nothing."""
        num_layers = len(self._calls_L)
        self._width_L[layer] += 0.05 * (len(slots_U) - self._width_L[layer])
        if self._last is not None and (self._last[0] + 1) % num_layers == layer:
            before, before_U = self._last
            self._used_LS[before, before_U] += 1
            self._after_LSS[before][np.ix_(before_U, slots_U)] += 1
            self._calls_L[before] += 1
            if self._calls_L[before] % HALVED_AFTER == 0:
                self._used_LS[before] *= 0.5
                self._after_LSS[before] *= 0.5
        self._last = (layer, slots_U)

    def likely(self, layer: int, slots_U: np.ndarray, least: float) -> np.ndarray:
        """Slots that the layer after `layer` will probably use after these, the likeliest first.

        As many as it uses on average, of those whose share of such calls is at least `least`, 0 to 1.
        """
        known_U = slots_U[self._used_LS[layer, slots_U] > 0]
        if not known_U.size:
            return known_U
        share_S = (self._after_LSS[layer, known_U] / self._used_LS[layer, known_U, None]).mean(0)
        count = int(np.ceil(self._width_L[(layer + 1) % len(self._width_L)]))
        first = np.argsort(-share_S, kind="stable")[:count]
        return first[share_S[first] >= least]

    def forget(self, layer: int, slot: int) -> None:
        """The slot gets another expert."""
        self._used_LS[layer, slot] = 0
        self._after_LSS[layer, slot] = 0
        self._after_LSS[layer - 1, :, slot] = 0
