"""How a router follows the placement controller: the first membership, then each new epoch.

The engine's worker prepares an epoch beside its steps: it reads it, connects to new shards and builds tables. What is
left to do between two steps takes microseconds. While experts move, epochs follow one another several times a second:
the controller hears of each one that is in use at once, and one that is overtaken while it is prepared is left out.
"""

from __future__ import annotations

import asyncio
import logging
import time

from cluster.config.llm_sections import DeadlinesSection
from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.mesh.messages import MembershipAnswer, MembershipRequest
from cluster.router.worker_calls import WorkerCalls
from experts.protocol.membership import AppliedMembership, Membership, Preparation
from experts.protocol.secret import MeshSecret

logger = logging.getLogger("ray.serve")

LONG_POLL_S = 5.0
CONNECT_AHEAD_S = 3.0  # how long an epoch waits for a shard that is slow to connect; the engine goes on meanwhile
LOOK_AGAIN_S = 0.25  # how often such a wait asks the controller for a newer epoch


class EpochFollower:
    """The epoch of one router, and the loop that moves it."""

    def __init__(
        self, router_id: str, controller: ControllerClient, worker: WorkerCalls, deadlines: DeadlinesSection
    ) -> None:
        self._router_id = router_id
        self._controller = controller
        self._worker = worker
        self._deadlines = deadlines
        self._incarnations: dict[int, str] = {}  # of the epoch's shards, by rank
        self._refused: set[int] = set()  # ranks whose shards refuse this router
        self._membership: Membership | None = None  # in use
        self._secret: MeshSecret | None = None
        self.term, self.epoch = "", -1
        self.lost: dict[int, str] = {}  # why there is no link, by rank, as last heard from the worker

    async def first_membership(self) -> MembershipAnswer:
        """The first membership there is. RuntimeError after deadlines.membership_s, naming the missing ranks."""
        timeout_s = self._deadlines.membership_s
        deadline_s = time.monotonic() + timeout_s
        missing: list[int] | None = None
        while time.monotonic() < deadline_s:
            try:
                answer = await self._poll()
            except ControllerLostError as error:
                logger.warning("%s; asking again", error)
                await asyncio.sleep(0.5)
                continue
            if answer.membership is not None:
                return answer
            if answer.waiting_for != missing:
                missing = answer.waiting_for
                logger.info("waiting for shards of ranks %s", missing)
        named = "all" if missing is None else missing
        raise RuntimeError(f"no complete membership within {timeout_s} s; missing ranks: {named}")

    async def apply_first(self, answer: MembershipAnswer) -> None:
        """Apply the first membership, waiting for connections. RefusedError if no shard takes this router."""
        assert answer.membership is not None, "a first membership is one"
        applied = await self._move_to(answer, connect_s=None)
        if applied.refusal is not None:
            raise RefusedError(applied.refusal)

    async def follow(self) -> None:
        """Apply epoch after epoch until cancelled; a failure is logged and the router goes on at its epoch.

        Raises RefusedError once the shards of all ranks refuse this router, which makes it unhealthy. While shards that
        took it are merely away, it computes what they held.
        """
        while True:
            try:
                answer = await self._poll()
                if answer.membership is not None:
                    applied = await self._move_to(answer, CONNECT_AHEAD_S)
                    if applied.refused_by_all:
                        raise RefusedError(applied.refusal)
            except RefusedError:
                raise
            except ControllerLostError as error:
                logger.warning("%s; this router goes on at epoch %d", error, self.epoch)
                await asyncio.sleep(1.0)
            except Exception:
                logger.exception("epoch not applied; this router goes on at epoch %d", self.epoch)
                await asyncio.sleep(1.0)

    async def _poll(self, wait_s: float = LONG_POLL_S) -> MembershipAnswer:
        request = MembershipRequest(
            router_id=self._router_id,
            term=self.term,
            epoch=self.epoch,
            # A shard that refuses this router is not lost: others have it, and the controller must not take it out.
            lost={
                rank: self._incarnations[rank]
                for rank in self.lost
                if rank in self._incarnations and rank not in self._refused
            },
            wait_s=wait_s,
        )
        return await self._controller.await_membership(request, timeout_s=wait_s + 10)

    async def _move_to(self, answer: MembershipAnswer, connect_s: float | None) -> AppliedMembership:
        """Have the worker prepare and use an epoch, or a newer one that is there by the time it is ready.

        New shards may take `connect_s` to answer; None: deadlines.connect_s, as the worker knows it.
        """
        if answer.term != self.term:
            await self._agree_on_secret()
        answer = await self._prepare(answer, connect_s)
        assert answer.membership is not None, "what is prepared is a membership"
        applied = await self._worker.apply(answer.membership.epoch)
        membership = self._membership = answer.membership
        self.term, self.epoch = answer.term, membership.epoch
        self._incarnations = {
            endpoint.rank: endpoint.incarnation for endpoint in membership.endpoints if endpoint is not None
        }
        self.lost, self._refused = applied.lost, set(applied.refused)
        logger.info("epoch %d: connected to shards %s, without %s", self.epoch, applied.connected, applied.lost)
        return applied

    async def _agree_on_secret(self) -> None:
        """A restarted controller learns the mesh's secret from its routers, or has them take on another."""
        secret = await self._controller.mesh_secret(self._secret, timeout_s=self._deadlines.connect_s)
        if secret != self._secret:
            await self._worker.use_secret(secret)
            self._secret = secret

    async def _prepare(self, answer: MembershipAnswer, connect_s: float | None) -> MembershipAnswer:
        """The answer whose membership is ready. RuntimeError with the worker's reason if none will be."""
        limit_s = (self._deadlines.connect_s if connect_s is None else connect_s) + self._worker.timeout_s
        deadline_s = time.monotonic() + limit_s
        look_s = time.monotonic() + LOOK_AGAIN_S
        state = await self._begin(answer, connect_s)
        pause_s = 0.001
        while not state.ready:
            epoch = state.epoch
            if state.needs_whole and self._membership is not None:
                self._membership = None  # the worker has another one, or none
                state = await self._begin(answer, connect_s)
                continue
            if state.error:
                raise RuntimeError(f"the worker cannot use epoch {epoch}: {state.error}")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the worker did not get epoch {epoch} ready in {limit_s} s: {state}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
            if state.connecting and time.monotonic() > look_s:
                newer = await self._newer_than(epoch)
                look_s = time.monotonic() + LOOK_AGAIN_S
                if newer is not None:
                    answer = newer
                    state = await self._begin(answer, connect_s)
                    continue
            state = await self._worker.preparation()
        return answer

    async def _begin(self, answer: MembershipAnswer, connect_s: float | None) -> Preparation:
        membership = answer.membership
        assert membership is not None, "what is prepared is a membership"
        return await self._worker.prepare(membership.delta_from(self._membership), connect_s)

    async def _newer_than(self, epoch: int) -> MembershipAnswer | None:
        try:
            answer = await self._poll(wait_s=0.0)
        except ControllerLostError:
            return None
        return answer if answer.membership is not None and answer.membership.epoch > epoch else None


class RefusedError(RuntimeError):
    """No shard takes this router; the message has their reasons."""
