"""What routers and the ledger of keys say to each other. Amounts are pairs (requests, tokens).

Statements are absolute: whatever was lost, twice or late before them, the ledger knows after the next one what a router
has used. Slots are numbers of `windows.SLOT_S` on the ledger's clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.keys.keyring import Limits

Amounts = tuple[int, int]


@dataclass(frozen=True)
class Statement:
    """One router about one key."""

    key: str
    limits: Limits
    used: dict[int, Amounts]  # by slot, as far back as the window goes
    spare_slot: int  # in which
    spare: Amounts  # may still be used without asking
    holding: int  # requests that run, and those that may start without asking
    needs: tuple[int, ...] = ()  # tokens of each request that waits


@dataclass(frozen=True)
class Grant:
    """What the ledger says to a statement."""

    amounts: Amounts  # to use within the slot of the answer
    concurrency: int  # more requests that may run
    remaining: Amounts  # of the limits, after this
    reset_s: tuple[float, float]  # until everything is free again
    # Of the first need that was not granted: until it would be, by kind; 0 for a kind that is no obstacle.
    retry_s: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Totals:
    """What a key has used since a router started."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.refused + other.refused,
        )


@dataclass(frozen=True)
class Report:
    """What one router says in one call."""

    router_id: str
    sequence: int  # rises from call to call
    statements: tuple[Statement, ...] = ()
    usage: dict[str, Totals] = field(default_factory=dict)  # by key; in some of the reports


@dataclass(frozen=True)
class Answer:
    """What the ledger says to a report."""

    now_s: float  # on the ledger's clock
    ready: bool  # False while a new ledger hears what routers have used
    routers: int  # that the ledger has heard of lately
    grants: dict[str, Grant] = field(default_factory=dict)  # by key; an old report gets none


@dataclass(frozen=True)
class LedgerUsage:
    """What the ledger knows of usage."""

    since_s: float  # when this ledger started, in seconds since 1970
    routers: dict[str, dict[str, Totals]]  # by router, those that have gone included, and key
