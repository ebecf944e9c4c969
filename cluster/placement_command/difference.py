"""What it takes to get from one placement to another: which shard gets and loses which experts. Pure.

Legend: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.mesh.holdings import experts_by_rank
from placement.placement import Placement, check_same_model


@dataclass(frozen=True, eq=False)
class Difference:
    """`gained_LR` and `lost_LR` int [L, R]: experts of a layer that a rank gets, and that it gives up."""

    gained_LR: np.ndarray
    lost_LR: np.ndarray

    @property
    def copies(self) -> int:
        return int(self.gained_LR.sum())

    @property
    def releases(self) -> int:
        return int(self.lost_LR.sum())

    def to_dict(self, expert_bytes: int | None) -> dict[str, Any]:
        """Plain data; `bytes` is null if the size of an expert is not known."""
        return {
            "copies": self.copies,
            "releases": self.releases,
            "bytes": None if expert_bytes is None else self.copies * expert_bytes,
            "copies_by_layer_and_rank": self.gained_LR.tolist(),
            "releases_by_layer_and_rank": self.lost_LR.tolist(),
        }


def difference(current: Placement, wanted: Placement) -> Difference:
    """From `current` to `wanted`. ValueError if they are of different models."""
    check_same_model("the placement", wanted, "what is published", current)
    before, after = experts_by_rank(current), experts_by_rank(wanted)
    nothing_LE = np.zeros((current.num_layers, current.num_experts), np.bool_)
    gained, lost = [], []
    for rank in range(max(current.num_ranks, wanted.num_ranks)):
        had_LE, gets_LE = before.get(rank, nothing_LE), after.get(rank, nothing_LE)
        gained.append((gets_LE & ~had_LE).sum(1))
        lost.append((had_LE & ~gets_LE).sum(1))
    return Difference(np.stack(gained, 1), np.stack(lost, 1))
