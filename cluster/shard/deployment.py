"""The Serve deployment of a shard: gets its rank, loads, serves, sends heartbeats, leaves.

`experts.shard.server.ShardServer`, which knows nothing of Ray, does the work; this is its way into a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from cluster.config.apps import ExpertsAppConfig
from cluster.config.parse import parse
from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.controller.messages import JoinRequest, RejoinRequest
from cluster.controller.roster import placement_digest
from cluster.ray_joints import node_address, replica_identity, show_data_plane_log
from experts.protocol.membership import ShardEndpoint
from experts.protocol.status import ShardStatus
from placement.placement import Placement

logger = logging.getLogger("ray.serve")


class ExpertShard:
    """One replica, one shard, one rank."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        self._config = parse(ExpertsAppConfig, config)
        self._identity = replica_identity()
        self._controller = ControllerClient(self._identity.app_name)
        self._epoch = 0
        self._fault: str | None = None
        show_data_plane_log()
        from experts.shard.server import ShardServer  # imports torch, which naming this class must not

        self._server = ShardServer(self._config.shard_settings(node_address()))
        self._heart: asyncio.Task[None] | None = None
        placement, self._rank = await self._join()
        self._digest = placement_digest(placement)
        self._heart = asyncio.create_task(self._heartbeat_forever())
        logger.info("rank %d: loading %s", self._rank, self._config.model.path)
        endpoint = await asyncio.to_thread(self._server.start, placement, self._rank, self._epoch)
        timeout_s = self._config.membership.join_timeout_s
        seated = await self._controller.ready(self._identity.replica_id, endpoint, timeout_s=timeout_s)
        # A controller that has just restarted does not know this shard; its rank may still be free.
        if not seated and not await self._rejoin(endpoint, timeout_s):
            raise RuntimeError(f"rank {self._rank} was given to another shard while this one loaded")

    async def status(self) -> ShardStatus:
        """See `ShardServer.status`."""
        return self._server.status()

    async def check_health(self) -> None:
        """Raises when this shard can no longer serve; Serve then restarts it, and the successor takes the rank."""
        if self._fault is not None:
            raise RuntimeError(self._fault)
        status = self._server.status()
        if not status.alive:
            raise RuntimeError("the shard's compute loop has ended")
        if status.fault is not None:
            raise RuntimeError(f"the shard computes nothing: {status.fault}")

    async def __del__(self) -> None:
        if self._heart is not None:
            self._heart.cancel()
            drain_s = self._config.membership.drain_s
            try:
                await self._controller.leave(self._identity.replica_id, timeout_s=drain_s + 1)
            except ControllerLostError as error:
                logger.info("stopping without leaving first: %s", error)
        self._server.stop()

    async def _join(self) -> tuple[Placement, int]:
        settings = self._config.membership
        deadline_s = time.monotonic() + settings.join_timeout_s
        while True:
            timeout_s = max(0.1, deadline_s - time.monotonic())
            answer = await self._controller.join(self._join_request(), timeout_s=timeout_s)
            if answer.rank is not None and answer.placement is not None:
                self._epoch = answer.epoch
                return answer.placement, answer.rank
            if time.monotonic() >= deadline_s:
                raise RuntimeError(f"no rank within {settings.join_timeout_s} s: {answer.reason}")
            await asyncio.sleep(settings.heartbeat_s / 2)

    async def _heartbeat_forever(self) -> None:
        settings = self._config.membership
        while self._fault is None:
            try:
                await self._heartbeat(timeout_s=settings.lost_after_s)
            except ControllerLostError as error:
                logger.warning("%s; this shard goes on serving", error)
            except Exception:
                logger.exception("a heartbeat failed; the next one follows")
            await asyncio.sleep(settings.heartbeat_s)

    async def _heartbeat(self, timeout_s: float) -> None:
        endpoint = self._server.endpoint
        status = None if endpoint is None else self._server.status()
        answer = await self._controller.heartbeat(self._identity.replica_id, status, timeout_s=timeout_s)
        if answer.known:
            self._epoch = max(self._epoch, answer.epoch)
            return
        if endpoint is None:
            # The controller restarted while this shard loads, so it asks for the same rank again. If another shard has
            # it by now, `ready` or `rejoin` settles that.
            await self._controller.join(self._join_request(self._rank), timeout_s=timeout_s, retry=False)
            return
        if not await self._rejoin(endpoint, timeout_s):
            self._fault = f"the controller has another shard or placement for rank {endpoint.rank}; restarting"

    def _join_request(self, loading: int | None = None) -> JoinRequest:
        identity = self._identity
        return JoinRequest(identity.replica_id, identity.node_id, identity.rank, loading)

    async def _rejoin(self, endpoint: ShardEndpoint, timeout_s: float) -> bool:
        """Tell a controller that does not know this shard where it serves. False: it cannot have the rank."""
        identity = self._identity
        request = RejoinRequest(
            shard_id=identity.replica_id,
            node_id=identity.node_id,
            endpoint=endpoint,
            epoch=self._epoch,
            placement_digest=self._digest,
            serve_rank=identity.rank,
        )
        return await self._controller.rejoin(request, timeout_s=timeout_s)
