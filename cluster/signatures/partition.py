"""Signatures in as many even groups as there are routers: balanced k-means, one group for each router.

M signatures, W numbers of one, R routers.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8
BETTER = 0.95  # groups from elsewhere are taken if their cost is below this times that of the groups that are near


def partition(signatures_MW: np.ndarray, near_RW: np.ndarray) -> np.ndarray:
    """Centres float32 [R, W] of even groups; group r is the one nearest to what router r computed lately (`near_RW`).

    The same for the same input, so request routers that know the same agree. Two starts are tried: what routers
    computed lately, and signatures far from one another. The second one is taken only where it is clearly better, or
    prompts would change places for nothing. ValueError without signatures.
    """
    if not len(signatures_MW):
        raise ValueError("there are no signatures to make groups of")
    kept_RW, kept_cost = _grouped(signatures_MW, near_RW)
    anew_RW, anew_cost = _grouped(signatures_MW, _far_apart(signatures_MW, len(near_RW)))
    return _matched(anew_RW, near_RW) if anew_cost < BETTER * kept_cost else kept_RW


def distances(points_MW: np.ndarray, centres_RW: np.ndarray) -> np.ndarray:
    """Squared distances [M, R]."""
    across = points_MW @ centres_RW.T
    return np.maximum((points_MW**2).sum(1)[:, None] - 2 * across + (centres_RW**2).sum(1)[None, :], 0.0)


def assign_evenly(distance_MR: np.ndarray) -> np.ndarray:
    """A group for each point, int64 [M]; sizes differ by one at most. Who has most to lose chooses first."""
    num_points, num_groups = distance_MR.shape
    if num_groups == 1:
        return np.zeros(num_points, np.int64)
    ordered = np.partition(distance_MR, 1, axis=1)
    order_M = np.argsort(ordered[:, 0] - ordered[:, 1], kind="stable")
    small, larger = divmod(num_points, num_groups)
    room = [small] * num_groups
    group_M = np.zeros(num_points, np.int64)
    for point, wished in zip(order_M.tolist(), np.argsort(distance_MR[order_M], axis=1).tolist(), strict=True):
        for group in wished:
            if room[group] == 0 and larger > 0:  # one more place than the even share, for some groups
                room[group], larger = -1, larger - 1
                group_M[point] = group
                break
            if room[group] > 0:
                room[group] -= 1
                group_M[point] = group
                break
    return group_M


def _grouped(points_MW: np.ndarray, start_RW: np.ndarray) -> tuple[np.ndarray, float]:
    """Centres after ROUNDS, and the mean squared distance to them."""
    centres_RW = start_RW.astype(np.float32)
    group_M = np.full(len(points_MW), -1)
    for _ in range(ROUNDS):
        before, group_M = group_M, assign_evenly(distances(points_MW, centres_RW))
        if (before == group_M).all():
            break
        for group in np.unique(group_M):
            centres_RW[group] = points_MW[group_M == group].mean(0)
    return centres_RW, float(distances(points_MW, centres_RW)[np.arange(len(points_MW)), group_M].mean())


def _far_apart(points_MW: np.ndarray, count: int) -> np.ndarray:
    """The point farthest from the mean, and then always the one farthest from those that there are."""
    near_M = distances(points_MW, points_MW.mean(0, keepdims=True))[:, 0]
    chosen = [int(near_M.argmax())]
    near_M = np.full(len(points_MW), np.inf)
    while len(chosen) < count:
        near_M = np.minimum(near_M, distances(points_MW, points_MW[chosen[-1:]])[:, 0])
        chosen.append(int(near_M.argmax()))
    return points_MW[chosen]


def _matched(centres_RW: np.ndarray, near_RW: np.ndarray) -> np.ndarray:
    """The centres in the order of the routers they are nearest to, the nearest pair first."""
    distance_RR = distances(near_RW.astype(np.float32), centres_RW)
    matched_RW = np.empty_like(centres_RW)
    for _ in range(len(centres_RW)):
        router, centre = np.unravel_index(distance_RR.argmin(), distance_RR.shape)
        matched_RW[router] = centres_RW[centre]
        distance_RR[router, :] = distance_RR[:, centre] = np.inf
    return matched_RW
