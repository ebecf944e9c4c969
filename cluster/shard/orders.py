"""How a shard follows the controller's orders: it asks, frees slots, copies, reports, and asks again."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import numpy as np

from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.mesh.messages import CopyReport, OrderRequest, ShardOrder
from experts.protocol.orders import CopyResult

logger = logging.getLogger("ray.serve")

LONG_POLL_S = 5.0
REPORT_EVERY_S = 0.5  # while copies are made; when they are done, the next question says so at once
PAUSE_S = 0.5  # after a controller that does not answer, or does not know this shard


class OrderFollower:
    """The orders of one shard. `server` is a `ShardServer` that has started."""

    def __init__(self, shard_id: str, num_experts: int, server: Any, controller: ControllerClient) -> None:
        self.target: dict[str, Any] | None = None
        """The newest target that the controller told of, kept for its next life."""
        self._shard_id = shard_id
        self._num_experts = num_experts  # of a layer
        self._server = server
        self._controller = controller
        self._term, self._version = "", -1
        self._results: list[CopyResult] = []
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._owes_report = False  # of what an order changed

    async def follow(self) -> None:
        """Carry out order after order until cancelled; a failure is logged and the next one follows."""
        while True:
            try:
                await self._next()
            except ControllerLostError as error:
                logger.warning("%s; this shard goes on serving", error)
                await asyncio.sleep(PAUSE_S)
            except Exception:
                logger.exception("an order failed; what this shard holds is reported")
                await asyncio.sleep(PAUSE_S)

    def cancel(self) -> None:
        """End the copies at hand, since the shard stops."""
        self._cancelled.set()

    def held_LE(self) -> np.ndarray:
        """bool [L, E]: the experts that this shard answers for."""
        held_Ls = self._server.held_Ls()
        held_LE = np.zeros((held_Ls.shape[0], self._num_experts), np.bool_)
        layer_N, slot_N = np.nonzero(held_Ls >= 0)
        held_LE[layer_N, held_Ls[layer_N, slot_N]] = True
        return held_LE

    async def _next(self) -> None:
        """Ask for an order and carry it out. The question tells what came of the one before, which saves a call."""
        report = self._report() if self._owes_report else None
        target_version = -1 if self.target is None else int(self.target["version"])
        request = OrderRequest(self._shard_id, self._term, self._version, target_version, LONG_POLL_S, report)
        answer = await self._controller.await_order(request, timeout_s=LONG_POLL_S + 10)
        if report is not None:
            self._told(report)
            self._owes_report = False
        if not answer.known:
            await asyncio.sleep(PAUSE_S)  # the next heartbeat rejoins
            return
        if answer.term != self._term:  # another life of the controller, which numbers its orders anew
            self._term, self._version = answer.term, -1
        if answer.target is not None:
            self.target = answer.target
        if answer.order is not None:
            self._version = answer.order.version
            self._owes_report = True
            await self._carry_out(answer.order)

    async def _carry_out(self, order: ShardOrder) -> None:
        server = self._server
        if order.release:
            await asyncio.to_thread(server.release, order.release)
        if order.copy:
            copying = asyncio.create_task(
                asyncio.to_thread(
                    server.copy,
                    order.copy,
                    self._done,
                    max_bytes_per_s=order.max_bytes_per_s,
                    cancelled=self._cancelled.is_set,
                )
            )
            while not copying.done():
                await asyncio.wait([copying], timeout=REPORT_EVERY_S)
                if self._results and not copying.done():
                    await self._tell_progress()
            await copying

    def _done(self, result: CopyResult) -> None:
        """Called by the copying thread."""
        with self._lock:
            self._results.append(result)

    async def _tell_progress(self) -> None:
        report = self._report()
        try:
            await self._controller.report(report, timeout_s=LONG_POLL_S)
        except ControllerLostError as error:
            logger.warning("%s; the report follows", error)
        else:
            self._told(report)

    def _report(self) -> CopyReport:
        with self._lock:
            return CopyReport(self._shard_id, self.held_LE(), tuple(self._results))

    def _told(self, report: CopyReport) -> None:
        """Results that the controller did not get are kept for the next time."""
        with self._lock:
            del self._results[: len(report.results)]
