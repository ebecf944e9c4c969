"""The placement controller: one replica that owns the placement, the membership and the epoch.

The epoch is a number that rises with every change of who serves what. Shards and routers ask and the controller only
answers, so that a restart leaves nothing to find again:

    shard:   join -> ready -> heartbeat, heartbeat, ...; rejoin if it is not known; leave
             await_order, again and again: a long poll that says what came of the last order
    router:  await_membership, again and again: a long poll that says what the router knows and which shards it lost
             observe, again and again: what it saw of its traffic

Serving does not depend on it: while it is away, routers and shards go on at their epoch. Its state is `mesh.Mesh`; this
is the shell with the clock, the calls and Serve.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any

from cluster.autopilot.messages import ObservationReport, ObservationWish
from cluster.config.apps import ExpertsAppConfig
from cluster.config.live_sections import LiveConfig
from cluster.config.parse import ConfigError, parse
from cluster.controller.autopilot import Autopilot
from cluster.controller.events import EventLog
from cluster.controller.history import History
from cluster.controller.news import News
from cluster.controller.people import PeopleCalls
from cluster.controller.planner import Planner
from cluster.controller.scaling import ScalingDesk
from cluster.controller.serve_watch import ServeWatch
from cluster.mesh.mesh import Mesh
from cluster.mesh.messages import (
    CopyReport,
    HeartbeatAnswer,
    JoinAnswer,
    JoinRequest,
    MembershipNews,
    MembershipRequest,
    OrderAnswer,
    OrderRequest,
    RejoinRequest,
    ShardHolding,
    Times,
)
from cluster.mesh.planning import ModelFacts
from cluster.mesh.secret_keeper import SecretKeeper
from cluster.mesh.target import Target
from cluster.observability.controller_series import CONTROLLER_SERIES
from cluster.observability.exporter import EXPORT_S, Exporter
from cluster.priority import lower, threads_here
from cluster.ray_joints import replica_identity, show_data_plane_log
from experts.protocol.secret import MeshSecret
from experts.protocol.status import ShardStatus

logger = logging.getLogger("ray.serve")


class PlacementController(PeopleCalls, ScalingDesk):
    """Serve deployment of the application `experts`.

    Bound with the shards' handle, which it never calls: the handle makes them part of the application. `reconfigure`
    gets the sections that a running mesh takes on, before anything else is called.
    """

    async def __init__(self, config: dict[str, Any], model: dict[str, int], shards: Any) -> None:  # type: ignore[misc]
        lower(threads_here())
        self._config, self._shards = parse(ExpertsAppConfig, config), shards
        self._secrets = SecretKeeper(self._config.mesh.secret_env)
        self._live = LiveConfig()
        self._mesh = Mesh(ModelFacts(**model), self._live)
        show_data_plane_log(role="controller", epoch=lambda: self._mesh.roster.epoch)
        self._planner = Planner(self._mesh, self._config.shards.slots_per_rank, self._advance, self._secrets.refusal)
        self._shard_status: dict[int, ShardStatus] = {}
        self._autopilot = Autopilot(
            self._mesh, self._config, self._shard_status, self._advance, lambda: self._planner.busy
        )
        self._history, self._events = History(), EventLog()
        self._term, self._looked_s = uuid.uuid4().hex[:12], time.monotonic()
        self._serve = ServeWatch(self._mesh, replica_identity().app_name, self._looked_s, self._look_again)
        self._refused_settings = ""  # why the last user_config was not taken on
        self._membership_news, self._order_news = News(), News()
        self._announced = (-1, (-1, -1))
        self._exporter = Exporter(CONTROLLER_SERIES)
        self._watch = asyncio.create_task(self._watch_mesh())
        self._serve_watch = asyncio.create_task(self._serve.follow())
        self._export_loop = asyncio.create_task(self._export_forever())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take on the sections `placement`, `migration`, `membership`, `autopilot`, `scaling`.

        ConfigError if they are wrong and no shard runs yet. A running mesh keeps its settings then, or has the default
        ones after a restart, and its status says why.
        """
        try:
            live = parse(LiveConfig, user_config or {}, "user_config of PlacementController")
        except ConfigError as error:
            if not await self._serve.any_shard_runs():
                raise
            logger.error("the new settings are refused: %s", error)
            self._refused_settings = str(error)
            return
        self._live, self._refused_settings = live, ""
        self._mesh.configure(live)
        self._autopilot.configure(live.autopilot)
        self._advance()
        self._plan_if_changed()

    # Called by shards -------------------------------------------------------------------------------------------------

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """A shard without experts asks for a rank; without one it asks again later."""
        answer = self._mesh.join(request, time.monotonic())
        self._planner.plan_first(time.monotonic())
        times, epoch = self._times, self._mesh.roster.epoch
        if self._planner.refusal:
            return JoinAnswer(None, self._planner.refusal, True, epoch, 0, None, times)
        if answer.rank is None:
            return JoinAnswer(None, answer.reason, False, epoch, 0, None, times)
        row = self._mesh.row_to_load(answer.rank)
        num_slots = self._config.shards.slots_per_rank or self._mesh.num_slots
        target = self._mesh.keeper.target
        load_LE = None if target is None else target.load_LE
        return JoinAnswer(answer.rank, "", False, epoch, num_slots, row, times, load_LE)

    async def ready(self, holding: ShardHolding) -> bool:
        """The shard listens and holds what it says. False: it has no seat here, or lost it."""
        seated = self._mesh.ready(holding, time.monotonic())
        self._announce()
        return seated

    async def rejoin(self, request: RejoinRequest) -> int | None:
        """A serving shard that this controller does not know; its rank from now on. None: it must restart."""
        target = None if request.target is None else Target.from_json(request.target)
        why = "stops" if request.stopping else "told to" if request.told.drained else ""
        rank = self._mesh.rejoin(request.holding, request.epoch, target, why, time.monotonic(), request.told.paused)
        self._announce()
        return rank

    async def heartbeat(self, shard_id: str, status: ShardStatus | None) -> HeartbeatAnswer:
        """A sign of life, with the shard's status once it serves."""
        known = self._mesh.heartbeat(shard_id, time.monotonic())
        if status is not None and self._mesh.roster.seat_of(shard_id) is not None:
            self._shard_status[status.rank] = status
        return HeartbeatAnswer(known, self._mesh.roster.epoch, self._times, self._mesh.told(shard_id), self.facts)

    async def await_order(self, request: OrderRequest) -> OrderAnswer:
        """Long poll of a shard for its next order. Returns within `request.wait_s`."""
        deadline_s = time.monotonic() + request.wait_s
        if request.report is not None:
            await self.report(request.report)
        version = request.version if request.term == self._term else -1
        while True:
            seat = self._mesh.roster.seat_of(request.shard_id)
            if seat is None or not seat.serving:
                return OrderAnswer(False, self._term, None, None)
            order = self._mesh.conductor.orders.next(seat.rank, version)
            target = self._mesh.keeper.target
            news = target if target is not None and target.version != request.target_version else None
            rest_s = deadline_s - time.monotonic()
            if order is not None or news is not None or rest_s <= 0:
                return OrderAnswer(True, self._term, order, None if news is None else news.to_json())
            await self._order_news.next(rest_s)

    async def report(self, report: CopyReport) -> bool:
        """What a shard holds in the midst of an order. False: it has no seat here and must rejoin."""
        known = self._mesh.report(report, time.monotonic())
        self._announce()
        return known

    async def leave(self, shard_id: str, timeout_s: float) -> bool:
        """A shard stops. Returns once the others have what only it had and no router uses it, or after `timeout_s`.

        False: something was left behind. If all shards stop, nothing is handed on.
        """
        deadline_s = time.monotonic() + timeout_s
        seat = self._mesh.roster.seat_of(shard_id)
        if seat is None:
            return True
        logger.info("rank %d: stopping; its experts are handed on", seat.rank)
        self._mesh.drain(seat, "stops", time.monotonic())
        self._announce()
        mesh = self._mesh
        while not mesh.left(seat.rank, time.monotonic()) and mesh.has_heirs and not mesh.keeper.problem:
            if time.monotonic() >= deadline_s:
                break
            await self._order_news.next(min(0.2, deadline_s - time.monotonic()))
            self._advance()
        left_behind = not self._mesh.handed_over(seat.rank)
        self._mesh.leave(shard_id, time.monotonic())
        self._announce()
        behind = await self._until_routers_moved(min(self._live.membership.drain_s, deadline_s - time.monotonic()))
        if left_behind:
            logger.error("rank %d stops with experts that no other shard took over: %s", seat.rank, self._problem)
        if behind:
            logger.warning("routers %s have not moved to epoch %d in time", behind, self._mesh.roster.epoch)
        return not left_behind and not behind

    # Called by routers ------------------------------------------------------------------------------------------------

    async def await_membership(self, request: MembershipRequest) -> MembershipNews:
        """Long poll of a router. Returns within `request.wait_s`.

        Nobody gets a membership before every expert was served once; from then on it may lack some, also for routers
        that start.
        """
        mesh, now_s = self._mesh, time.monotonic()
        deadline_s = now_s + request.wait_s
        if request.term and request.term != self._term and mesh.roster.epoch <= request.epoch:
            mesh.roster.raise_epoch_above(request.epoch)
        mesh.routers.note(request.router_id, request.epoch, request.lost, now_s)
        for rank, incarnation in request.lost.items():
            mesh.roster.given_up(rank, incarnation, now_s)
        self._advance()
        while True:
            if mesh.open and mesh.roster.epoch > request.epoch:
                known = request.epoch if request.term == self._term and not request.whole else -1
                return MembershipNews(self._term, mesh.told_since(known), [])
            rest_s = deadline_s - time.monotonic()
            if rest_s <= 0:
                return MembershipNews(request.term, None, mesh.missing)
            await self._membership_news.next(rest_s)
            # It was heard of just now, however long ago its poll began: releases wait for it.
            mesh.routers.note(request.router_id, request.epoch, request.lost, time.monotonic())

    async def mesh_secret(self, held: MeshSecret | None) -> MeshSecret | None:
        """What routers and shards prove themselves by; they bring what they hold. None: ask again."""
        return self._secrets.agree(held, self._mesh.settled)

    async def deregister_router(self, router_id: str) -> None:
        """A router stops; nobody waits any more for it to move to an epoch."""
        self._mesh.routers.forget(router_id)
        self._advance()

    async def observe(self, report: ObservationReport) -> ObservationWish:
        """What a router saw of its traffic since its last report, and how it is to go on."""
        return await self._autopilot.observe(report)

    # Called by Serve; what people call is in `people` -----------------------------------------------------------------

    async def check_health(self) -> None:
        """Raises when one of the watches has ended."""
        for watch in (self._watch, self._serve_watch, self._export_loop):
            if watch.done():
                raise RuntimeError(f"a watch of the controller ended: {watch.exception()!r}")

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def _times(self) -> Times:
        settings = self._live.membership
        return Times(settings.heartbeat_s, settings.lost_after_s, settings.drain_s)

    @property
    def _problem(self) -> str:
        plans, mesh = self._planner, self._mesh
        found = (plans.refusal, mesh.keeper.problem, mesh.conductor.problem, self._refused_settings, plans.problem)
        return next(filter(None, found), "")

    async def _until_routers_moved(self, timeout_s: float) -> list[str]:
        """Wait until every router is at this epoch; returns those that are not after `timeout_s`."""
        epoch, deadline_s = self._mesh.roster.epoch, time.monotonic() + timeout_s
        while True:
            behind = self._mesh.behind(epoch, time.monotonic())
            if not behind or time.monotonic() >= deadline_s:
                return behind
            await asyncio.sleep(0.02)

    def _plan_if_changed(self) -> None:
        if not self._refused_settings:
            self._planner.plan_if_changed()

    def _advance(self) -> None:
        self._mesh.advance(time.monotonic())
        self._announce()

    def _announce(self) -> None:
        """Wake those for whom there is news."""
        mesh, target = self._mesh, self._mesh.keeper.target
        self._history.note(target, mesh.conductor, time.time())
        self._events.note(mesh, time.time())
        epoch = mesh.roster.epoch if mesh.open else -1
        # Shards keep the newest target, so they hear of it at once.
        orders = (mesh.conductor.orders.last_version, -1 if target is None else target.version)
        if epoch != self._announced[0]:
            self._membership_news.announce()
        if orders != self._announced[1]:
            self._order_news.announce()
        self._announced = (epoch, orders)

    # Watching ---------------------------------------------------------------------------------------------------------

    async def _watch_mesh(self) -> None:
        while True:
            await asyncio.sleep(self._live.membership.heartbeat_s / 2)
            self._look(time.monotonic())

    async def _export_forever(self) -> None:
        while True:
            self._exporter.export(await self.status())
            await asyncio.sleep(EXPORT_S)

    def _look(self, now_s: float) -> None:
        settings = self._live.membership
        lag_s, self._looked_s = now_s - self._looked_s, now_s
        if lag_s > 2 * settings.heartbeat_s:
            # This process stood still and heartbeats may wait to be read: the silence was its own.
            logger.warning("the watch over shards stood still for %.1f s; none of them counts as silent", lag_s)
            self._mesh.roster.credit_pause(lag_s, now_s)
        for rank in self._mesh.expire(now_s):
            logger.warning("rank %d: no sign of life for %s s, taken out", rank, settings.lost_after_s)
        self._look_again()

    def _look_again(self) -> None:
        """Time has passed, or Serve has news."""
        now_s = time.monotonic()
        self._serve.settle(now_s)
        self._planner.plan_first(now_s)
        self._plan_if_changed()
        self._advance()
        self._autopilot.look()
