"""Serve's request router by expert signature.

Behind HAProxy it only names a router for a request, and hears nothing of the request afterwards. So it asks routers how
many they have while it chooses, and counts what it sent in between; no choice waits for an answer.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any

from ray.serve.request_router import ReplicaID, RequestRouter

from cluster.config.llm_sections import SignaturesSection
from cluster.signatures.chooser import Chooser
from cluster.signatures.messages import SignatureReport
from cluster.signatures.text import text_of

logger = logging.getLogger("ray.serve")

ASK_EVERY_S = 0.1
ANSWER_WITHIN_S = 1.0


class SignatureRouter(RequestRouter):
    """Routes to the router whose prompts take the same experts; by load for what it knows nothing of."""

    def initialize_state(self, **options: Any) -> None:
        """Called by Serve with the `request_router_kwargs`."""
        self._chooser = Chooser(SignaturesSection(**options), random.Random())
        self._asking: set[asyncio.Task[None]] = set()
        self._asked_s = 0.0
        self._ask_every_s = ASK_EVERY_S

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        """One list with the replica that gets the request."""
        if not candidate_replicas:
            return []
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._ask_loads()
        text = next(filter(None, map(text_of, pending_request.args if pending_request is not None else ())), "")
        return [[by_id[self._chooser.choose(text, list(by_id))]]]

    def update_replicas(self, replicas: list[Any]) -> None:
        """Called by Serve when replicas or their statistics changed."""
        super().update_replicas(replicas)
        self._chooser.keep([replica.replica_id.unique_id for replica in replicas])
        for replica in replicas:
            report = SignatureReport.from_stats(replica.routing_stats)
            if report is not None and self._chooser.learn(replica.replica_id.unique_id, report):
                logger.info("prompts of %d routers are grouped by their experts", len(replicas))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve before the replica is missing in `update_replicas`."""
        super().on_replica_actor_died(replica_id)
        self._chooser.keep([known.unique_id for known in self.curr_replicas])

    def _ask_loads(self) -> None:
        """Ask all replicas, in the background, if the last time is long enough ago and all have answered."""
        now_s = time.monotonic()
        if self._asking or now_s < self._asked_s + self._ask_every_s:
            return
        self._asked_s = now_s
        for replica in self.curr_replicas.values():
            task = asyncio.ensure_future(self._ask_load(replica))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask_load(self, replica: Any) -> None:
        name = replica.replica_id.unique_id
        self._chooser.loads.asked(name)
        try:
            count = await asyncio.wait_for(replica.get_queue_len(deadline_s=ANSWER_WITHIN_S), ANSWER_WITHIN_S)
        except Exception as error:  # it may be gone; Serve says so when it knows
            logger.debug("replica %s did not say how many requests it has: %r", name, error)
            return
        self._chooser.loads.answered(name, count)
