"""How fast ranks are, relative to each other, and what that makes a (token, expert) pair count on each.

R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

WORK_UNIT = 1024
"""What a pair counts on the fastest rank where speeds differ; loads stay integers, equal in every form of the rule."""


def check_speeds(speeds: Sequence[float], num_ranks: int) -> None:
    """Raise ValueError unless there is a finite speed above 0 for every rank."""
    if len(speeds) != num_ranks or not all(0 < speed < math.inf for speed in speeds):
        raise ValueError(f"speeds must be {num_ranks} numbers above 0, got {tuple(speeds)}")


def work_of_speeds(speeds: Sequence[float] | None, num_ranks: int) -> np.ndarray:
    """int64 [R]: what a (token, expert) pair counts on each rank: 1 where all are equally fast, else inverse to speed.

    The fastest rank's pairs count `WORK_UNIT`; ranks a million times slower than that are taken as a million times
    slower, so that no sum overflows.
    """
    if speeds is None or len(set(speeds)) <= 1:
        return np.ones(num_ranks, np.int64)
    check_speeds(speeds, num_ranks)
    speed_R = np.asarray(speeds, float)
    return np.rint(WORK_UNIT * np.minimum(speed_R.max() / speed_R, 1e6)).astype(np.int64)
