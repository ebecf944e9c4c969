"""Near replicas first: what a router on a node of its own leaves to choose from, for it and for the planner.

L layers, E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np


def keep_near(slots_LER: np.ndarray, near_R: np.ndarray) -> np.ndarray:
    """int32 [L, E, R]: slots without those of farther ranks where an expert has one on a near rank.

    Args:
        slots_LER: slot of each expert on each rank, -1 for none or a rank that is lost.
        near_R: bool, ranks that the router reaches without crossing a slower link.

    An expert without near replicas keeps all it has, so everything stays reachable, and `choose_replicas` on the result
    fetches from afar only what is nowhere near. With no near rank, or none but near ones, nothing changes.
    """
    near_R = np.asarray(near_R)
    if near_R.shape != slots_LER.shape[2:] or near_R.dtype != np.bool_:
        raise ValueError(f"near_R must be bool {list(slots_LER.shape[2:])}, got {near_R.dtype} {list(near_R.shape)}")
    has_near_LE1 = (slots_LER[:, :, near_R] >= 0).any(axis=2, keepdims=True)
    return np.where(has_near_LE1 & ~near_R, np.int32(-1), slots_LER).astype(np.int32)
