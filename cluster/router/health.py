"""Whether a router serves: readings of the worker's counters, and one token of the engine's if nothing else tells."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from cluster.http.health import GenerationHealth
from cluster.router.worker_calls import EngineSilentError, WorkerCalls
from experts.protocol.status import RouterStatus

logger = logging.getLogger("ray.serve")

WATCH_S = 1.0
MAX_MISSED_READINGS = 3  # in a row, of deadlines.apply_s each; after that the engine counts as dead


class RouterHealth:
    """Readings of one engine's worker. `answer_once` has the engine generate a token, or pool one; `on_reading` gets
    every reading."""

    def __init__(
        self,
        router_id: str,
        worker: WorkerCalls,
        answer_once: Callable[[], Awaitable[None]],
        on_reading: Callable[[RouterStatus], None],
    ) -> None:
        self._router_id = router_id
        self._worker = worker
        self._answer_once = answer_once
        self._on_reading = on_reading
        self._reading: asyncio.Task[RouterStatus] | None = None
        self._probe_lock = asyncio.Lock()
        self._missed_readings = 0
        self._has_generated = False

    def check(self) -> None:
        """Raises EngineSilentError when the worker has missed MAX_MISSED_READINGS in a row."""
        if self._missed_readings >= MAX_MISSED_READINGS:
            raise EngineSilentError(
                f"the engine's worker answered none of {self._missed_readings} readings of its counters, "
                f"{self._worker.timeout_s} s each"
            )

    async def watch(self, export: Callable[[RouterStatus], None]) -> None:
        """Read the counters every WATCH_S and hand them to `export`, until cancelled."""
        while True:
            try:
                export(await self.read())
            except EngineSilentError as error:
                self._missed_readings += 1
                logger.warning("%s", error)
            except Exception as error:
                logger.warning("the worker's counters were not read: %r", error)
            await asyncio.sleep(WATCH_S)

    async def read(self) -> RouterStatus:
        """A reading of the worker's counters, made now. Raises EngineSilentError."""
        status = await self._worker.status()
        self._missed_readings = 0
        self._has_generated = self._has_generated or status.last_success_age_s is not None
        self._on_reading(status)
        return status

    async def shared_reading(self) -> RouterStatus:
        """A reading that callers at the same time share, since each one comes between two of the engine's steps."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self.read())
        return await asyncio.shield(self._reading)

    async def ready(self, timeout_s: float) -> GenerationHealth:
        """As `generation_health`, but one token since the start is enough, however long ago."""
        if self._has_generated:
            return GenerationHealth(ok=True, router_id=self._router_id, reason="", how="recent token")
        return await self.generation_health(timeout_s, timeout_s)

    async def generation_health(self, within_s: float, timeout_s: float) -> GenerationHealth:
        """Whether answers come out of this router with their experts on shards.

        An answer of a shard in the last `within_s` proves it; without one, the engine is asked, within `timeout_s`.
        """
        health = GenerationHealth(ok=False, router_id=self._router_id, reason="", how="recent token")
        try:
            async with asyncio.timeout(timeout_s), self._probe_lock:
                status = await self.read()
                if not _recent(status, within_s):
                    health = replace(health, how="probe")
                    await self._answer_once()
                    status = await self.read()
        except TimeoutError:
            return replace(health, reason=f"the engine gave no answer within {timeout_s} s")
        except Exception as error:
            return replace(health, reason=f"{type(error).__name__}: {error}")
        ok = _recent(status, max(within_s, timeout_s))
        return replace(
            health,
            ok=ok,
            reason="" if ok else f"no shard answered; lost: {status.lost}",
            epoch=status.epoch,
            connected=status.connected,
            lost=status.lost,
        )


def _recent(status: RouterStatus, within_s: float) -> bool:
    age_s = status.last_success_age_s
    return bool(status.connected) and age_s is not None and age_s <= within_s
