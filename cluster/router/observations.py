"""How a router tells the controller what it saw of its traffic: again and again, as the controller wants it."""

from __future__ import annotations

import asyncio
import logging
import zlib

from cluster.autopilot.messages import ObservationReport, ObservationWish
from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.router.worker_calls import EngineSilentError, WorkerCalls

logger = logging.getLogger("ray.serve")

CALL_TIMEOUT_S = 10.0
ASK_AGAIN_S = 5.0  # after a failure
PACKED_FAST = 1  # level of zlib: ids and counts shrink to half, and higher levels gain little


async def report_observations(router_id: str, controller: ControllerClient, worker: WorkerCalls) -> None:
    """Report until cancelled. A report that was not answered is sent again, under its number, before there is another.

    While nothing is wanted, the worker counts nothing and the controller is only asked whether that has changed.
    """
    number, packed, observing = 1, b"", False
    while True:
        try:
            wish: ObservationWish = await controller.observe(
                ObservationReport(router_id, number, packed), timeout_s=CALL_TIMEOUT_S
            )
            number, packed = number + 1, b""
            if wish.wanted != observing:
                await worker.observation(go_on=wish.wanted)
                observing = wish.wanted
            await asyncio.sleep(wish.period_s)
            if observing and (told := await worker.observation(go_on=True)):
                packed = await asyncio.to_thread(_packed, told)
        except (ControllerLostError, EngineSilentError) as error:
            logger.info("%s; reporting again", error)
            await asyncio.sleep(ASK_AGAIN_S)
        except Exception as error:  # of a controller of another version, for instance: a router serves without it
            logger.warning("nothing was reported: %r", error)
            await asyncio.sleep(ASK_AGAIN_S)


def _packed(told: bytes) -> bytes:
    """The same observation, smaller: the worker has no time for that between two steps."""
    return zlib.compress(zlib.decompress(told), PACKED_FAST)
