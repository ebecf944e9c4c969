"""Which rank a shard gets that holds nothing yet: at a cold start, as a replacement, or as one more."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cluster.mesh.messages import JoinRequest
from cluster.mesh.planning import ShardsAtHand
from cluster.mesh.roster import Roster, Seat
from cluster.mesh.target import TargetKeeper

logger = logging.getLogger("ray.serve")

LEAST_PATIENCE_S = 5.0  # with a shard that waits for the others of a cold start


@dataclass(frozen=True)
class SeatAnswer:
    """A rank, or why there is none yet."""

    rank: int | None
    reason: str = ""


class Seating:
    """Seats shards in the roster. `vacated` is called with the rank of a shard that another takes the place of."""

    def __init__(self, roster: Roster, keeper: TargetKeeper, vacated: Callable[[int], None]) -> None:
        self._roster = roster
        self._keeper = keeper
        self._vacated = vacated
        self._waiting: dict[str, tuple[JoinRequest, float]] = {}  # for the others of a cold start; when last heard
        self._asked_since: dict[str, float] = {}

    def join(
        self, request: JoinRequest, now_s: float, *, heartbeat_s: float, settled: bool, wanted: int | None
    ) -> SeatAnswer:
        """Seat a shard, or say what it waits for."""
        roster = self._roster
        if (seat := roster.seat_of(request.shard_id)) is not None:
            seat.last_heartbeat_s = now_s
        elif request.loading is not None:
            # The controller restarted while this shard started.
            if request.loading < 0 or roster.at(request.loading) is not None:
                return SeatAnswer(None, f"rank {request.loading} is taken")
            seat = self._sit(request, request.loading, now_s)
        elif not settled:
            return SeatAnswer(None, "the controller has just started and learns who serves already")
        elif self._keeper.target is None:
            self._waiting[request.shard_id] = (request, now_s)
            return SeatAnswer(None, f"{len(self._waiting)} of {wanted or '?'} shards are here to plan for")
        elif (rank := self._rank_for(request, now_s, 2 * heartbeat_s)) is None:
            return SeatAnswer(None, f"a shard with Serve's rank {request.serve_rank} was heard just now")
        else:
            self._asked_since.pop(request.shard_id, None)
            seat = self._sit(request, rank, now_s)
        if self._keeper.target is None:
            return SeatAnswer(None, "the placement is being planned")
        return SeatAnswer(seat.rank)

    def gather(self, now_s: float, *, heartbeat_s: float, wanted: int) -> ShardsAtHand | None:
        """Seat the shards of a cold start once all are here, node by node; None while some are missing.

        Returns the shards to plan for, with `slots_per_rank` None.
        """
        patience_s = max(2 * heartbeat_s, LEAST_PATIENCE_S)
        self._waiting = {name: each for name, each in self._waiting.items() if now_s - each[1] < patience_s}
        if len(self._waiting) + len(self._roster.seats) < max(wanted, 1):
            return None
        newcomers = [request for request, _ in self._waiting.values()]
        for request in sorted(newcomers, key=lambda each: (each.node_id, each.serve_rank)):
            self._sit(request, self._roster.lowest_free_rank(), now_s)
        self._waiting = {}
        return self.shards_at_hand()

    def shards_at_hand(self) -> ShardsAtHand:
        """The shards with a seat that are not draining, as ranks 0 and up. Nodes count if each has equally many."""
        seats = [seat for seat in self._roster.seats if not seat.draining]
        nodes = [seat.node_id for seat in seats]
        counts = Counter(nodes)
        in_blocks = sum(one != other for one, other in itertools.pairwise(nodes)) == len(counts) - 1
        even = in_blocks and len(set(counts.values())) == 1
        slots = [seat.num_slots for seat in seats if seat.num_slots]
        return ShardsAtHand(len(seats), len(counts) if even else 1, min(slots) if slots else None)

    def _rank_for(self, request: JoinRequest, now_s: float, patience_s: float) -> int | None:
        """The rank of the shard that this one replaces, or else a free one; None until that is clear.

        No two living shards have the same rank of Serve's. One that had it before is dead once it is silent.
        """
        left = self._roster.left_by_predecessor(request.serve_rank, now_s, patience_s)
        if left is not None:
            return left
        seats = self._roster.seats
        predecessors = [seat for seat in seats if seat.serve_rank == request.serve_rank and not seat.draining]
        since_s = self._asked_since.setdefault(request.shard_id, now_s)
        if predecessors and now_s - since_s < 2 * patience_s:
            return None
        awaited = sorted(rank for rank in self._keeper.ranks if self._roster.at(rank) is None)
        return awaited[0] if awaited else self._roster.lowest_free_rank()

    def _sit(self, request: JoinRequest, rank: int, now_s: float) -> Seat:
        if (seat := self._roster.at(rank)) is not None:
            self._roster.leave(seat.shard_id)
            self._vacated(rank)
        logger.info("rank %d: given to shard %s on node %s", rank, request.shard_id, request.node_id)
        return self._roster.sit(request.shard_id, request.node_id, rank, request.serve_rank, now_s)
