"""Sliding windows of a minute, in slots."""

from __future__ import annotations

import math

SLOT_S = 2.0
# A slot counts until the last moment of it is a minute old, so one more than fit into a minute.
WINDOW_SLOTS = 31
SPARE = 0.05  # of a limit: what all routers together may have without using it


def slot_of(now_s: float) -> int:
    """The number of the slot at `now_s`, on the ledger's clock."""
    return math.floor(now_s / SLOT_S)


def oldest_of(slot: int) -> int:
    """The oldest slot that counts at `slot`."""
    return slot - WINDOW_SLOTS + 1


def free_at_s(slot: int) -> float:
    """When what was used in `slot` counts no more, on the ledger's clock."""
    return (slot + WINDOW_SLOTS) * SLOT_S


def spare_of(limit: int, routers: int) -> int:
    """How much of a limit one of `routers` may have in advance."""
    return math.floor(limit * SPARE / max(1, routers))


def share_of(limit: int, routers: int) -> int:
    """What one of `routers` may use of a limit while it cannot ask; at least one, so that nobody is shut out."""
    return max(1, limit // max(1, routers))
