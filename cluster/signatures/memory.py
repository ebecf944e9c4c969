"""What prompts of the past say about the experts of a new one: those whose text is nearest to its text.

M remembered prompts, F features of a text, W numbers of a signature.
"""

from __future__ import annotations

import numpy as np

from cluster.signatures.text import BUCKETS
from cluster.signatures.usage import WIDTH

NEAREST = 8


class PromptMemory:
    """The newest `capacity` pairs of a prompt's features and its signature. No other memory is taken."""

    def __init__(self, capacity: int) -> None:
        self._features_MF = np.zeros((capacity, BUCKETS), np.float32)
        self._signatures_MW = np.zeros((capacity, WIDTH), np.float32)
        self._added = 0
        self._mean_F = np.zeros(BUCKETS, np.float32)
        self._centred_MF = self._features_MF[:0]

    def __len__(self) -> int:
        return min(self._added, len(self._features_MF))

    @property
    def signatures_MW(self) -> np.ndarray:
        """float32 [M, W] of those that there are; a view."""
        return self._signatures_MW[: len(self)]

    def add(self, features_NF: np.ndarray, signatures_NW: np.ndarray) -> None:
        """Remember more: any numbers [N, F] and [N, W]. The oldest ones go."""
        for features_F, signature_W in zip(features_NF, signatures_NW, strict=True):
            place = self._added % len(self._features_MF)
            self._features_MF[place], self._signatures_MW[place] = _unit(features_F.astype(np.float32)), signature_W
            self._added += 1
        known_MF = self._features_MF[: len(self)]
        # What all prompts have in common tells none from another.
        self._mean_F = known_MF.mean(0)
        centred_MF = known_MF - self._mean_F
        self._centred_MF = centred_MF / np.maximum(np.linalg.norm(centred_MF, axis=1, keepdims=True), 1e-6)

    def expected(self, features_F: np.ndarray, min_similarity: float) -> np.ndarray | None:
        """The mean signature, float32 [W], of the NEAREST prompts, the nearer the heavier.

        None if none is as near as `min_similarity`, a cosine, or nothing is remembered.
        """
        if not self._added or not features_F.any():
            return None
        near_M = self._centred_MF @ _unit(_unit(features_F.astype(np.float32)) - self._mean_F)
        count = min(NEAREST, len(near_M))
        nearest = np.argpartition(near_M, -count)[-count:]
        weights = near_M[nearest]
        if weights.max() < min_similarity:
            return None
        weights = np.maximum(weights, 0.0) ** 2
        total = float(weights.sum())
        return weights @ self._signatures_MW[nearest] / total if total > 0 else None  # type: ignore[no-any-return]


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-6)  # type: ignore[no-any-return]
