"""All that a dispatcher needs of one epoch, made beside the engine's steps and taken over between two of them.

R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.live_slots import LiveSlots
from experts.dispatch.rows.base import RowMover
from experts.dispatch.rows.pick import pick_row_mover
from experts.protocol.membership import Membership
from experts.transports.base import RouterLink


@dataclass(slots=True)
class PreparedEpoch:
    """An epoch's tables and links. Its dispatcher changes `lost` and `slots` as shards fail."""

    membership: Membership
    links: dict[int, RouterLink]
    """By rank: those of the shards that answer."""
    lost: dict[int, str]
    """Why there is no link, by rank."""
    kept: frozenset[int]
    """Ranks whose links are the dispatcher's already: a link that it gives up meanwhile is not to come back."""
    slots: LiveSlots
    mover: RowMover
    answered_R: np.ndarray
    """bool, for the dispatcher to write."""


def prepare_epoch(
    shape: LayerShape,
    max_rows: int,
    membership: Membership,
    links: Mapping[int, RouterLink],
    lost: Mapping[int, str],
    local_R: np.ndarray | None = None,
    kept: frozenset[int] = frozenset(),
) -> PreparedEpoch:
    """An epoch ready to be taken over; callable in any thread. What takes long in it runs without the GIL.

    ValueError for a placement of another model, or links of different kinds.
    """
    placement = membership.placement
    shape.check_placement(placement)
    mover = pick_row_mover(shape, max_rows, membership, links)
    slots = LiveSlots(placement, local_R)
    for rank in set(range(placement.num_ranks)) - links.keys():
        slots.lose(rank)
    answered_R = np.zeros(placement.num_ranks, np.bool_)
    return PreparedEpoch(membership, dict(links), dict(lost), kept, slots, mover, answered_R)
