"""From what shards hold to what they should hold, in rounds, with every expert served in between.

Pure: it is told what happened and what time it is, and says which epoch to publish and what each shard should do. So
tests and the simulation run it with clocks and shards of their own.

    idle ----> retiring ----> copying ----> idle, or the next round
       a round     every router     every copy
       is chosen   has moved on     came or failed

`placement.migration` plans the rounds. What a round overwrites leaves the map first; when no router uses it any more,
shards release it and make the round's copies; then the map is published with the copies, and without what the next
round overwrites. Whatever goes wrong (a shard lost, a copy that failed, another target), the round at hand ends and the
rest is planned anew from what is held by then.

Legend: L MoE layers, E logical experts, R ranks, s slots of a rank.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cluster.mesh.holdings import Holdings, Pair, experts_at
from cluster.mesh.order_book import OrderBook
from cluster.mesh.way import Pace, migration_to, rounds_to
from experts.protocol.membership import ShardEndpoint
from experts.protocol.orders import CopyOrder, CopyResult
from placement.migration.layer import MigrationError
from placement.migration.plan import Migration
from placement.migration.rounds import Round
from placement.placement import EMPTY, Placement

logger = logging.getLogger("ray.serve")

Phase = Literal["idle", "retiring", "copying"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # after a round with failures; doubles while they go on
MAX_SOURCES = 3
PATIENCE = 4.0  # a round may take so many times as long as its bytes at the allowed rate
GRACE_S = 60.0  # and so much longer


@dataclass
class Counters:
    """What was moved since this controller started."""

    rounds: int = 0
    copies: int = 0
    copied_bytes: int = 0
    failed_copies: int = 0


@dataclass
class _Copying:
    """The round that is under way."""

    round: Round
    experts: dict[tuple[int, int, int], int]  # of the round's dropped slots, by (layer, rank, slot)
    pending: dict[int, set[Pair]] = field(default_factory=dict)  # by rank
    arrived: dict[int, list[Pair]] = field(default_factory=lambda: defaultdict(list))
    failed: int = 0
    deadline_s: float = 0.0

    @property
    def num_pending(self) -> int:
        return sum(map(len, self.pending.values()))


class Conductor:
    """The migration of one mesh.

    `publish` raises the epoch and returns it; `endpoint_of` tells where a rank listens.
    """

    def __init__(
        self, holdings: Holdings, publish: Callable[[], int], endpoint_of: Callable[[int], ShardEndpoint | None]
    ) -> None:
        self.pace = Pace(None, 1.0)
        self.expert_bytes = 1
        """Of one expert's weights; as the shards say."""
        self.paused = False
        self.phase: Phase = "idle"
        self.problem = ""
        """Why nothing moves although something should, one line; empty if all is well."""
        self.counters = Counters()
        self.orders = OrderBook(holdings)
        self.target: Placement | None = None
        self.load_LE: np.ndarray | None = None
        """Load of each expert, if known: the most used go first."""
        self._holdings = holdings
        self._publish = publish
        self._endpoint_of = endpoint_of
        self._migration: Migration | None = None
        self._map_LRs = np.empty(0)
        self._work: _Copying | None = None
        self._dirty = False
        self._retired_epoch = -1  # the last epoch that took something out of the map
        self._released_upto = float("-inf")  # the epoch up to which releases were ordered
        self._not_before_s = float("-inf")
        self._pause_s = FIRST_PAUSE_S

    # Told from outside ------------------------------------------------------------------------------------------------

    def set_target(self, target: Placement | None, load_LE: np.ndarray | None = None) -> None:
        """Work towards another placement; the round at hand ends first."""
        self.target, self.load_LE = target, load_LE
        self._replan()

    def rank_up(self, rank: int) -> None:
        """A shard serves at `rank`, and `Holdings` knows what it has."""
        self.orders.forget(rank)
        self._replan()

    def rank_down(self, rank: int) -> None:
        """The shard at `rank` is gone, and `Holdings` has dropped it."""
        self.orders.forget(rank)
        self._replan()
        if self.phase == "retiring":
            # Another replica of what was retired may have been on it.
            self._work, self.phase = None, "idle"
            if self._holdings.restore(self.orders.releasing):
                self._publish()
        elif self._work is not None:
            self._work.pending.pop(rank, None)
            self._work.arrived.pop(rank, None)

    def report(self, rank: int, held_LE: np.ndarray, results: Iterable[CopyResult]) -> None:
        """What the shard holds now, and what became of its copies."""
        if self._holdings.report(rank, held_LE):
            logger.warning("rank %d lacks experts that it held; planning anew", rank)
            self._publish()
            self._replan()
        self.orders.held(rank, held_LE)
        pending = self._work.pending.get(rank, set()) if self._work is not None else set()
        for result in results:
            pair = (result.layer, result.expert)
            if result.error:
                self.counters.failed_copies += 1
                logger.warning(
                    "rank %d: no copy of expert %d of layer %d: %s", rank, result.expert, result.layer, result.error
                )
            else:
                self.counters.copies += 1
                self.counters.copied_bytes += result.size_bytes
            if self._work is not None and pair in pending:
                pending.discard(pair)
                if result.error:
                    self._work.failed += 1
                else:
                    self._work.arrived[rank].append(pair)
        if self._work is not None and pending:
            # A result may be lost with a controller; what is held is there. What is still to be released before it is
            # copied again is there for a moment only.
            there = [pair for pair in pending if held_LE[pair] and (rank, *pair) not in self.orders.releasing]
            pending.difference_update(there)
            self._work.arrived[rank] += there
        stray_LE = self._holdings.stray_LE(rank)
        for pair in self._work.arrived.get(rank, ()) if self._work is not None else ():
            stray_LE[pair] = False
        if stray_LE.any():  # of a round that was given up: it takes a slot, and the next plan knows nothing of it
            self._replan()

    # Asked from outside -----------------------------------------------------------------------------------------------

    def pause(self, paused: bool) -> None:
        """Stop after the round at hand, or go on."""
        self.paused = paused
        self._replan()

    @property
    def moving(self) -> bool:
        """Whether anything is left to do."""
        return self._dirty or self._migration is not None or self._work is not None

    @property
    def copies_in_flight(self) -> int:
        return 0 if self._work is None else self._work.num_pending

    @property
    def copies_left(self) -> int:
        """Copies of this plan that are not done, those in flight among them."""
        later = 0 if self._migration is None else self._migration.copies_left
        return later + self.copies_in_flight

    def rounds_to(self, target: Placement) -> list[Round]:
        """The rounds from what is published to another placement. MigrationError if there is no legal order."""
        return rounds_to(target, self._holdings, self.expert_bytes, self.pace, self.load_LE)

    def row_of(self, rank: int) -> np.ndarray | None:
        """bool [L, E]: what the target gives to a rank; None without a target or beyond its ranks."""
        if self.target is None or rank >= self.target.num_ranks:
            return None
        return experts_at(self.target, rank)

    # The loop ---------------------------------------------------------------------------------------------------------

    def step(self, now_s: float, routers_epoch: float) -> None:
        """Go on as far as possible. `routers_epoch` is the lowest among the routers, infinite if there are none."""
        while self._advance(now_s, routers_epoch):
            continue
        self._order_releases(routers_epoch)

    def _advance(self, now_s: float, routers_epoch: float) -> bool:
        if self.phase == "idle":
            return self._begin(now_s)
        assert self._work is not None
        if self.phase == "retiring":
            if routers_epoch < self._retired_epoch:
                return False
            self._start_copying(now_s, routers_epoch)
            return True
        if now_s < self._work.deadline_s and self._work.num_pending:
            return False
        self._finish_round(now_s)
        return True

    def _begin(self, now_s: float) -> bool:
        """Plan if something changed, and take up the next round."""
        if self.paused or self.target is None or now_s < self._not_before_s:
            return False
        if self._migration is None:
            if not self._dirty:
                return False
            self._plan()
        return self._next_round()

    def _plan(self) -> None:
        holdings = self._holdings
        restored = holdings.restore(self.orders.releasing)
        if holdings.publish_all() or restored:
            self._publish()
        self._dirty = False
        assert self.target is not None
        try:
            self._migration = migration_to(self.target, holdings, self.expert_bytes, self.pace, self.load_LE)
            self._map_LRs = self._migration.frame.start_LRs.copy()
            self.problem = ""
        except MigrationError as error:
            self._migration = None
            self._fail_plan(str(error))

    def _next_round(
        self, publish: dict[int, list[Pair]] | None = None, drop: dict[int, list[Pair]] | None = None
    ) -> bool:
        """Publish what came, retire what was dropped and what the next round overwrites, all in one epoch.

        Returns whether there is a next round.
        """
        upcoming = None
        if self._migration is not None and not self.paused:
            try:
                upcoming = self._migration.next_round()
            except MigrationError as error:
                self._fail_plan(str(error))
        retire = defaultdict(list, {rank: list(pairs) for rank, pairs in (drop or {}).items()})
        if upcoming is None:
            self._migration = None
        else:
            for layer, rank, slot in upcoming.retired:
                retire[rank].append((layer, int(self._map_LRs[layer, rank, slot])))
        for rank, pairs in (publish or {}).items():
            self._holdings.publish(rank, pairs)
        if publish or retire:
            epoch = self._publish()
            for rank, pairs in retire.items():
                self._holdings.retire(rank, pairs, epoch)
                self._retired_epoch = epoch
        if upcoming is None:
            self._work, self.phase = None, "idle"
            return False
        for place in upcoming.retired:
            self._map_LRs[place] = EMPTY
        for copy in upcoming.copies:
            self._map_LRs[copy.layer, copy.rank, copy.slot] = copy.expert
        dropped = {place: int(self._map_LRs[place]) for place in upcoming.dropped}
        for place in upcoming.dropped:
            self._map_LRs[place] = EMPTY
        self._work, self.phase = _Copying(upcoming, dropped), "retiring"
        return True

    def _start_copying(self, now_s: float, routers_epoch: float) -> None:
        work = self._work
        assert work is not None
        copies: dict[int, list[CopyOrder]] = defaultdict(list)
        for copy in work.round.copies:
            if copy.rank in self._holdings.ranks:
                work.pending.setdefault(copy.rank, set()).add((copy.layer, copy.expert))
                sources = self._sources(copy.layer, copy.expert, copy.source_rank, copy.rank)
                copies[copy.rank].append(CopyOrder(copy.layer, copy.expert, sources))
        for rank, orders in copies.items():
            self.orders.add(rank, self._releases(rank, routers_epoch), orders, self.pace.max_bytes_per_s)
        most = max((len(orders) for orders in copies.values()), default=0) * self.expert_bytes
        work.deadline_s = now_s + PATIENCE * most / self.pace.bytes_per_s + GRACE_S
        self.phase = "copying"

    def _finish_round(self, now_s: float) -> None:
        """Publish what came, and go on with the next round unless something went wrong."""
        work = self._work
        assert work is not None
        self.counters.rounds += 1
        late = work.num_pending
        if work.failed or late:
            self._not_before_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self.problem = f"{work.failed} copies failed and {late} did not end in time; trying again"
            self._replan()
        elif work.arrived:
            self._pause_s, self.problem = FIRST_PAUSE_S, ""
        dropped: dict[int, list[Pair]] = defaultdict(list)
        if self._migration is not None:
            for (layer, rank, _), expert in work.experts.items():
                if rank in self._holdings.ranks:
                    dropped[rank].append((layer, expert))
        self._next_round(work.arrived, dropped)

    def _order_releases(self, routers_epoch: float) -> None:
        """Let shards release what no router uses, also when no copy follows."""
        if self.phase == "retiring":
            return  # it goes with the round's copies
        before, self._released_upto = self._released_upto, min(routers_epoch, self._retired_epoch)
        if before == self._released_upto:
            return
        for rank, holding in self._holdings.ranks.items():
            if holding.retired and (release := self._releases(rank, routers_epoch)):
                self.orders.add(rank, release, [], self.pace.max_bytes_per_s)

    def _releases(self, rank: int, routers_epoch: float) -> list[Pair]:
        return self.orders.take_releases(rank, int(min(routers_epoch, self._retired_epoch)))

    def _sources(self, layer: int, expert: int, planned: int, target_rank: int) -> tuple[ShardEndpoint, ...]:
        """Shards that have the expert in the map: the planned one, then those on the target's node, then others."""
        ranks = self._holdings.ranks
        here = ranks[target_rank].node_id
        holders = [rank for rank, each in ranks.items() if each.published_LE[layer, expert] and rank != target_rank]
        holders.sort(key=lambda rank: (rank != planned, ranks[rank].node_id != here, rank))
        endpoints = [self._endpoint_of(rank) for rank in holders[:MAX_SOURCES]]
        return tuple(endpoint for endpoint in endpoints if endpoint is not None)

    def _replan(self) -> None:
        self._migration, self._dirty = None, True

    def _fail_plan(self, reason: str) -> None:
        if reason != self.problem:
            logger.error("the migration cannot go on: %s", reason)
        self.problem = reason
