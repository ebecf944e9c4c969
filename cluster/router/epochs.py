"""How a router follows the placement controller: the first membership, then each new epoch.

Applying an epoch runs inside the engine, between two steps, so new shards are connected ahead of it in the background.
"""

from __future__ import annotations

import asyncio
import logging
import time

from cluster.config.llm_sections import DeadlinesSection
from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.controller.messages import MembershipAnswer, MembershipRequest
from cluster.router.worker_calls import WorkerCalls
from experts.protocol.membership import AppliedMembership, Membership

logger = logging.getLogger("ray.serve")

LONG_POLL_S = 5.0
CONNECT_AHEAD_S = 3.0  # how long an epoch waits for a shard that is slow to connect; the engine goes on meanwhile


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
        applied = await self._apply(answer.term, answer.membership, wait_s=None)
        _check_accepted(applied)

    async def follow(self) -> None:
        """Apply epoch after epoch until cancelled; a failure is logged and the router goes on at its epoch.

        Raises RefusedError once no shard takes this router any more, which makes it unhealthy.
        """
        while True:
            try:
                answer = await self._poll()
                if answer.membership is not None:
                    await self._connect_ahead(answer.membership)
                    _check_accepted(await self._apply(answer.term, answer.membership, wait_s=0.0))
            except RefusedError:
                raise
            except ControllerLostError as error:
                logger.warning("%s; this router goes on at epoch %d", error, self.epoch)
                await asyncio.sleep(1.0)
            except Exception:
                logger.exception("epoch not applied; this router goes on at epoch %d", self.epoch)
                await asyncio.sleep(1.0)

    async def _poll(self) -> MembershipAnswer:
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
            wait_s=LONG_POLL_S,
        )
        return await self._controller.await_membership(request, timeout_s=LONG_POLL_S + 10)

    async def _connect_ahead(self, membership: Membership) -> None:
        """Connect to new shards while the engine goes on; those that take too long are left for the next epoch."""
        deadline_s = time.monotonic() + CONNECT_AHEAD_S
        while time.monotonic() < deadline_s:
            missing = await self._worker.connect_ahead(membership.endpoints)
            if not missing:
                return
            await asyncio.sleep(0.05)
        logger.warning("shards %s are still connecting; this router goes on without them", missing)

    async def _apply(self, term: str, membership: Membership, wait_s: float | None) -> AppliedMembership:
        connect_s = self._deadlines.connect_s if wait_s is None else wait_s
        applied = await self._worker.apply_membership(membership, wait_s, connect_s)
        self.term, self.epoch = term, membership.epoch
        self._incarnations = {
            endpoint.rank: endpoint.incarnation for endpoint in membership.endpoints if endpoint is not None
        }
        self.lost, self._refused = applied.lost, set(applied.refused)
        logger.info("epoch %d: connected to shards %s, without %s", self.epoch, applied.connected, applied.lost)
        return applied


class RefusedError(RuntimeError):
    """No shard takes this router; the message has their reasons."""


def _check_accepted(applied: AppliedMembership) -> None:
    """Raises RefusedError if no shard takes this router: unnoticed, it would compute all experts itself."""
    if applied.refusal is not None:
        raise RefusedError(applied.refusal)
