"""How shards, routers and the console call the placement controller: by name, with time-outs, through its restarts."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError

from cluster.autopilot.messages import Decision, ObservationReport, ObservationWish
from cluster.autoscaling.told import Pace, ScalingFacts
from cluster.config.deployments import CONTROLLER
from cluster.config.parse import ConfigError
from cluster.mesh.messages import (
    ControllerStatus,
    CopyReport,
    HeartbeatAnswer,
    HistoryEntry,
    JoinAnswer,
    JoinRequest,
    MembershipAnswer,
    MembershipNews,
    MembershipRequest,
    OrderAnswer,
    OrderRequest,
    PlacementView,
    PlanView,
    RejoinRequest,
    ShardHolding,
    WatchView,
)
from cluster.ray_joints import deployment_handle
from experts.protocol.membership import Membership
from experts.protocol.secret import MeshSecret
from experts.protocol.status import ShardStatus
from placement.placement import Placement

ROUTER = "Router"
ASK_AGAIN_S = 0.5  # a restarted controller that does not know the mesh yet

logger = logging.getLogger("ray.serve")


class ControllerLostError(RuntimeError):
    """The placement controller did not answer; the message says what was asked and how long it was waited for."""


class ControllerGoneError(ControllerLostError):
    """Serve has deleted the controller's deployment, or given it up: nobody will answer, and nobody restarts it."""


class ControllerClient:
    """The methods of one application's `PlacementController`, which documents them.

    Each raises ControllerLostError if there is no answer within `timeout_s`.
    """

    def __init__(self, app_name: str) -> None:
        if not app_name:
            raise ConfigError("the application of shards has no name")
        self.app_name = app_name
        self._handle = deployment_handle(CONTROLLER, app_name)
        self._memberships: dict[tuple[str, int], Membership] = {}  # by term and epoch: the last ones that came

    async def join(self, request: JoinRequest, *, timeout_s: float, retry: bool = True) -> JoinAnswer:
        """`retry`: also through a restart of the controller."""
        call = self.call_with_retry if retry else self.call
        return await call("join", request, timeout_s=timeout_s)

    async def ready(self, holding: ShardHolding, *, timeout_s: float) -> bool:
        """Asks again while the controller restarts."""
        return await self.call_with_retry("ready", holding, timeout_s=timeout_s)

    async def rejoin(self, request: RejoinRequest, *, timeout_s: float) -> int | None:
        """Asks again while the controller restarts."""
        return await self.call_with_retry("rejoin", request, timeout_s=timeout_s)

    async def heartbeat(self, shard_id: str, status: ShardStatus | None, *, timeout_s: float) -> HeartbeatAnswer:
        return await self.call("heartbeat", shard_id, status, timeout_s=timeout_s)

    async def await_order(self, request: OrderRequest, *, timeout_s: float) -> OrderAnswer:
        return await self.call("await_order", request, timeout_s=timeout_s)

    async def report(self, report: CopyReport, *, timeout_s: float) -> bool:
        return await self.call("report", report, timeout_s=timeout_s)

    async def leave(self, shard_id: str, *, timeout_s: float) -> bool:
        """Returns when the others have taken over, at the latest after `timeout_s`."""
        return await self.call("leave", shard_id, timeout_s, timeout_s=timeout_s + 2)

    async def await_membership(self, request: MembershipRequest, *, timeout_s: float) -> MembershipAnswer:
        """Epochs travel as differences to the one that the router is at."""
        at = request.term, request.epoch
        known = self._memberships.get(at)
        if known is None and request.epoch >= 0:
            request = replace(request, whole=True)
        news: MembershipNews = await self.call("await_membership", request, timeout_s=timeout_s)
        if news.told is None:
            return MembershipAnswer(news.term, None, news.waiting_for)
        membership = Membership.from_bytes(news.told, known)
        kept = {} if known is None else {at: known}
        self._memberships = {**kept, (news.term, membership.epoch): membership}
        return MembershipAnswer(news.term, membership, news.waiting_for)

    async def mesh_secret(self, held: MeshSecret | None, *, timeout_s: float) -> MeshSecret:
        """What to prove oneself by, given what the caller did so far; asks again until the controller knows it."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            left_s = max(deadline_s - time.monotonic(), 0.1)
            secret: MeshSecret | None = await self.call_with_retry("mesh_secret", held, timeout_s=left_s)
            if secret is not None:
                return secret
            if time.monotonic() >= deadline_s:
                raise ControllerLostError(f"the placement controller knew no secret of the mesh within {timeout_s} s")
            await asyncio.sleep(ASK_AGAIN_S)

    async def report_pace(self, router_id: str, pace: Pace, *, timeout_s: float) -> ScalingFacts:
        return await self.call("report_pace", router_id, pace, timeout_s=timeout_s)

    async def observe(self, report: ObservationReport, *, timeout_s: float) -> ObservationWish:
        return await self.call("observe", report, timeout_s=timeout_s)

    async def deregister_router(self, router_id: str, *, timeout_s: float) -> None:
        await self.call("deregister_router", router_id, timeout_s=timeout_s)

    async def status(self, *, timeout_s: float) -> ControllerStatus:
        return await self.call("status", timeout_s=timeout_s)

    async def placement(self, *, timeout_s: float) -> PlacementView:
        return await self.call("placement", timeout_s=timeout_s)

    async def watch(self, term: str, epoch: int, *, timeout_s: float) -> WatchView:
        return await self.call("watch", term, epoch, timeout_s=timeout_s)

    async def apply(self, placement: Placement, dry_run: bool, *, timeout_s: float) -> PlanView:
        return await self.call("apply", placement, dry_run, timeout_s=timeout_s)

    async def drain(self, rank: int, back: bool, *, timeout_s: float) -> str:
        return await self.call("drain", rank, back, timeout_s=timeout_s)

    async def pause(self, paused: bool, *, timeout_s: float) -> None:
        await self.call("pause", paused, timeout_s=timeout_s)

    async def history(self, *, timeout_s: float) -> list[HistoryEntry]:
        return await self.call("history", timeout_s=timeout_s)

    async def decisions(self, *, timeout_s: float) -> list[Decision]:
        return await self.call("decisions", timeout_s=timeout_s)

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call once. ControllerLostError after `timeout_s`, or if the controller dies or raises meanwhile."""
        response = getattr(self._handle, method).remote(*args)
        try:
            return await asyncio.wait_for(response, timeout_s)
        except TimeoutError:
            raise ControllerLostError(
                f"the placement controller of application {self.app_name!r} did not answer {method} in {timeout_s} s"
            ) from None
        except DeploymentUnavailableError as error:
            raise ControllerGoneError(
                f"{method} reaches nobody: application {self.app_name!r} has no placement controller any more"
            ) from error
        except Exception as error:
            raise ControllerLostError(
                f"{method} of the placement controller of application {self.app_name!r} failed: {error!r}"
            ) from error

    async def call_with_retry(self, method: str, *args: Any, timeout_s: float, pause_s: float = 0.5) -> Any:
        """Call until it answers, through the controller's restarts; ControllerLostError after `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while True:
            try:
                return await self.call(method, *args, timeout_s=max(0.1, deadline_s - loop.time()))
            except ControllerLostError as error:
                if loop.time() + pause_s >= deadline_s:
                    raise
                logger.warning("%s; asking again", error)
                await asyncio.sleep(pause_s)
