"""The placement controller: one replica that owns the placement, the membership and the epoch.

The epoch is a number that rises with every change of who serves. Shards and routers ask and the controller only
answers, so that a restart leaves nothing to find again:

    shard:   join -> (loads) -> ready -> heartbeat, heartbeat, ...; rejoin if a heartbeat is not known; leave
    router:  await_membership, again and again: a long poll that says what the router knows and which shards it lost

Serving does not depend on it: while it is away, routers and shards go on at their epoch.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any

import numpy as np

from cluster.config.apps import ExpertsAppConfig
from cluster.config.parse import parse
from cluster.controller.known_routers import KnownRouters
from cluster.controller.messages import (
    ControllerStatus,
    HeartbeatAnswer,
    JoinAnswer,
    JoinRequest,
    MembershipAnswer,
    MembershipRequest,
    PlacementView,
    RejoinRequest,
    SeatView,
)
from cluster.controller.roster import Roster, Seat, placement_digest
from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.status import ShardStatus
from placement.placement import Placement

logger = logging.getLogger("ray.serve")


class PlacementController:
    """Serve deployment of the application `experts`.

    Bound with the placement planned when the application was built, so that a restart finds the same one, and with the
    shards' handle, which it never calls: the handle makes them part of the application.
    """

    async def __init__(self, config: dict[str, Any], placement: dict[str, Any], shards: Any) -> None:  # type: ignore[misc]
        self._config = parse(ExpertsAppConfig, config)
        self._placement = Placement.from_json(placement)
        self._shards = shards
        self._digest = placement_digest(self._placement)
        self._roster = Roster(self._placement.num_ranks, self._placement.num_nodes)
        self._routers = KnownRouters()
        self._term = uuid.uuid4().hex[:12]
        self._start_s = time.monotonic()
        self._looked_s = self._start_s
        self._was_complete = False
        self._served_before = False  # an earlier life of the controller once had all shards
        self._news = asyncio.Event()
        self._shard_status: dict[int, ShardStatus] = {}
        self._watch = asyncio.create_task(self._watch_silence())

    # Called by shards -------------------------------------------------------------------------------------------------

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """A shard without experts asks for a rank; without one it asks again later."""
        patience_s = 2 * self._config.membership.heartbeat_s
        answer = self._roster.join(
            request.shard_id, request.node_id, request.serve_rank, time.monotonic(), patience_s, request.loading
        )
        self._announce()
        if answer.rank is None:
            return JoinAnswer(None, answer.reason, self._roster.epoch, None)
        logger.info("rank %d: given to shard %s on node %s", answer.rank, request.shard_id, request.node_id)
        return JoinAnswer(answer.rank, "", self._roster.epoch, self._placement)

    async def ready(self, shard_id: str, endpoint: ShardEndpoint) -> bool:
        """The shard listens at `endpoint`. False: it has no seat here, or lost it."""
        seated = self._roster.ready(shard_id, endpoint, time.monotonic())
        self._announce()
        return seated

    async def rejoin(self, request: RejoinRequest) -> bool:
        """A serving shard that this controller does not know. False: it must restart."""
        if request.placement_digest != self._digest:
            logger.warning("shard %s holds another placement than the planned one; it restarts", request.shard_id)
            return False
        # An epoch above ours comes from an earlier life, in which each shard that became ready raised it by one.
        if request.epoch > self._roster.epoch and request.epoch >= self._roster.num_ranks:
            self._served_before = True
        seated = self._roster.rejoin(
            request.shard_id, request.node_id, request.endpoint, request.epoch, time.monotonic(), request.serve_rank
        )
        self._announce()
        return seated

    async def heartbeat(self, shard_id: str, status: ShardStatus | None) -> HeartbeatAnswer:
        """A sign of life, with the shard's status once it serves."""
        known = self._roster.heartbeat(shard_id, time.monotonic())
        if known and status is not None:
            self._shard_status[status.rank] = status
        return HeartbeatAnswer(known, self._roster.epoch)

    async def leave(self, shard_id: str) -> bool:
        """A shard stops. Returns True once every router goes on without it, False if that takes drain_s."""
        self._roster.leave(shard_id)
        self._announce()
        epoch = self._roster.epoch
        deadline_s = time.monotonic() + self._config.membership.drain_s
        while (behind := self._behind(epoch)) and time.monotonic() < deadline_s:
            await self._next_change(deadline_s - time.monotonic())
        if behind:
            logger.warning("routers %s have not moved to epoch %d in time", behind, epoch)
        return not behind

    # Called by routers ------------------------------------------------------------------------------------------------

    async def await_membership(self, request: MembershipRequest) -> MembershipAnswer:
        """Long poll of a router. Returns within `request.wait_s`.

        Nobody gets a membership before all shards have served once; from then on it may lack shards, also for routers
        that start.
        """
        deadline_s = time.monotonic() + request.wait_s
        if request.term and request.term != self._term:
            self._served_before = True
            if self._roster.epoch <= request.epoch:
                self._roster.raise_epoch_above(request.epoch)
        self._routers.note(request.router_id, request.epoch, request.lost, time.monotonic())
        for rank, incarnation in request.lost.items():
            self._roster.given_up(rank, incarnation, time.monotonic())
        self._announce()
        while True:
            if self._roster.epoch > request.epoch and self._may_publish(first=not request.term):
                membership = Membership(self._roster.epoch, self._placement, self._roster.endpoints)
                return MembershipAnswer(self._term, membership, [])
            rest_s = deadline_s - time.monotonic()
            if rest_s <= 0:
                return MembershipAnswer(request.term, None, self._roster.missing)
            await self._next_change(rest_s)

    async def deregister_router(self, router_id: str) -> None:
        """A router stops; nobody waits any more for it to move to an epoch."""
        self._routers.forget(router_id)
        self._announce()

    # Called by the console, the command and tests ---------------------------------------------------------------------

    async def status(self) -> ControllerStatus:
        """Who is where."""
        now_s = time.monotonic()
        return ControllerStatus(
            term=self._term,
            epoch=self._roster.epoch,
            complete=self._roster.complete,
            missing_ranks=self._roster.missing,
            num_ranks=self._placement.num_ranks,
            placement_digest=self._digest,
            routers=self._routers.views(now_s),
            shards=[
                SeatView(
                    shard_id=seat.shard_id,
                    node_id=seat.node_id,
                    rank=seat.rank,
                    serving=seat.serving,
                    silent_s=now_s - seat.last_heartbeat_s,
                    pid=seat.endpoint.pid if seat.endpoint else None,
                    status=self._last_status(seat),
                )
                for seat in self._roster.seats
            ],
        )

    async def placement(self) -> PlacementView:
        """The placement, and the experts of each rank by layer."""
        placement = self._placement
        experts_of_rank = [
            [sorted(int(e) for e in np.unique(row) if e >= 0) for row in placement.experts_of_rank(rank)]
            for rank in range(placement.num_ranks)
        ]
        return PlacementView(self._roster.epoch, self._digest, placement, experts_of_rank)

    async def check_health(self) -> None:
        """Raises when the watch over silent shards has ended."""
        if self._watch.done():
            raise RuntimeError(f"the watch over shards ended: {self._watch.exception()!r}")

    # ------------------------------------------------------------------------------------------------------------------

    def _last_status(self, seat: Seat) -> ShardStatus | None:
        """The rank's last status, if it is that of the shard in the seat and not of a predecessor."""
        status = self._shard_status.get(seat.rank)
        if status is None or seat.endpoint is None or status.incarnation != seat.endpoint.incarnation:
            return None
        return status

    def _may_publish(self, first: bool) -> bool:
        """Starting routers (`first`) wait until all shards served once; after a restart everyone waits for those alive.

        Not until all are back: one may be lost for good, and a router does without it.
        """
        if self._was_complete:
            return True
        settled = time.monotonic() - self._start_s >= self._config.membership.lost_after_s
        return settled and (self._served_before or not first)

    def _behind(self, epoch: int) -> list[str]:
        return self._routers.behind(epoch, time.monotonic(), self._config.membership.lost_after_s)

    def _announce(self) -> None:
        """Wake everyone who waits for a change."""
        if self._roster.complete and not self._was_complete:
            self._was_complete = True
            logger.info("all %d shards serve, epoch %d", self._roster.num_ranks, self._roster.epoch)
        self._news.set()
        self._news = asyncio.Event()

    async def _next_change(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._news.wait(), max(timeout_s, 0.001))
        except TimeoutError:
            return

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(self._config.membership.heartbeat_s / 2)
            self._look_for_silence(time.monotonic())

    def _look_for_silence(self, now_s: float) -> None:
        settings = self._config.membership
        lag_s, self._looked_s = now_s - self._looked_s, now_s
        if lag_s > 2 * settings.heartbeat_s:
            # This process stood still and heartbeats may wait to be read: the silence was its own.
            logger.warning("the watch over shards stood still for %.1f s; none of them counts as silent", lag_s)
            self._roster.credit_pause(lag_s, now_s)
        for rank in self._roster.expire(now_s, settings.lost_after_s):
            logger.warning("rank %d: no sign of life for %s s, taken out", rank, settings.lost_after_s)
        for rank in self._roster.retry(now_s, settings.retry_lost_after_s):
            logger.info("rank %d: a router gave it up but it is alive; routers try it again", rank)
        self._announce()
        self._routers.forget_silent(now_s, 10 * settings.lost_after_s)
