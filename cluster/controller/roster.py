"""Which shard stands at which rank, and the epoch: the controller's memory of shards, without Ray or a clock.

A shard passes through three states:

    (unknown) --join--> loading at a rank --ready--> serving --(silence, leave, a successor)--> (unknown)

Every change of who serves raises the epoch by one, and so does a retry of shards that a router gave up although they
are alive. Nothing is stored: a controller that restarts learns the ranks and the highest epoch from the shards and
routers that are still there.

Serve gives each replica a rank and passes a dead replica's rank on to its successor. That rank is the first choice, and
it tells whose seat the successor may take. A shard that holds or loads experts keeps the rank they are for. With blocks
of nodes a shard's rank here can differ from Serve's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from experts.protocol.membership import ShardEndpoint
from placement.placement import Placement

_LONGEST_PAUSE = 16  # between two retries of a shard, as a multiple of the first pause


@dataclass
class Seat:
    """One shard at one rank."""

    shard_id: str
    node_id: str
    rank: int
    last_heartbeat_s: float
    endpoint: ShardEndpoint | None = None  # None while it loads
    serve_rank: int | None = None  # Serve's rank of the replica, None if unknown
    given_up_s: float | None = None  # since when some router has gone without it although it serves
    retried_s: float = float("-inf")
    retries: int = 0  # of this incarnation; each waits twice as long as the one before

    @property
    def serving(self) -> bool:
        return self.endpoint is not None


@dataclass(frozen=True)
class SeatAnswer:
    """A rank, or why there is none yet."""

    rank: int | None
    reason: str = ""


def placement_digest(placement: Placement) -> str:
    """Sixteen hex digits that tell two placements apart."""
    return hashlib.sha256(json.dumps(placement.to_json(), sort_keys=True).encode()).hexdigest()[:16]


class Roster:
    """Seats by rank, plus the epoch. Times are seconds on any monotonic clock that the caller reads."""

    def __init__(self, num_ranks: int, num_nodes: int = 1) -> None:
        if num_ranks < 1 or num_nodes < 1 or num_ranks % num_nodes:
            raise ValueError(f"{num_ranks} ranks cannot be dealt to {num_nodes} nodes in equal blocks")
        self.num_ranks = num_ranks
        self.num_nodes = num_nodes
        self.epoch = 0
        self._seats: dict[int, Seat] = {}

    @property
    def endpoints(self) -> tuple[ShardEndpoint | None, ...]:
        """Where each rank's shard listens, None where none serves."""
        seats = (self._seats.get(rank) for rank in range(self.num_ranks))
        return tuple(seat.endpoint if seat is not None else None for seat in seats)

    @property
    def missing(self) -> list[int]:
        """Ranks at which no shard serves."""
        return [rank for rank, endpoint in enumerate(self.endpoints) if endpoint is None]

    @property
    def complete(self) -> bool:
        """Every rank is served."""
        return not self.missing

    @property
    def seats(self) -> list[Seat]:
        """The occupied seats by rank."""
        return [self._seats[rank] for rank in sorted(self._seats)]

    def seat_of(self, shard_id: str) -> Seat | None:
        """The seat of a shard, if it has one."""
        return next((seat for seat in self._seats.values() if seat.shard_id == shard_id), None)

    def join(
        self,
        shard_id: str,
        node_id: str,
        wanted_rank: int,
        now_s: float,
        patience_s: float,
        loading: int | None = None,
    ) -> SeatAnswer:
        """Seat a shard that holds no experts yet.

        `wanted_rank` is the rank that Serve gave the replica. The shard gets it if it is free and suits the blocks of
        nodes, else the first free rank that suits. If there is none, it takes the seat of the replica that had its
        Serve rank before, once that one has been silent for `patience_s`: it is dead, and this is its successor. All
        others may just be late, so their seats become free only through `expire`.

        A shard that the controller forgot in a restart gives the rank it is `loading`, and gets that one or none.
        """
        if (seat := self.seat_of(shard_id)) is not None:
            seat.last_heartbeat_s = now_s
            return SeatAnswer(seat.rank)
        if loading is not None:
            if loading in self._seats or not 0 <= loading < self.num_ranks:
                return SeatAnswer(None, f"rank {loading} is taken or does not exist")
            self._seats[loading] = Seat(shard_id, node_id, loading, now_s, serve_rank=wanted_rank)
            return SeatAnswer(loading)
        choices = [wanted_rank, *(rank for rank in range(self.num_ranks) if rank != wanted_rank)]
        free = [rank for rank in choices if rank not in self._seats and 0 <= rank < self.num_ranks]
        left = [
            seat.rank
            for seat in self.seats
            if seat.serve_rank == wanted_rank and self._silent(seat.rank, now_s, patience_s)
        ]
        suitable = [rank for rank in (*free, *left) if self._suits(rank, node_id)]
        if not suitable:
            if not free and not left:
                return SeatAnswer(None, f"all {self.num_ranks} ranks are taken")
            return SeatAnswer(None, f"the free ranks {sorted(free + left)} belong to the blocks of other nodes")
        rank = suitable[0]
        if rank in self._seats:
            self._vacate(rank)
        self._seats[rank] = Seat(shard_id, node_id, rank, now_s, serve_rank=wanted_rank)
        return SeatAnswer(rank)

    def ready(self, shard_id: str, endpoint: ShardEndpoint, now_s: float) -> bool:
        """The shard has loaded and listens. Returns False if its seat is gone; then it must restart."""
        seat = self.seat_of(shard_id)
        if seat is None or seat.rank != endpoint.rank:
            return False
        seat.last_heartbeat_s = now_s
        if seat.endpoint != endpoint:
            seat.endpoint, seat.given_up_s, seat.retries = endpoint, None, 0
            self.epoch += 1
        return True

    def rejoin(
        self,
        shard_id: str,
        node_id: str,
        endpoint: ShardEndpoint,
        epoch: int,
        now_s: float,
        serve_rank: int | None = None,
    ) -> bool:
        """Seat a shard that serves already, after the controller's restart or its own long silence.

        Returns False if another shard has its rank by now, or if it has a seat at another rank.
        """
        self.raise_epoch_above(epoch)
        if not 0 <= endpoint.rank < self.num_ranks:
            return False
        own, seat = self.seat_of(shard_id), self._seats.get(endpoint.rank)
        if own is not seat:
            return False
        if seat is None:
            self._seats[endpoint.rank] = Seat(shard_id, node_id, endpoint.rank, now_s, serve_rank=serve_rank)
        return self.ready(shard_id, endpoint, now_s)

    def heartbeat(self, shard_id: str, now_s: float) -> bool:
        """A sign of life. Returns False if this shard has no seat; then it must join or rejoin."""
        seat = self.seat_of(shard_id)
        if seat is None:
            return False
        seat.last_heartbeat_s = now_s
        return True

    def leave(self, shard_id: str) -> None:
        """The shard stops. Does nothing if it has no seat."""
        if (seat := self.seat_of(shard_id)) is not None:
            self._vacate(seat.rank)

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

    def _suits(self, rank: int, node_id: str) -> bool:
        """Shards of one node fill one block of ranks; with a single block everything suits."""
        if self.num_nodes == 1:
            return True
        per_node = self.num_ranks // self.num_nodes
        blocks: dict[int, set[str]] = {}
        for seat in self._seats.values():
            blocks.setdefault(seat.rank // per_node, set()).add(seat.node_id)
        here = blocks.get(rank // per_node, set())
        mine = {block for block, nodes in blocks.items() if node_id in nodes}
        if mine:
            return rank // per_node in mine or not self._room(mine, per_node)
        return not here or all(block in blocks for block in range(self.num_nodes))

    def _room(self, blocks: Iterable[int], per_node: int) -> bool:
        return any(rank not in self._seats for b in blocks for rank in range(b * per_node, (b + 1) * per_node))
