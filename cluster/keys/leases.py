"""How a router keeps to the limits of keys: from what the ledger lets it have in advance, and by its share without it.

One call to the ledger is under way at a time. It carries what all waiting requests need; others do not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from cluster.keys.accounts import Accounts, Charge, Standing
from cluster.keys.keyring import Key
from cluster.keys.messages import Answer, Grant, Report, Totals

CALL_TIMEOUT_S = 0.5
WAIT_S = 1.0  # longest wait of a request: for the call under way, and for its own
BEAT_S = 1.0  # between calls when nobody waits; the ledger counts on it (YOUNG_S, GONE_S)
ATTEMPTS = 3

logger = logging.getLogger("ray.serve")
Settle = Callable[[Report], Awaitable[Answer]]


@dataclass(frozen=True)
class Refusal:
    """A request over a limit, and in how many seconds it may come again: as `Grant.retry_s`."""

    retry_s: tuple[float, float, float]


@dataclass
class _Waiter:
    tokens: int
    granted: asyncio.Future[Grant | None]  # None: the ledger did not answer


@dataclass(frozen=True)
class RouterKeys:
    """What one router says of its keys."""

    router_id: str
    usage: dict[str, Totals]
    limits_by: str  # leases, or shares while the ledger is away, or nothing
    problem: str  # why the list of keys in use is not that of the file; empty if it is


@dataclass
class Leases:
    """`settle` calls the ledger; None: there is none, and no limits hold."""

    router_id: str
    settle: Settle | None
    clock: Callable[[], float] = time.monotonic
    usage: dict[str, Totals] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._accounts = Accounts(time.time() - self.clock())
        self._waiting: dict[str, list[_Waiter]] = {}
        self._wake = asyncio.Event()
        self._sequence = 0
        self._told_s = 0.0
        self._away = False
        self._loop: asyncio.Task[None] | None = None

    @property
    def limits_by(self) -> str:
        """What keeps the limits at present."""
        return "nothing" if self.settle is None else "shares" if self._accounts.by_share else "leases"

    def start(self) -> None:
        """Begin to talk with the ledger, in the running event loop."""
        if self.settle is not None and self._loop is None:
            self._loop = asyncio.create_task(self._talk(), name="key leases")

    async def admit(self, key: Key, tokens: int) -> Charge | Refusal:
        """Let a request in that may take so many tokens. Waits at most WAIT_S."""
        charge = self._accounts.take(key, tokens, self.clock())
        if charge is not None:
            return charge
        deadline_s = self.clock() + WAIT_S
        for _ in range(ATTEMPTS):
            if self._accounts.by_share:
                return self._refusal(key, tokens)
            grant = await self._ask(key, tokens, deadline_s - self.clock())
            if grant is None:
                break
            if (charge := self._accounts.take(key, tokens, self.clock())) is not None:
                return charge
            if any(grant.retry_s):
                return Refusal(grant.retry_s)
        return self._accounts.take(key, tokens, self.clock(), by_share=True) or self._refusal(key, tokens)

    def finish(self, charge: Charge, tokens: int | None) -> None:
        """A request that was let in has ended after so many tokens; None if that is not known."""
        if self._accounts.finish(charge, tokens, self.clock()):
            self._wake.set()

    def count(self, name: str, totals: Totals) -> None:
        """Add to the usage of a key."""
        self.usage[name] = self.usage.get(name, Totals()) + totals

    def standing(self, key: Key) -> Standing:
        """What a client is told of its limits."""
        return self._accounts.standing(key, self.clock())

    async def close(self) -> None:
        """Tell the ledger the last figures; at most CALL_TIMEOUT_S."""
        if self._loop is None:
            return
        self._loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._loop
        self._told_s = 0.0
        await self._call()

    def _refusal(self, key: Key, tokens: int) -> Refusal:
        return Refusal(self._accounts.retry_s(key, tokens, self.clock()))

    async def _ask(self, key: Key, tokens: int, wait_s: float) -> Grant | None:
        """What the ledger says to a request; None if it does not answer in time."""
        waiter = _Waiter(tokens, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(key.name, []).append(waiter)
        self._wake.set()
        self.start()
        try:
            return await asyncio.wait_for(waiter.granted, wait_s)
        except TimeoutError:
            return None

    async def _talk(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), BEAT_S)
            self._wake.clear()
            await self._call()

    async def _call(self) -> None:
        """One report, with all that waits."""
        assert self.settle is not None
        waiting, self._waiting = self._waiting, {}
        sent_s = self.clock()
        needs = {name: [each.tokens for each in waiters] for name, waiters in waiting.items()}
        self._sequence += 1
        tell_usage = sent_s - self._told_s >= BEAT_S
        answer = None
        try:
            report = Report(
                self.router_id,
                self._sequence,
                self._accounts.statements(needs, sent_s),
                dict(self.usage) if tell_usage else {},
            )
            answer = await asyncio.wait_for(self.settle(report), CALL_TIMEOUT_S)
            self._accounts.hear(answer, sent_s)
            self._told_s = sent_s if tell_usage else self._told_s
            self._note(None)
        except Exception as error:
            self._accounts.by_share = True
            self._note(error)
        finally:
            for name, waiters in waiting.items():
                for waiter in waiters:
                    if not waiter.granted.done():
                        waiter.granted.set_result(answer.grants.get(name) if answer is not None else None)

    def _note(self, error: Exception | None) -> None:
        """Log when the ledger goes away or comes back."""
        if error is not None and not self._away:
            logger.warning(
                "the ledger of keys does not answer (%r): this router keeps to its share of each limit, one of %d, "
                "until it does",
                error,
                self._accounts.routers,
            )
        elif error is None and self._away:
            logger.info("the ledger of keys answers again")
        self._away = error is not None
