"""What all routers together have used and may use of each key: the ledger's state, without a clock or Ray.

A router gets what its waiting requests need and a little in advance. What it has in advance is its own only within the
slot, so a limit is never exceeded in any minute, and at most `windows.SPARE` of it lies unused with routers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.keys.messages import Amounts, Answer, Grant, LedgerUsage, Report, Statement, Totals
from cluster.keys.windows import SPARE, free_at_s, oldest_of, slot_of, spare_of

# A new ledger hears first what routers have used: each reports once a second.
YOUNG_S = 3.0
GONE_S = 10.0  # a router that was not heard of for so long runs no requests
FORGOTTEN_S = 3600.0  # after which its usage is added to that of the others that have gone
GONE = "gone"
RETRY_CONCURRENCY_S = 1.0  # nobody knows when a request ends
UNLIMITED = math.inf
NOTHING: Amounts = (0, 0)


@dataclass
class _Router:
    """When a router was heard of last, by which report, and what it had used."""

    seen_s: float
    sequence: int
    usage: dict[str, Totals] = field(default_factory=dict)


@dataclass
class _Account:
    """One key. `totals` has the sum of all claims by slot."""

    claims: dict[str, dict[int, Amounts]] = field(default_factory=dict)  # by router and slot: used, or to be used
    spares: dict[str, Amounts] = field(default_factory=dict)  # by router: the part of it that is not used yet
    held: dict[str, int] = field(default_factory=dict)  # by router: requests that run or may start
    totals: dict[int, Amounts] = field(default_factory=dict)

    def set_claims(self, router: str, claims: dict[int, Amounts]) -> None:
        """Replace what is known of one router."""
        for slot, (requests, tokens) in self.claims.pop(router, {}).items():
            self._add(slot, (-requests, -tokens))
        for slot, amounts in claims.items():
            self._add(slot, amounts)
        self.claims[router] = claims

    def claim(self, router: str, slot: int, amounts: Amounts) -> None:
        """Add to what one router may have used."""
        claims = self.claims[router]
        claims[slot] = _plus(claims.get(slot, NOTHING), amounts)
        self._add(slot, amounts)

    def _add(self, slot: int, amounts: Amounts) -> None:
        total = _plus(self.totals.get(slot, NOTHING), amounts)
        if total == NOTHING:
            self.totals.pop(slot, None)
        else:
            self.totals[slot] = total

    def forget_before(self, oldest: int) -> None:
        """Drop slots that count no more."""
        for claims in (self.totals, *self.claims.values()):
            for slot in [slot for slot in claims if slot < oldest]:
                del claims[slot]
        self.claims = {router: claims for router, claims in self.claims.items() if claims}

    def taken(self) -> Amounts:
        """What counts at present."""
        return sum(each[0] for each in self.totals.values()), sum(each[1] for each in self.totals.values())

    def free_in_s(self, kind: int, missing: float, now_s: float) -> float:
        """In how many seconds `missing` more of a kind are free; 0 if they are."""
        for slot in sorted(self.totals):
            if missing <= 0:
                break
            missing -= self.totals[slot][kind]
            if missing <= 0:
                return free_at_s(slot) - now_s
        return 0.0 if missing <= 0 else free_at_s(slot_of(now_s)) - now_s

    def reset_s(self, now_s: float) -> tuple[float, float]:
        """In how many seconds all of a kind is free, for requests and for tokens."""
        last = [max((slot for slot, total in self.totals.items() if total[kind]), default=None) for kind in (0, 1)]
        requests, tokens = (0.0 if slot is None else free_at_s(slot) - now_s for slot in last)
        return requests, tokens


class Ledger:
    """Every method takes the time on the ledger's clock."""

    def __init__(self, now_s: float) -> None:
        self._started_s = self._swept_s = now_s
        self._accounts: dict[str, _Account] = {}
        self._routers: dict[str, _Router] = {}
        self._gone_usage: dict[str, Totals] = {}

    def settle(self, report: Report, now_s: float) -> Answer:
        """Take in what a router says, and grant what its requests need as far as the limits allow."""
        ready = now_s - self._started_s >= YOUNG_S
        router = self._routers.setdefault(report.router_id, _Router(now_s, report.sequence - 1))
        late = report.sequence <= router.sequence
        if not late:
            router.seen_s, router.sequence = now_s, report.sequence
            router.usage = report.usage or router.usage
        self._sweep(now_s)
        routers = sum(now_s - each.seen_s < GONE_S for each in self._routers.values())
        if late:
            return Answer(now_s, ready, routers)
        grants = {
            each.key: self._settle(report.router_id, each, now_s, routers if ready else None)
            for each in report.statements
        }
        return Answer(now_s, ready, routers, grants if ready else {})

    def usage(self) -> LedgerUsage:
        """What all routers have said of usage since this ledger started."""
        said = {name: router.usage for name, router in self._routers.items() if router.usage}
        return LedgerUsage(self._started_s, {**said, **({GONE: self._gone_usage} if self._gone_usage else {})})

    def _settle(self, router: str, said: Statement, now_s: float, routers: int | None) -> Grant:
        """Take in one statement; grants nothing if `routers` is None."""
        slot = slot_of(now_s)
        account = self._accounts.setdefault(said.key, _Account())
        account.forget_before(oldest_of(slot))
        claims: dict[int, Amounts] = {}
        for when, amounts in [*said.used.items(), (said.spare_slot, said.spare)]:
            if when >= oldest_of(slot) and amounts != NOTHING:
                place = min(when, slot)  # the clock of a router is ahead, if anything
                claims[place] = _plus(claims.get(place, NOTHING), amounts)
        account.set_claims(router, claims)
        account.spares[router] = said.spare
        account.held[router] = said.holding
        if routers is None:
            return Grant(NOTHING, 0, NOTHING, (0.0, 0.0))
        return self._grant(account, router, said, now_s, routers)

    def _grant(self, account: _Account, router: str, said: Statement, now_s: float, routers: int) -> Grant:
        limits, slot, taken = said.limits, slot_of(now_s), account.taken()
        most = (_most(limits.requests_per_minute), _most(limits.tokens_per_minute), _most(limits.concurrency))
        left = [most[0] - taken[0], most[1] - taken[1], most[2] - sum(account.held.values())]
        given, retry_s = [0, 0, 0], (0.0, 0.0, 0.0)
        for tokens in said.needs:
            need = (1, tokens, 1)
            if all(amount <= there for amount, there in zip(need, left, strict=True)):
                for kind, amount in enumerate(need):
                    left[kind] -= amount
                    given[kind] += amount
            elif not any(retry_s):
                retry_s = (
                    account.free_in_s(0, 1 - left[0], now_s),
                    account.free_in_s(1, tokens - left[1], now_s),
                    RETRY_CONCURRENCY_S if left[2] < 1 else 0.0,
                )
        advance = [0, 0, 0]
        if said.needs and not any(retry_s):
            for kind in (0, 1):
                if most[kind] != UNLIMITED:
                    unused = sum(spare[kind] for spare in account.spares.values())
                    room = min(left[kind], most[kind] * SPARE - unused)
                    advance[kind] = max(0, min(spare_of(int(most[kind]), routers), math.floor(room)))
            if limits.concurrency:
                advance[2] = min(int(left[2]), spare_of(limits.concurrency, routers))
        # What is not limited is not counted.
        amounts = tuple(given[k] + advance[k] if most[k] != UNLIMITED else 0 for k in (0, 1, 2))
        granted: Amounts = (amounts[0], amounts[1])
        account.claim(router, slot, granted)
        account.spares[router] = _plus(said.spare, (advance[0], advance[1]))
        account.held[router] += amounts[2]
        remaining = tuple(
            0 if there == UNLIMITED else max(0, int(there - ahead)) for there, ahead in zip(left, advance, strict=True)
        )
        return Grant(granted, amounts[2], (remaining[0], remaining[1]), account.reset_s(now_s), retry_s)

    def _sweep(self, now_s: float) -> None:
        """Once a second: forget old slots, keys out of use, and routers that have gone."""
        if now_s - self._swept_s < 1:
            return
        self._swept_s = now_s
        gone = {name for name, router in self._routers.items() if now_s - router.seen_s >= GONE_S}
        for key, account in list(self._accounts.items()):
            account.forget_before(oldest_of(slot_of(now_s)))
            for name in gone:
                account.held.pop(name, None)
                account.spares.pop(name, None)
            if not account.totals and not any(account.held.values()):
                del self._accounts[key]
        for name in [name for name in gone if now_s - self._routers[name].seen_s >= FORGOTTEN_S]:
            for key, totals in self._routers.pop(name).usage.items():
                self._gone_usage[key] = self._gone_usage.get(key, Totals()) + totals


def _most(limit: int | None) -> float:
    return UNLIMITED if limit is None else limit


def _plus(one: Amounts, other: Amounts) -> Amounts:
    return one[0] + other[0], one[1] + other[1]
