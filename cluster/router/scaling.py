"""A router's part in how many routers and shards there are: it tells the controller its pace, and Serve its load."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from cluster.autoscaling.measure import EngineMeasure
from cluster.autoscaling.told import ScalingFacts
from cluster.controller.client import ControllerClient, ControllerLostError
from experts.protocol.status import RouterStatus

logger = logging.getLogger("ray.serve")

TELL_S = 2.0


class RouterScaling:
    """The statistics of one router. `reading` gives the worker's counters."""

    def __init__(
        self, router_id: str, controller: ControllerClient, reading: Callable[[], Awaitable[RouterStatus]]
    ) -> None:
        self.measure = EngineMeasure()
        self._router_id = router_id
        self._controller = controller
        self._reading = reading
        self._facts: ScalingFacts | None = None
        self._told_s = 0.0

    async def follow(self) -> None:
        """Tell the controller the pace every TELL_S, until cancelled; what it answers goes into the statistics."""
        while True:
            try:
                pace = self.measure.pace(await self._reading(), time.monotonic())
                self._facts = await self._controller.report_pace(self._router_id, pace, timeout_s=TELL_S)
                self._told_s = time.time()
            except ControllerLostError as error:
                logger.info("%s; the pace is told later", error)
            except Exception as error:
                logger.warning("the pace was not told: %r", error)
            await asyncio.sleep(TELL_S)

    def stats(self) -> dict[str, float]:
        """See `EngineMeasure.stats`."""
        return self.measure.stats(self._facts, time.monotonic(), self._told_s)
