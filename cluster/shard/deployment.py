"""The Serve deployment of a shard: gets its rank, loads, serves, carries out orders, hands on what it has, leaves.

`experts.shard.server.ShardServer`, which knows nothing of Ray, does the work; this is its way into a cluster.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.autoscaling.measure import ShardMeasure
from cluster.autoscaling.told import ScalingFacts
from cluster.config.apps import ExpertsAppConfig
from cluster.config.parse import parse
from cluster.controller.client import ControllerClient, ControllerGoneError, ControllerLostError
from cluster.mesh.messages import JoinAnswer, JoinRequest, RejoinRequest, ShardHolding, Told
from cluster.observability.exporter import EXPORT_S, Exporter
from cluster.observability.shard_series import SHARD_SERIES
from cluster.priority import lower_all_but_one
from cluster.ray_joints import node_address, replica_identity, show_data_plane_log
from cluster.shard.memory import shard_facts
from cluster.shard.orders import OrderFollower
from experts.checkpoint.errors import UnreachableError
from experts.protocol.log_lines import set_log_fields
from experts.protocol.membership import ShardEndpoint
from experts.protocol.status import ShardStatus

if TYPE_CHECKING:
    from experts.shard.server import ShardServer

logger = logging.getLogger("ray.serve")

STOP_MARGIN_S = 5.0  # of the time that Serve gives a stopping replica, for what comes after handing on
ASK_AGAIN_S = 0.5  # a shard that waits for its rank


class ExpertShard:
    """One replica, one shard, one rank."""

    async def __init__(self, config: dict[str, Any], stop_timeout_s: float) -> None:  # type: ignore[misc]
        """`stop_timeout_s`: how long Serve lets this replica stop."""
        self._config = parse(ExpertsAppConfig, config)
        self._stop_timeout_s = stop_timeout_s
        self._identity = replica_identity()
        self._controller = ControllerClient(self._identity.app_name)
        self._epoch = 0
        self._fault: str | None = None
        self._stopping = False
        self._controller_gone = asyncio.Event()
        self._told = Told()
        self._scaling: ScalingFacts | None = None
        self._scaling_s = 0.0  # when they were told, on the clock that replicas share
        self._measure, self._exporter = ShardMeasure(), Exporter(SHARD_SERIES)
        self._tasks: list[asyncio.Task[None]] = []
        show_data_plane_log(role="shard")
        serving = lower_all_but_one()  # only what `listen` starts computes; imports and copies can wait
        server_class = await asyncio.to_thread(_import_server)
        answer = await self._join()
        assert answer.rank is not None
        assert answer.placement is not None
        self._rank, self._times = answer.rank, answer.times
        set_log_fields(rank=lambda: self._rank, epoch=lambda: self._epoch)
        settings = self._config.shard_settings(node_address(), answer.num_slots)
        self._secret = await self._controller.mesh_secret(None, timeout_s=self._config.shards.join_timeout_s)
        self._server = server_class(settings, self._secret)
        num_experts = answer.placement.num_experts
        self._orders = OrderFollower(self._identity.replica_id, num_experts, self._server, self._controller)
        self._tasks.append(asyncio.create_task(self._heartbeat_forever(), name="heartbeat"))
        logger.info(
            "rank %d: starting with %d experts of %s",
            self._rank, int((answer.placement.physical_to_logical_map >= 0).sum()), self._config.model.path,
        )  # fmt: skip
        try:
            load = functools.partial(self._server.load, load_LE=answer.load_LE)
            await asyncio.to_thread(load, answer.placement, self._rank)
            loop = asyncio.get_running_loop()
            endpoint = await loop.run_in_executor(serving, self._server.listen, self._rank, self._epoch)
        except ValueError as error:
            if not isinstance(error, UnreachableError):
                await self._tell_problem(" ".join(str(error).split()))
            raise
        serving.shutdown(wait=False)
        timeout_s = self._config.shards.join_timeout_s
        seated = await self._controller.ready(self._holding(endpoint), timeout_s=timeout_s)
        # A controller that has just restarted does not know this shard.
        if not seated and not await self._rejoin(endpoint, timeout_s):
            raise RuntimeError("the controller is of another model")
        self._tasks.append(asyncio.create_task(self._orders.follow(), name="orders"))
        self._tasks.append(asyncio.create_task(self._export_forever(), name="metrics"))

    async def status(self) -> ShardStatus:
        """See `ShardServer.status`."""
        return self._server.status()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaler hands to the policy `cluster.autoscaling.policies:shards`."""
        now_s = time.monotonic()
        return self._measure.stats(self._server.status(), self._scaling, now_s, self._scaling_s)

    async def check_health(self) -> None:
        """Raises when this shard can no longer serve; Serve then restarts it, and the successor takes the rank."""
        if self._fault is not None:
            raise RuntimeError(self._fault)
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"{task.get_name()} of this shard ended: {task.exception()!r}")
        status = self._server.status()
        if not status.alive:
            raise RuntimeError("the shard's compute loop has ended")
        if status.fault is not None:
            raise RuntimeError(f"the shard computes nothing: {status.fault}")

    async def __del__(self) -> None:
        """Serve stops this replica: hand on what only it has, and answer until no router uses it."""
        if self._tasks:
            self._stopping = True
            await self._leave(timeout_s=max(self._stop_timeout_s - STOP_MARGIN_S, 1.0))
            for task in self._tasks:
                task.cancel()
            self._orders.cancel()
        if hasattr(self, "_server"):
            self._server.stop()

    async def _leave(self, timeout_s: float) -> None:
        """Ask the controller for leave, unless the whole application stops and the controller is gone first.

        Serve keeps a call that waits for a deployment which is deleted meanwhile; what is called later fails at once.
        So heartbeats, which go on, say when to wait no longer.
        """
        leave = asyncio.ensure_future(self._controller.leave(self._identity.replica_id, timeout_s=timeout_s))
        gone = asyncio.ensure_future(self._controller_gone.wait())
        await asyncio.wait((leave, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not leave.done():
            leave.cancel()
            logger.info("stopping without leaving first: the placement controller is gone")
            return
        try:
            await leave
        except ControllerLostError as error:
            logger.info("stopping without leaving first: %s", error)

    async def _tell_problem(self, problem: str) -> None:
        """The successor would end likewise: the controller's status says so, and who follows the start gives up."""
        request = replace(self._join_request(), problem=problem)
        try:
            await self._controller.join(request, timeout_s=self._times.lost_after_s, retry=False)
        except ControllerLostError as error:
            logger.warning("%s; the reason of this shard's end is in its log alone", error)

    async def _join(self) -> JoinAnswer:
        join_timeout_s = self._config.shards.join_timeout_s
        deadline_s = time.monotonic() + join_timeout_s
        while True:
            timeout_s = max(0.1, deadline_s - time.monotonic())
            answer = await self._controller.join(self._join_request(), timeout_s=timeout_s)
            if answer.rank is not None:
                self._epoch = answer.epoch
                return answer
            if answer.refused:
                raise RuntimeError(answer.reason)
            if time.monotonic() >= deadline_s:
                raise RuntimeError(f"no rank within {join_timeout_s} s: {answer.reason}")
            await asyncio.sleep(ASK_AGAIN_S)

    async def _heartbeat_forever(self) -> None:
        while self._fault is None:
            try:
                await self._heartbeat(timeout_s=self._times.lost_after_s)
                self._controller_gone.clear()
            except ControllerLostError as error:
                if isinstance(error, ControllerGoneError):
                    self._controller_gone.set()
                if not self._stopping:
                    logger.warning("%s; this shard goes on serving", error)
            except Exception:
                logger.exception("a heartbeat failed; the next one follows")
            await asyncio.sleep(self._times.heartbeat_s)
        await asyncio.Event().wait()  # `check_health` tells

    async def _export_forever(self) -> None:
        while True:
            self._exporter.export(shard_facts(self._server.status()))
            await asyncio.sleep(EXPORT_S)

    async def _heartbeat(self, timeout_s: float) -> None:
        endpoint = self._server.endpoint
        status = None if endpoint is None else self._server.status()
        answer = await self._controller.heartbeat(self._identity.replica_id, status, timeout_s=timeout_s)
        self._times = answer.times
        if answer.known:
            self._epoch = max(self._epoch, answer.epoch)
            self._told = answer.told
            self._scaling, self._scaling_s = answer.scaling, time.time()
            return
        if endpoint is None:
            # The controller restarted while this shard starts, so it asks for the same rank again. `rejoin` settles it
            # if another shard has that by now.
            await self._agree_on_secret(timeout_s)
            await self._controller.join(self._join_request(self._rank), timeout_s=timeout_s, retry=False)
            return
        if not await self._rejoin(endpoint, timeout_s):
            self._fault = "the controller is of another model; restarting"

    def _join_request(self, loading: int | None = None) -> JoinRequest:
        identity = self._identity
        return JoinRequest(identity.replica_id, identity.node_id, identity.rank, loading)

    def _holding(self, endpoint: ShardEndpoint) -> ShardHolding:
        identity, server = self._identity, self._server
        return ShardHolding(
            shard_id=identity.replica_id,
            node_id=identity.node_id,
            serve_rank=identity.rank,
            endpoint=endpoint,
            num_slots=server.held_Ls().shape[1],
            expert_bytes=server.expert_bytes,
            held_LE=self._orders.held_LE(),
        )

    async def _agree_on_secret(self, timeout_s: float) -> None:
        """A restarted controller learns the mesh's secret from its shards, or has them take on another."""
        self._secret = await self._controller.mesh_secret(self._secret, timeout_s=timeout_s)
        self._server.use_secret(self._secret)

    async def _rejoin(self, endpoint: ShardEndpoint, timeout_s: float) -> bool:
        """Tell a controller that does not know this shard where it serves. False: it must restart."""
        await self._agree_on_secret(timeout_s)
        request = RejoinRequest(self._holding(endpoint), self._epoch, self._orders.target, self._stopping, self._told)
        rank = await self._controller.rejoin(request, timeout_s=timeout_s)
        if rank is not None and rank != endpoint.rank:
            logger.info("rank %d: now rank %d, since another shard has that one", endpoint.rank, rank)
            self._rank, self._server.endpoint = rank, replace(endpoint, rank=rank)
        return rank is not None


def _import_server() -> type[ShardServer]:
    from experts.shard.server import ShardServer  # imports torch, which naming ExpertShard must not

    return ShardServer
