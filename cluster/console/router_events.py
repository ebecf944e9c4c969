"""Losses and fallbacks that routers count, as events with times. Seen while somebody watches."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from experts.protocol.status import RouterStatus

LONGEST = 100
SAME_S = 10.0  # what follows within is of the same event: growth of one counter, or one loss that several routers see

COUNTED = {
    "failover": ("failovers", "repeated {count} dispatches on other shards"),
    "fallback": ("fallback_pairs", "computed {count} row-expert pairs for want of a shard"),
    "refused": ("refused_requests", "ended {count} requests for want of experts"),
}
"""By kind: the counter of RouterStatus, and what its growth means."""


@dataclass(frozen=True)
class RouterEvent:
    """Something that routers did, or noticed."""

    number: int  # counts up; a change of an event gets a new one
    at: float  # seconds since 1970, when it began
    until: float
    kind: str  # lost, back, failover, fallback or refused
    routers: tuple[str, ...]
    text: str
    epoch: int
    count: int = 0
    rank: int | None = None


class RouterEvents:
    """Compares statuses with those before. Times are seconds since 1970."""

    def __init__(self) -> None:
        self.number = 0
        self._events: deque[RouterEvent] = deque(maxlen=LONGEST)
        self._before: dict[str, RouterStatus] = {}

    @property
    def events(self) -> list[RouterEvent]:
        """A copy, oldest first."""
        return list(self._events)

    def note(self, statuses: Sequence[RouterStatus], now: float) -> None:
        """Take one look. A router that is new tells what it lost; its counters are of unknown times."""
        for status in statuses:
            before = self._before.get(status.router_id)
            for rank, why in sorted(status.lost.items()):
                if before is None or rank not in before.lost:
                    self._add("lost", status, f"no link: {why}", now, rank=rank)
            if before is not None:
                for rank in sorted(set(before.lost) & set(status.connected)):
                    self._add("back", status, "connected again", now, rank=rank)
                for kind, (name, text) in COUNTED.items():
                    growth = getattr(status, name) - getattr(before, name)
                    if growth > 0:
                        self._add(kind, status, text, now, growth)
        self._before.update({status.router_id: status for status in statuses})

    def _add(
        self, kind: str, status: RouterStatus, text: str, now: float, growth: int = 0, rank: int | None = None
    ) -> None:
        """A new event, or more of the last one of its kind and rank if that is of now."""
        self.number += 1
        like = (e for e in reversed(self._events) if (e.kind, e.rank) == (kind, rank) and now - e.until <= SAME_S)
        last = next(like, None)
        if last is None or (not growth and status.router_id in last.routers):
            routers = (status.router_id,)
            self._events.append(
                RouterEvent(*(self.number, now, now, kind, routers, _text(text, growth), status.epoch, growth, rank))
            )
            return
        count = last.count + growth
        self._events[self._events.index(last)] = replace(
            last,
            number=self.number,
            until=now,
            routers=tuple(sorted({*last.routers, status.router_id})),
            count=count,
            epoch=status.epoch,
            text=_text(text, count) if growth else last.text,
        )


def _text(text: str, count: int) -> str:
    return text.format(count=count) if count else text  # why a link is lost may have braces of its own
