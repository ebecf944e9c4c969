"""The ledger as a Serve deployment of one replica, and how routers and the console call it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.keys.leases import Settle
from cluster.keys.ledger import Ledger
from cluster.keys.messages import Answer, LedgerUsage, Report
from cluster.ray_joints import show_data_plane_log

KEY_LEDGER = "KeyLedger"


class KeyLedger:
    """Its clock is that of day when it starts, and steady from then on: one that is restarted goes on as the last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._ahead_s, self._clock = time.time() - clock(), clock
        self._ledger = Ledger(self._now_s())
        show_data_plane_log(role="keys")

    async def settle(self, report: Report) -> Answer:
        """One router's report."""
        return self._ledger.settle(report, self._now_s())

    async def usage(self) -> LedgerUsage:
        """What routers have said of usage."""
        return self._ledger.usage()

    def _now_s(self) -> float:
        return self._ahead_s + self._clock()


def settle_of(handle: DeploymentHandle) -> Settle:
    """How a router calls the ledger behind a handle."""

    async def settle(report: Report) -> Answer:
        answer: Answer = await handle.settle.remote(report)
        return answer

    return settle


async def usage_of(handle: Any, timeout_s: float) -> LedgerUsage:
    """What the ledger behind a handle knows. Raises whatever Serve raises, TimeoutError after `timeout_s`."""
    usage: LedgerUsage = await asyncio.wait_for(handle.usage.remote(), timeout_s)
    return usage
