"""What a router says of its prompts, in the routing statistics that Serve hands to request routers.

N pairs, F features of a text, W numbers of a signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.signatures.text import BUCKETS
from cluster.signatures.usage import WIDTH

KEY = "expertmesh_signatures"
MOST_PAIRS = 64  # of one report: 20 KB


@dataclass(frozen=True)
class SignatureReport:
    """`number` names the report. `mean_W`, int8: the mean signature of prompts computed lately, which fades."""

    number: int
    mean_W: np.ndarray
    features_NF: np.ndarray  # uint8
    signatures_NW: np.ndarray  # int8

    def to_stats(self) -> dict[str, Any]:
        """Routing statistics of Serve's."""
        pairs = np.hstack([self.features_NF.view(np.int8), self.signatures_NW])
        return {KEY: [self.number, self.mean_W.tobytes(), pairs.tobytes()]}

    @classmethod
    def from_stats(cls, stats: Mapping[str, Any]) -> SignatureReport | None:
        """Inverse of `to_stats`; None if there is none, or one of another version's."""
        try:
            number, mean, pairs = stats[KEY]
            pairs_N = np.frombuffer(pairs, np.int8).reshape(-1, BUCKETS + WIDTH)
            mean_W = np.frombuffer(mean, np.int8).reshape(WIDTH)
        except (KeyError, TypeError, ValueError):
            return None
        return cls(int(number), mean_W, pairs_N[:, :BUCKETS].view(np.uint8), pairs_N[:, BUCKETS:])
