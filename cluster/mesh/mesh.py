"""The controller's whole state: who serves, what they hold, what they should hold. Without Ray or a clock of its own.

`deployment.PlacementController` is its shell: it takes calls, tells the time, and asks Serve. Tests and the simulation
of large meshes drive it directly. `now_s` are seconds on any monotonic clock.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import replace

import numpy as np

from cluster.config.live_sections import LiveConfig
from cluster.mesh.conductor import Conductor
from cluster.mesh.holdings import Holdings, placement_of
from cluster.mesh.known_routers import KnownRouters
from cluster.mesh.messages import CopyReport, JoinRequest, ShardHolding, Told
from cluster.mesh.planning import ModelFacts, ShardsAtHand
from cluster.mesh.roster import Roster, Seat
from cluster.mesh.seating import SeatAnswer, Seating
from cluster.mesh.target import Limits, Target, TargetKeeper
from cluster.mesh.way import Pace
from experts.protocol.membership import Membership
from placement.placement import Placement

logger = logging.getLogger("ray.serve")

REMEMBERED_EPOCHS = 16  # routers at one of them are told differences


class Mesh:
    """One mesh, from a cold start on."""

    def __init__(self, model: ModelFacts, live: LiveConfig) -> None:
        self.model = model
        self.roster = Roster()
        self.routers = KnownRouters()
        self.holdings = Holdings(model.num_layers, model.num_experts)
        self.keeper = TargetKeeper()
        self.conductor = Conductor(self.holdings, self.roster.publish, self.roster.endpoint_of)
        self.seating = Seating(self.roster, self.keeper, self._gone)
        self.configure(live)
        self.wanted: int | None = None
        """How many shards Serve wants; None if it did not say."""
        self.settled = False
        """Whether the shards that an earlier controller knew had time to come back."""
        self.open = False
        """Whether routers get memberships: since every expert was served for the first time."""
        self.num_slots = 0
        """Slots of a layer that a new shard allocates; 0 before the first plan."""
        self.unfit: dict[int, str] = {}
        """Why shards with these Serve ranks ended before they served, until one serves."""
        self._memberships: deque[Membership] = deque(maxlen=REMEMBERED_EPOCHS)
        self._lost_since: dict[int, float] = {}
        self._left: set[str] = set()

    def configure(self, live: LiveConfig) -> None:
        """Take on other settings. A changed policy needs a new plan, which is the caller's to make."""
        self.live = live
        placement, migration = live.placement, live.migration
        self.keeper.limits = Limits(placement.min_replicas, placement.spare_slots, placement.protect)
        self.conductor.pace = Pace(migration.max_bytes_per_s, migration.round_s)

    # Shards -----------------------------------------------------------------------------------------------------------

    def join(self, request: JoinRequest, now_s: float) -> SeatAnswer:
        """Seat a shard that holds nothing yet, or say what it waits for. One with a problem is noted, not seated."""
        if request.problem:
            logger.error("shard %s cannot start: %s", request.shard_id, request.problem)
            self.unfit[request.serve_rank] = request.problem
            return SeatAnswer(None, request.problem)
        heartbeat_s = self.live.membership.heartbeat_s
        return self.seating.join(request, now_s, heartbeat_s=heartbeat_s, settled=self.settled, wanted=self.wanted)

    def gather(self, now_s: float) -> ShardsAtHand | None:
        """Seat the shards of a cold start once all are here; see `Seating.gather`."""
        if not self.settled or self.wanted is None:
            return None
        return self.seating.gather(now_s, heartbeat_s=self.live.membership.heartbeat_s, wanted=self.wanted)

    def row_to_load(self, rank: int) -> Placement:
        """What a shard that joins at `rank` loads by itself: its row at a cold start, nothing later."""
        shape = (self.model.num_layers, self.model.num_experts)
        row_LE = None if self.open else self.conductor.row_of(rank)
        if row_LE is None:
            row_LE = np.zeros(shape, np.bool_)
        return placement_of({rank: row_LE}, shape, rank + 1, max(1, int(row_LE.sum(1).max())))

    def ready(self, holding: ShardHolding, now_s: float) -> bool:
        """The shard listens. False: it has no seat here, or lost it."""
        seat = self.roster.seat_of(holding.shard_id)
        if seat is None or not self.roster.ready(holding.shard_id, holding.endpoint, holding.num_slots, now_s):
            return False
        self.unfit.pop(holding.serve_rank, None)
        self._serves(seat, holding)
        self.advance(now_s)
        return True

    def rejoin(
        self,
        holding: ShardHolding,
        epoch: int,
        target: Target | None,
        draining: str,
        now_s: float,
        paused: bool = False,
    ) -> int | None:
        """A serving shard that this controller does not know, or took for dead; returns its rank, which may be another.

        `draining`: why it was to hand on its experts, empty if it was not; `paused`: nothing was to move. None if it is
        of another model and must restart.
        """
        expected = (self.model.num_layers, self.model.num_experts)
        if holding.held_LE.shape != expected:
            logger.warning("shard %s is of another model; it restarts", holding.shard_id)
            return None
        newest = self.keeper.target
        self.num_slots = max(self.num_slots, holding.num_slots)  # of the others too, until they say so
        if target is not None and (newest is None or target.version > newest.version):
            self._adopt(target)
        self.roster.raise_epoch_above(epoch)
        seat, rank = self.roster.seat_of(holding.shard_id), holding.endpoint.rank
        if seat is None:
            rank = rank if self.roster.at(rank) is None else self.roster.lowest_free_rank()
            seat = self.roster.sit(holding.shard_id, holding.node_id, rank, holding.serve_rank, now_s)
        holding = replace(holding, endpoint=replace(holding.endpoint, rank=seat.rank))
        seat.draining = draining or seat.draining
        if paused and not self.settled:  # later it was known here, and was told if it still is
            self.conductor.pause(True)
        self.roster.ready(holding.shard_id, holding.endpoint, holding.num_slots, now_s)
        self._serves(seat, holding)
        self.advance(now_s)
        return seat.rank

    def told(self, shard_id: str) -> Told:
        """What people told of this shard, and of all."""
        seat = self.roster.seat_of(shard_id)
        return Told(seat is not None and seat.draining == "told to", self.conductor.paused)

    def drain(self, seat: Seat, why: str, now_s: float) -> None:
        """Let the other shards take over what this one has."""
        seat.draining = why
        self.advance(now_s)

    def undrain(self, seat: Seat, now_s: float) -> None:
        """The shard takes experts again."""
        seat.draining = ""
        self.advance(now_s)

    def handed_over(self, rank: int) -> bool:
        """Whether no expert is published on a rank any more."""
        holding = self.holdings.ranks.get(rank)
        return holding is None or not holding.published_LE.any()

    def behind(self, epoch: int, now_s: float) -> list[str]:
        """Routers that have not moved to an epoch yet."""
        return self.routers.behind(epoch, now_s, self.live.membership.lost_after_s)

    def left(self, rank: int, now_s: float) -> bool:
        """Whether no router uses a rank any more."""
        return self.handed_over(rank) and not self.behind(self.roster.epoch, now_s)

    @property
    def has_heirs(self) -> bool:
        """Whether there is a shard that could take over from one that drains."""
        return any(seat.serving and not seat.draining for seat in self.roster.seats)

    def heartbeat(self, shard_id: str, now_s: float) -> bool:
        """A sign of life. False: this shard has no seat here, and must join or rejoin.

        One that has left goes on until it hears of that; it shall not come back.
        """
        return self.roster.heartbeat(shard_id, now_s) or shard_id in self._left

    def leave(self, shard_id: str, now_s: float) -> None:
        """The shard is gone."""
        self._left.add(shard_id)
        rank = self.roster.leave(shard_id)
        if rank is not None:
            self._gone(rank)
            self.advance(now_s)

    def report(self, report: CopyReport, now_s: float) -> bool:
        """What a shard holds now. False: it has no seat here."""
        seat = self.roster.seat_of(report.shard_id)
        if seat is None or seat.rank not in self.holdings.ranks:
            return False
        seat.last_heartbeat_s = now_s
        self.conductor.report(seat.rank, report.held_LE, report.results)
        self.advance(now_s)
        return True

    def expire(self, now_s: float) -> list[int]:
        """Take out shards that are silent for too long, and let routers retry those that they gave up."""
        settings = self.live.membership
        ranks = self.roster.expire(now_s, settings.lost_after_s)
        for rank in ranks:
            self._gone(rank)
        for rank in self.roster.retry(now_s, settings.retry_lost_after_s):
            logger.info("rank %d: a router gave it up but it is alive; routers try it again", rank)
        self.routers.forget_silent(now_s, 10 * settings.lost_after_s)
        return ranks

    # Placement --------------------------------------------------------------------------------------------------------

    def set_target(
        self, placement: Placement, origin: str, policy: str = "", load_LE: np.ndarray | None = None
    ) -> Target:
        """Work towards a placement for the ranks that it gives experts to."""
        before = self.keeper.target
        version = 1 if before is None else before.version + 1
        if load_LE is None and before is not None:
            load_LE = before.load_LE
        self._adopt(Target(version, origin, placement, policy or self.policy_followed, load_LE))
        assert self.keeper.target is not None
        logger.info("target %d: %s", self.keeper.target.version, origin)
        return self.keeper.target

    @property
    def policy_followed(self) -> str:
        """Digest of the settings that the target was planned by; empty if it was not."""
        return "" if self.keeper.target is None else self.keeper.target.policy

    @property
    def num_ranks(self) -> int:
        """Ranks of what is published: up to the last one that serves or is awaited."""
        return max([0, *self.holdings.ranks, *self.keeper.ranks]) + 1

    @property
    def missing(self) -> list[int]:
        """Ranks that the target gives experts and no shard has."""
        return sorted(self.keeper.ranks - self.holdings.ranks.keys())

    @property
    def membership(self) -> Membership:
        """What routers dispatch by at this epoch."""
        epoch = self.roster.epoch
        if not self._memberships or self._memberships[-1].epoch != epoch:
            num_ranks = self.num_ranks
            placement = replace(self.holdings.placement(num_ranks), speeds=self.keeper.speeds(num_ranks))
            self._memberships.append(Membership(epoch, placement, self.roster.endpoints(num_ranks)))
        return self._memberships[-1]

    def told_since(self, epoch: int) -> bytes:
        """The membership as a difference to that of `epoch`, or all of it; see `Membership.delta_from`."""
        older = next((each for each in self._memberships if each.epoch == epoch), None)
        return self.membership.delta_from(older)

    def advance(self, now_s: float) -> None:
        """Go on as far as possible."""
        if not self.settled:
            return
        if self.keeper.target is None and self.holdings.ranks:
            self._adopt_found()
        self._follow(now_s)
        if self.open or not self.missing:  # shards of a cold start load by themselves
            self.conductor.step(now_s, self.routers.lowest_epoch(now_s, self.live.membership.lost_after_s))
        if not self.open and self.keeper.target is not None and not self.missing and not self.unserved:
            self.open = True
            logger.info("all %d shards serve, epoch %d", len(self.holdings.ranks), self.roster.epoch)

    @property
    def unserved(self) -> int:
        """(layer, expert) pairs that no shard serves."""
        return int((self.holdings.count_LE == 0).sum())

    # ------------------------------------------------------------------------------------------------------------------

    def _serves(self, seat: Seat, holding: ShardHolding) -> None:
        self.num_slots = max(self.num_slots, holding.num_slots)
        self.conductor.expert_bytes = holding.expert_bytes
        self.holdings.add(seat.rank, holding.num_slots, holding.node_id, holding.held_LE)
        self._lost_since.pop(seat.rank, None)
        self.conductor.rank_up(seat.rank)

    def _gone(self, rank: int) -> None:
        self.holdings.drop(rank)
        self.conductor.rank_down(rank)

    def _adopt(self, target: Target) -> None:
        """Take a target from a plan, a command or an earlier life of the controller."""
        map_LRs = target.placement.physical_to_logical_map.reshape(
            self.model.num_layers, target.placement.num_ranks, -1
        )
        slots = {
            int(rank): self._slots_of(int(rank), map_LRs.shape[2])
            for rank in np.flatnonzero((map_LRs >= 0).any((0, 2)))
        }
        self.keeper.set(target, slots)
        assert self.keeper.target is not None
        self.conductor.set_target(self.keeper.target.placement, self.keeper.target.load_LE)

    def _slots_of(self, rank: int, at_least: int) -> int:
        seat = self.roster.at(rank)
        return (seat.num_slots if seat is not None else 0) or self.num_slots or at_least

    def _adopt_found(self) -> None:
        """No shard knows a target: what they hold is one, and `follow` completes it."""
        logger.warning("no shard knows the target; what they hold becomes it")
        held = self.holdings.held_placement(self.num_ranks)
        self._adopt(Target(1, "found", held))

    def _follow(self, now_s: float) -> None:
        """Suit the target to the shards at hand."""
        slots = {seat.rank: seat.num_slots for seat in self.roster.seats if seat.serving and not seat.draining}
        enough = self.wanted is not None and len(slots) >= self.wanted
        for rank in self.keeper.ranks - slots.keys():
            seat = self.roster.at(rank)
            if seat is None:
                since_s = self._lost_since.setdefault(rank, now_s)
                if enough or now_s - since_s >= self.live.membership.replace_after_s:
                    continue
            elif seat.draining:
                continue
            slots[rank] = self.keeper.slots_of(rank)
        self._lost_since = {rank: s for rank, s in self._lost_since.items() if self.roster.at(rank) is None}
        room = len(slots) if self.wanted is None else self.wanted - len(self.keeper.ranks & slots.keys())
        nodes = {seat.rank: seat.node_id for seat in self.roster.seats}
        if self.keeper.follow(slots, nodes, room):
            assert self.keeper.target is not None
            self.conductor.set_target(self.keeper.target.placement, self.keeper.target.load_LE)
