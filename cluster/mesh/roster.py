"""Which shard stands at which rank, and the epoch: the controller's memory of shards, without Ray or a clock.

A shard passes through these states:

    (unknown) --join--> joining --ready--> serving --drain--> draining --leave, silence, a successor--> (unknown)

Every change of who serves raises the epoch by one, and so do a retry of shards that a router gave up although they are
alive, and every change of the published placement (`publish`). Nothing is stored: a controller that restarts learns the
ranks and the highest epoch from the shards and routers that are still there.

Ranks are numbers, given out as shards come. A rank that is free is given out again, so they stay small. Serve gives
each replica a rank of its own and passes a dead replica's on to its successor: that tells whose seat a successor may
take.
"""

from __future__ import annotations

from dataclasses import dataclass

from experts.protocol.membership import ShardEndpoint

_LONGEST_PAUSE = 16  # between two retries of a shard, as a multiple of the first pause


@dataclass
class Seat:
    """One shard at one rank."""

    shard_id: str
    node_id: str
    rank: int
    last_heartbeat_s: float
    endpoint: ShardEndpoint | None = None  # None while it starts
    serve_rank: int | None = None  # Serve's rank of the replica, None if unknown
    num_slots: int = 0  # of a layer; 0 until the shard says so
    draining: str = ""  # why it hands on its experts: "stops" or "told to"; empty while it does not
    given_up_s: float | None = None  # since when some router has gone without it although it serves
    retried_s: float = float("-inf")
    retries: int = 0  # of this incarnation; each waits twice as long as the one before

    @property
    def serving(self) -> bool:
        return self.endpoint is not None


class Roster:
    """Seats by rank, plus the epoch. Times are seconds on any monotonic clock that the caller reads."""

    def __init__(self) -> None:
        self.epoch = 0
        self._seats: dict[int, Seat] = {}

    def publish(self) -> int:
        """Raise the epoch, since the published placement changed, and return it."""
        self.epoch += 1
        return self.epoch

    def endpoints(self, num_ranks: int) -> tuple[ShardEndpoint | None, ...]:
        """Where each rank's shard listens, None where none serves."""
        return tuple(self.endpoint_of(rank) for rank in range(num_ranks))

    def endpoint_of(self, rank: int) -> ShardEndpoint | None:
        """Where the rank's shard listens, None if none serves."""
        seat = self._seats.get(rank)
        return None if seat is None else seat.endpoint

    @property
    def seats(self) -> list[Seat]:
        """The occupied seats by rank."""
        return [self._seats[rank] for rank in sorted(self._seats)]

    def at(self, rank: int) -> Seat | None:
        """The seat at a rank, if it is occupied."""
        return self._seats.get(rank)

    def seat_of(self, shard_id: str) -> Seat | None:
        """The seat of a shard, if it has one."""
        return next((seat for seat in self._seats.values() if seat.shard_id == shard_id), None)

    def left_by_predecessor(self, serve_rank: int, now_s: float, patience_s: float) -> int | None:
        """The rank of a shard with this Serve rank that has been silent for `patience_s`: it is dead.

        All others may just be late, so their seats become free only through `expire`.
        """
        for seat in self.seats:
            if seat.serve_rank == serve_rank and self._silent(seat.rank, now_s, patience_s):
                return seat.rank
        return None

    def lowest_free_rank(self, besides: set[int] = frozenset()) -> int:  # type: ignore[assignment]
        """The first rank that no shard has and that is not among `besides`."""
        rank = 0
        while rank in self._seats or rank in besides:
            rank += 1
        return rank

    def sit(self, shard_id: str, node_id: str, rank: int, serve_rank: int, now_s: float) -> Seat:
        """Seat a shard that has not started yet, in the place of whoever was there."""
        if rank in self._seats:
            self._vacate(rank)
        self._seats[rank] = Seat(shard_id, node_id, rank, now_s, serve_rank=serve_rank)
        return self._seats[rank]

    def ready(self, shard_id: str, endpoint: ShardEndpoint, num_slots: int, now_s: float) -> bool:
        """The shard listens. Returns False if its seat is gone; then it must restart."""
        seat = self.seat_of(shard_id)
        if seat is None or seat.rank != endpoint.rank:
            return False
        seat.last_heartbeat_s, seat.num_slots = now_s, num_slots
        if seat.endpoint != endpoint:
            seat.endpoint, seat.given_up_s, seat.retries = endpoint, None, 0
            self.epoch += 1
        return True

    def heartbeat(self, shard_id: str, now_s: float) -> bool:
        """A sign of life. Returns False if this shard has no seat; then it must join or rejoin."""
        seat = self.seat_of(shard_id)
        if seat is None:
            return False
        seat.last_heartbeat_s = now_s
        return True

    def leave(self, shard_id: str) -> int | None:
        """The shard is gone; returns the rank that it had, None if it had none."""
        if (seat := self.seat_of(shard_id)) is None:
            return None
        self._vacate(seat.rank)
        return seat.rank

    def expire(self, now_s: float, lost_after_s: float) -> list[int]:
        """Remove shards that have been silent for `lost_after_s`; returns their ranks."""
        ranks = [rank for rank in self._seats if self._silent(rank, now_s, lost_after_s)]
        for rank in ranks:
            self._vacate(rank)
        return sorted(ranks)

    def credit_pause(self, lag_s: float, now_s: float) -> None:
        """Do not count the last `lag_s` as silence, since nobody could be heard then."""
        for seat in self._seats.values():
            # Not into the future: a shard heard just now, before the lag was noticed, was not silent at all.
            seat.last_heartbeat_s = min(seat.last_heartbeat_s + lag_s, now_s)
            if seat.given_up_s is not None:  # keeps its order relative to the last heartbeat
                seat.given_up_s = min(seat.given_up_s + lag_s, now_s)

    def given_up(self, rank: int, incarnation: str, now_s: float) -> None:
        """A router goes on without this incarnation of the rank's shard. Does nothing for any other incarnation."""
        seat = self._seats.get(rank)
        if seat is None or seat.endpoint is None or seat.endpoint.incarnation != incarnation:
            return
        if seat.given_up_s is None:
            seat.given_up_s = now_s

    def retry(self, now_s: float, after_s: float) -> list[int]:
        """Ranks given up at least `after_s` ago whose shards were heard since; raises the epoch if there are any.

        A shard that is given up again after a retry waits twice as long for the next one, and so on, because every
        retry costs its routers a dispatch that fails.
        """
        ranks = []
        longest_s = _LONGEST_PAUSE * after_s
        for seat in self._seats.values():
            if seat.given_up_s is None or seat.last_heartbeat_s <= seat.given_up_s:
                continue
            if seat.given_up_s - seat.retried_s > longest_s:  # it served well for that long
                seat.retries = 0
            if now_s - seat.given_up_s < min(after_s * 2**seat.retries, longest_s):
                continue
            seat.given_up_s, seat.retried_s, seat.retries = None, now_s, seat.retries + 1
            ranks.append(seat.rank)
        if ranks:
            self.epoch += 1
        return sorted(ranks)

    def raise_epoch_above(self, epoch: int) -> None:
        """An earlier controller gave out `epoch`; this one goes on above it."""
        self.epoch = max(self.epoch, epoch + 1)

    def _silent(self, rank: int, now_s: float, for_s: float) -> bool:
        seat = self._seats.get(rank)
        return seat is not None and now_s - seat.last_heartbeat_s >= for_s

    def _vacate(self, rank: int) -> None:
        if self._seats.pop(rank).serving:
            self.epoch += 1
