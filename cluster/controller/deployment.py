"""The placement controller: one replica that owns the placement, the membership and the epoch.

Shards and routers ask, the controller only answers, so that nothing has to be found again when it restarts:

    shard:   join -> (loads) -> ready -> beat, beat, ...; rejoin where a beat is not known; leave
    router:  await_membership (a long poll that says what it knows and whom it lost), beat after beat

Serving does not depend on it: while it is away routers and shards go on at their epoch.
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
from cluster.controller.roster import Roster, Seat, placement_digest
from experts.protocol.membership import Membership, ShardEndpoint
from placement.placement import Placement

logger = logging.getLogger("ray.serve")


class PlacementController:
    """Serve deployment of the application `experts`.

    Bound with the placement that was planned when the application was built, so that a restart finds the same one, and
    with the handle of the shards, which it never calls: it makes them part of the application.
    """

    async def __init__(self, config: dict[str, Any], placement: dict[str, Any], shards: Any) -> None:  # type: ignore[misc]
        self._config = parse(ExpertsAppConfig, config)
        self._placement = Placement.from_json(placement)
        self._shards = shards
        self._digest = placement_digest(self._placement)
        self._roster = Roster(self._placement.num_ranks, self._placement.num_nodes)
        self._term = uuid.uuid4().hex[:12]
        self._start_s = time.monotonic()
        self._looked_s = self._start_s
        self._was_complete = False
        self._served_before = False  # an earlier life of the controller had all shards once
        self._news = asyncio.Event()
        self._routers: dict[str, dict[str, Any]] = {}
        self._shard_status: dict[int, dict[str, Any]] = {}
        self._watch = asyncio.create_task(self._watch_silence())

    # Called by shards -------------------------------------------------------------------------------------------------

    async def join(self, shard_id: str, node_id: str, wanted_rank: int, loading: int | None = None) -> dict[str, Any]:
        """A shard without experts asks for a rank: {"rank" or None, "reason", "epoch", "placement"}.

        `loading` is the rank that it loads already, where this controller restarted meanwhile: that one or none.
        """
        patience_s = 2 * self._config.membership.heartbeat_s
        answer = self._roster.join(shard_id, node_id, wanted_rank, time.monotonic(), patience_s, loading)
        self._announce()
        if answer.rank is None:
            return {"rank": None, "reason": answer.reason, "epoch": self._roster.epoch, "placement": None}
        logger.info("rank %d: given to shard %s on node %s", answer.rank, shard_id, node_id)
        return {
            "rank": answer.rank,
            "reason": "",
            "epoch": self._roster.epoch,
            "placement": self._placement.to_json(),
        }

    async def ready(self, shard_id: str, endpoint: dict[str, Any]) -> bool:
        """The shard listens at `endpoint`. False: it has no seat here, or no more."""
        seated = self._roster.ready(shard_id, ShardEndpoint(**endpoint), time.monotonic())
        self._announce()
        return seated

    async def rejoin(
        self, shard_id: str, node_id: str, endpoint: dict[str, Any], epoch: int, digest: str, serve_rank: int
    ) -> bool:
        """A serving shard that this controller does not know. False: it has to start anew."""
        if digest != self._digest:
            logger.warning("shard %s holds another placement than is planned now; it has to start anew", shard_id)
            return False
        # An epoch above ours is that of an earlier life, and each shard that came there counted it up.
        if epoch > self._roster.epoch and epoch >= self._roster.num_ranks:
            self._served_before = True
        seated = self._roster.rejoin(shard_id, node_id, ShardEndpoint(**endpoint), epoch, time.monotonic(), serve_rank)
        self._announce()
        return seated

    async def heartbeat(self, shard_id: str, status: dict[str, Any] | None) -> dict[str, Any]:
        """A sign of life with the shard's status once it serves: {"known", "epoch"}."""
        known = self._roster.heartbeat(shard_id, time.monotonic())
        if known and status is not None:
            self._shard_status[status["rank"]] = status
        return {"known": known, "epoch": self._roster.epoch}

    async def leave(self, shard_id: str) -> bool:
        """Farewell of a shard. Returns when every router goes on without it, or after drain_s; then it may stop."""
        self._roster.leave(shard_id)
        self._announce()
        epoch = self._roster.epoch
        end_s = time.monotonic() + self._config.membership.drain_s
        while (behind := self._behind(epoch)) and time.monotonic() < end_s:
            await self._next_change(end_s - time.monotonic())
        if behind:
            logger.warning("routers %s have not moved to epoch %d in time", behind, epoch)
        return not behind

    # Called by routers ------------------------------------------------------------------------------------------------

    async def await_membership(
        self, router_id: str, term: str, epoch: int, lost: dict[int, str], timeout_s: float
    ) -> dict[str, Any]:
        """Long poll of a router that is at `epoch` of the controller's life `term` (-1 and "" before its first).

        `lost` names the incarnation of each shard that the router has given up. Returns within `timeout_s` with
        {"term", "membership" or None if nothing changed, "waiting_for": [ranks]}. Nobody gets a membership before all
        shards have been there once; from then on it may lack shards, for routers that start as well.
        """
        end_s = time.monotonic() + timeout_s
        if term and term != self._term and self._roster.epoch <= epoch:
            self._roster.raise_epoch_above(epoch)
        if term and term != self._term:
            self._served_before = True
        self._routers[router_id] = {"epoch": epoch, "lost": lost, "seen_s": time.monotonic()}
        for rank, incarnation in lost.items():
            self._roster.given_up(int(rank), incarnation, time.monotonic())
        self._announce()
        while True:
            if self._roster.epoch > epoch and self._may_publish(first=not term):
                return {"term": self._term, "membership": self._membership().to_dict(), "waiting_for": []}
            rest_s = end_s - time.monotonic()
            if rest_s <= 0:
                return {"term": term, "membership": None, "waiting_for": self._roster.missing}
            await self._next_change(rest_s)

    async def deregister_router(self, router_id: str) -> None:
        """A router stops; nobody waits for it to move to an epoch any more."""
        self._routers.pop(router_id, None)
        self._announce()

    # Called by the ingress, tests and people --------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """Who is where, as plain data."""
        now_s = time.monotonic()
        return {
            "term": self._term,
            "epoch": self._roster.epoch,
            "complete": self._roster.complete,
            "missing_ranks": self._roster.missing,
            "num_ranks": self._placement.num_ranks,
            "placement_digest": self._digest,
            "routers": {
                name: {"epoch": router["epoch"], "lost": router["lost"], "silent_s": now_s - router["seen_s"]}
                for name, router in self._routers.items()
            },
            "shards": [
                {
                    "shard_id": seat.shard_id,
                    "node_id": seat.node_id,
                    "rank": seat.rank,
                    "serving": seat.serving,
                    "silent_s": now_s - seat.last_heartbeat_s,
                    "pid": seat.endpoint.pid if seat.endpoint else None,
                    **(self._shard_status.get(seat.rank, {}) if self._heard_of(seat) else {}),
                }
                for seat in self._roster.seats
            ],
        }

    async def placement(self) -> dict[str, Any]:
        """The placement as JSON, and what it means: experts of each rank by layer."""
        return {
            "epoch": self._roster.epoch,
            "digest": self._digest,
            "placement": self._placement.to_json(),
            "experts_of_rank": [
                [sorted(int(e) for e in np.unique(row) if e >= 0) for row in self._placement.experts_of_rank(rank)]
                for rank in range(self._placement.num_ranks)
            ],
        }

    async def check_health(self) -> None:
        """Raises when the watch over silent shards has ended."""
        if self._watch.done():
            raise RuntimeError(f"the watch over shards ended: {self._watch.exception()!r}")

    # ------------------------------------------------------------------------------------------------------------------

    def _heard_of(self, seat: Seat) -> bool:
        """Whether the last status of the rank is that of the shard which stands there now."""
        status = self._shard_status.get(seat.rank)
        return status is not None and seat.endpoint is not None and status["incarnation"] == seat.endpoint.incarnation

    def _membership(self) -> Membership:
        return Membership(self._roster.epoch, self._placement, self._roster.endpoints)

    def _may_publish(self, first: bool) -> bool:
        """Routers that start wait until all shards were there once; after a restart everyone waits for those that live.

        Not until all shards are there again: one may be lost for good, and a router does without it.
        """
        if self._was_complete:
            return True
        settled = time.monotonic() - self._start_s >= self._config.membership.lost_after_s
        return settled and (self._served_before or not first)

    def _behind(self, epoch: int) -> list[str]:
        horizon_s = time.monotonic() - self._config.membership.lost_after_s
        return [
            name for name, router in self._routers.items() if router["epoch"] < epoch and router["seen_s"] > horizon_s
        ]

    def _announce(self) -> None:
        """Wake whoever waits for a change."""
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
            # This process stood still, and signs of life may wait to be read: the silence was its own.
            logger.warning("the watch over shards stood still for %.1f s; none of them counts as silent", lag_s)
            self._roster.credit_pause(lag_s, now_s)
        for rank in self._roster.expire(now_s, settings.lost_after_s):
            logger.warning("rank %d: no sign of life for %s s, taken out", rank, settings.lost_after_s)
        for rank in self._roster.retry(now_s, settings.retry_lost_after_s):
            logger.info("rank %d: a router gave it up, it lives; routers try it again", rank)
        self._announce()
        horizon_s = now_s - 10 * settings.lost_after_s
        self._routers = {name: router for name, router in self._routers.items() if router["seen_s"] > horizon_s}
