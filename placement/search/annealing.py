"""What the annealing searches share: how heat and penalty fall, and which of two states is better.

R ranks (or other groups that carry load), M mixes of the traffic: all of it first, then each domain alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from placement.compiled import compiled

# Penalty at the start and at the end of a search, in visits a token.
PENALTY_FROM, PENALTY_TO = 0.5, 20.0
# Planned loads may be above the limits by this much in all; the guard below the cap that was asked for is larger.
EXCESS_TOLERANCE = 0.002


class Schedule(NamedTuple):
    """Heat in tokens, penalty a token for a group's load above its limit; both change geometrically over a search.

    One call runs `iterations` proposals of the part from `begin` to `end`, fractions of the whole search.
    """

    heat_from: float
    heat_to: float
    penalty_from: float
    penalty_to: float
    begin: float
    end: float
    iterations: int


class Best(NamedTuple):
    """The best slots met so far, int32 [R, s]; `rating_2` float64 [2], their excess load and weighted visits.

    Fill `rating_2` with infinity before the first call.
    """

    slots_Rs: np.ndarray
    rating_2: np.ndarray


@compiled(forceinline=True)
def as_int64(value: Any) -> int:
    """An integer of any width as int64; `int()` would keep the width when compiled."""
    return np.int64(value)  # type: ignore[return-value]


@compiled(forceinline=True)
def heat_and_penalty(schedule: Schedule, step: int, num_tokens: int) -> tuple[float, float]:
    """Heat and penalty of a step, in tokens."""
    part = schedule.begin + (schedule.end - schedule.begin) * step / schedule.iterations
    heat = schedule.heat_from * (schedule.heat_to / schedule.heat_from) ** part
    penalty = num_tokens * schedule.penalty_from * (schedule.penalty_to / schedule.penalty_from) ** part
    return heat, penalty


@compiled(forceinline=True)
def keep_best(best: Best, slots_Rs: np.ndarray, excess: float, visits: float) -> None:
    """Copy the slots if their excess load is less, or equal with fewer visits."""
    rating_2 = best.rating_2
    if excess < rating_2[0] - 1e-9 or (excess < rating_2[0] + 1e-9 and visits < rating_2[1] - 1e-9):
        rating_2[0], rating_2[1] = excess, visits
        best.slots_Rs[:] = slots_Rs


@compiled(forceinline=True)
def excess_of(load: float, allowed: float) -> float:
    """How far a load is above what is allowed, in allowed loads; 0 where it is not."""
    return max(0.0, load / allowed - 1)


@compiled(forceinline=True)
def total_excess(load_RM: np.ndarray, allowed_RM: np.ndarray) -> float:
    total = 0.0
    for r in range(load_RM.shape[0]):
        for m in range(load_RM.shape[1]):
            if load_RM[r, m] > allowed_RM[r, m]:
                total += load_RM[r, m] / allowed_RM[r, m] - 1
    return total


@compiled(forceinline=True)
def fullness(load_M: np.ndarray, allowed_M: np.ndarray) -> float:
    """The load of a rank over what is allowed, in the mix where that is most."""
    most = load_M[0] / allowed_M[0]
    for m in range(1, len(load_M)):
        most = max(most, load_M[m] / allowed_M[m])
    return most


@compiled(forceinline=True)
def fullest(load_RM: np.ndarray, allowed_RM: np.ndarray, first: int = 0) -> int:
    """The rank with most load for what it is allowed in any mix; `first` on a tie, then the lower index."""
    most, found = first, fullness(load_RM[first], allowed_RM[first])
    for r in range(len(load_RM)):
        of_rank = fullness(load_RM[r], allowed_RM[r])
        if of_rank > found:
            most, found = r, of_rank
    return most
