"""The routers of one application as a gateway sees them: where they listen, and which one gets the next request."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

ASIDE_S = 2.0  # a router that refused a connection is asked last; Serve drops it once it knows


@dataclass(frozen=True)
class Endpoint:
    """Where one router listens."""

    router_id: str
    host: str
    port: int


class RouterPool:
    """Chooses the router with the fewest requests of this gateway, as HAProxy does with its own."""

    def __init__(
        self, endpoints: Callable[[], Mapping[str, tuple[str, int]]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`endpoints` names the routers that run now: host and port by id."""
        self._endpoints, self._clock = endpoints, clock
        self._open: Counter[str] = Counter()
        self._aside_until_s: dict[str, float] = {}

    def pick(self, without: Collection[str] = ()) -> Endpoint | None:
        """The router for the next request, none of `without`; None if there is no other."""
        running = self._endpoints()
        now_s = self._clock()
        self._aside_until_s = {each: s for each, s in self._aside_until_s.items() if s > now_s and each in running}
        candidates = [each for each in running if each not in without]
        if not candidates:
            return None
        chosen = min(candidates, key=lambda each: (each in self._aside_until_s, self._open[each]))
        return Endpoint(chosen, *running[chosen])

    def set_aside(self, endpoint: Endpoint) -> None:
        """Ask this router last for a moment: it did not answer."""
        self._aside_until_s[endpoint.router_id] = self._clock() + ASIDE_S

    @contextlib.contextmanager
    def request(self, endpoint: Endpoint) -> Iterator[None]:
        """Count a request at this router while it runs."""
        self._open[endpoint.router_id] += 1
        try:
            yield
        finally:
            self._open[endpoint.router_id] -= 1
            if not self._open[endpoint.router_id]:
                del self._open[endpoint.router_id]
