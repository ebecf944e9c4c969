"""What one router knows of each key's limits: what it may still use without asking. No clock, no calls.

While the ledger is away, a router goes by its share: the limit over the number of routers last known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.keys.keyring import Key, Limits
from cluster.keys.messages import Answer, Statement
from cluster.keys.windows import SLOT_S, WINDOW_SLOTS, free_at_s, oldest_of, share_of, slot_of, spare_of

RETRY_CONCURRENCY_S = 1.0
UNASKED = -1  # no slot


@dataclass(frozen=True)
class Charge:
    """What one request was let in for."""

    key: Key
    slot: int
    tokens: int


@dataclass(frozen=True)
class Standing:
    """How much of its limits a key has left, of (requests, tokens), and in how many seconds it has all of them."""

    remaining: tuple[int, int]
    reset_s: tuple[float, float]


@dataclass
class _Account:
    """One key in this router. Pairs are [requests, tokens]."""

    limits: Limits
    used: dict[int, list[int]] = field(default_factory=dict)  # by slot
    spare_slot: int = UNASKED
    spare: list[int] = field(default_factory=lambda: [0, 0])
    expired: int = UNASKED  # the slot of the last look at what has expired
    running: int = 0
    held: int = 0  # how many may run
    remaining: tuple[int, int] | None = None  # what the ledger had left for everybody when it was asked last
    free_at_s: tuple[float, float] = (0.0, 0.0)

    def expire(self, slot: int) -> None:
        """Drop what may not be used in `slot`, and what does not count there any more."""
        if self.expired == slot:
            return
        self.expired = slot
        self.used = {when: amounts for when, amounts in self.used.items() if when >= oldest_of(slot)}
        if self.spare_slot != slot:
            self.spare = [0, 0]

    def add(self, slot: int, requests: int, tokens: int) -> None:
        """Note what was used."""
        amounts = self.used.setdefault(slot, [0, 0])
        amounts[0] += requests
        amounts[1] += tokens

    def total(self) -> tuple[int, int]:
        """What was used in the window."""
        return sum(each[0] for each in self.used.values()), sum(each[1] for each in self.used.values())


class Accounts:
    """Every method takes the time on this process's monotonic clock."""

    def __init__(self, ahead_s: float) -> None:
        """`ahead_s`: how far the clock of day is ahead of the monotonic one, until the ledger tells its own."""
        self.by_share = False  # the ledger is away
        self.routers = 1
        self._ahead_s = ahead_s
        self._accounts: dict[str, _Account] = {}

    def take(self, key: Key, tokens: int, now_s: float, by_share: bool = False) -> Charge | None:
        """Let a request in, for so many tokens; None if this router may not (without asking, unless `by_share`)."""
        slot = slot_of(now_s + self._ahead_s)
        if not key.limits:
            return Charge(key, slot, 0)
        account, limits = self._account(key, slot), key.limits
        needs = (1 if limits.requests_per_minute else 0, tokens if limits.tokens_per_minute else 0)
        if by_share or self.by_share:
            room = self._room(account)
            if needs[0] > room[0] or needs[1] > room[1] or (limits.concurrency and room[2] < 1):
                return None
        elif (
            needs[0] > account.spare[0]
            or needs[1] > account.spare[1]
            or (limits.concurrency and account.running >= account.held)
        ):
            return None
        account.add(slot, *needs)
        account.spare[0] = max(0, account.spare[0] - needs[0])
        account.spare[1] = max(0, account.spare[1] - needs[1])
        account.running += 1
        return Charge(key, slot, needs[1])

    def finish(self, charge: Charge, tokens: int | None, now_s: float) -> bool:
        """A request has ended after so many tokens (None: not known). Whether the ledger should hear of it soon."""
        limits = charge.key.limits
        if not limits:
            return False
        slot = slot_of(now_s + self._ahead_s)
        account = self._account(charge.key, slot)
        account.running -= 1
        if limits.tokens_per_minute and tokens is not None:
            if tokens > charge.tokens:
                account.add(slot, 0, tokens - charge.tokens)
            elif charge.slot in account.used:
                account.used[charge.slot][1] -= charge.tokens - tokens
        if not limits.concurrency:
            return False
        most = account.running + spare_of(limits.concurrency, self.routers)
        gives_back = account.held > most
        account.held = min(account.held, most)
        return gives_back

    def statements(self, needs: Mapping[str, Sequence[int]], now_s: float) -> tuple[Statement, ...]:
        """What to tell the ledger; `needs`: tokens of each waiting request, by key."""
        slot = slot_of(now_s + self._ahead_s)
        told = []
        for name, account in list(self._accounts.items()):
            account.expire(slot)
            account.held = max(account.held, account.running) if account.limits.concurrency else 0
            waiting = tuple(needs.get(name, ()))
            told.append(
                Statement(
                    key=name,
                    limits=account.limits,
                    used={when: (each[0], each[1]) for when, each in account.used.items()},
                    spare_slot=account.spare_slot,
                    spare=(account.spare[0], account.spare[1]),
                    holding=account.held,
                    needs=waiting,
                )
            )
            if not (account.used or account.running or account.held or waiting):
                del self._accounts[name]
        return tuple(told)

    def hear(self, answer: Answer, sent_s: float) -> None:
        """Take in the ledger's answer to a report that was sent at `sent_s`."""
        # Its clock is at most as far as this: what is granted for a slot is not used after it.
        self._ahead_s = answer.now_s - sent_s
        self.by_share = not answer.ready
        self.routers = max(1, answer.routers)
        slot = slot_of(answer.now_s)
        for name, grant in answer.grants.items():
            account = self._accounts.get(name)
            if account is None:
                continue
            if account.spare_slot != slot:
                account.spare_slot, account.spare = slot, [0, 0]
            account.expired = UNASKED  # the answer may have taken longer than the slot
            account.spare[0] += grant.amounts[0]
            account.spare[1] += grant.amounts[1]
            account.held += grant.concurrency
            account.remaining = grant.remaining
            account.free_at_s = (answer.now_s + grant.reset_s[0], answer.now_s + grant.reset_s[1])

    def standing(self, key: Key, now_s: float) -> Standing:
        """What a client is told of its limits."""
        ledger_s = now_s + self._ahead_s
        account = self._account(key, slot_of(ledger_s))
        if self.by_share or account.remaining is None:
            room = self._room(account)
            last = max(account.used, default=None)
            reset_s = 0.0 if last is None else free_at_s(last) - ledger_s
            return Standing((max(0, room[0]), max(0, room[1])), (reset_s, reset_s))
        remaining = account.remaining[0] + account.spare[0], account.remaining[1] + account.spare[1]
        requests_s, tokens_s = (max(0.0, at_s - ledger_s) for at_s in account.free_at_s)
        return Standing(remaining, (requests_s, tokens_s))

    def retry_s(self, key: Key, tokens: int, now_s: float) -> tuple[float, float, float]:
        """When a request that this router's share does not allow may come again: as `Grant.retry_s`."""
        ledger_s = now_s + self._ahead_s
        account = self._account(key, slot_of(ledger_s))
        room = self._room(account)
        waits = []
        for kind, need in enumerate((1, tokens)):
            missing, wait_s = need - room[kind], 0.0
            for slot in sorted(account.used):
                if missing <= 0:
                    break
                missing -= account.used[slot][kind]
                wait_s = free_at_s(slot) - ledger_s
            waits.append(wait_s if missing <= 0 else WINDOW_SLOTS * SLOT_S)  # more than the share
        limits = key.limits
        return (
            waits[0] if limits.requests_per_minute else 0.0,
            waits[1] if limits.tokens_per_minute else 0.0,
            RETRY_CONCURRENCY_S if limits.concurrency and room[2] < 1 else 0.0,
        )

    def _account(self, key: Key, slot: int) -> _Account:
        account = self._accounts.get(key.name)
        if account is None:
            account = self._accounts[key.name] = _Account(key.limits)
        account.limits = key.limits
        account.expire(slot)
        return account

    def _room(self, account: _Account) -> tuple[int, int, int]:
        """What is left of this router's share: requests, tokens, requests at a time. 0 where there is no limit."""
        limits, used = account.limits, account.total()
        return (
            share_of(limits.requests_per_minute, self.routers) - used[0] if limits.requests_per_minute else 0,
            share_of(limits.tokens_per_minute, self.routers) - used[1] if limits.tokens_per_minute else 0,
            share_of(limits.concurrency, self.routers) - account.running if limits.concurrency else 0,
        )
