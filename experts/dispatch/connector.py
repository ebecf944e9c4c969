"""Connects a router to shards in the background, so that a slow shard does not hold up the engine's steps."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Iterable

from experts.protocol.errors import ShardError, ShardRejectedError
from experts.protocol.membership import ShardEndpoint
from experts.transports.base import RouterLink

logger = logging.getLogger(__name__)

MAX_PARALLEL = 64
_LOOK_S = 0.01  # how often a wait looks whether it is still wanted


class Connector:
    """Connections in progress, or made and not yet taken, one for each shard.

    `open_link` connects to one shard within a time-out of its own; ShardError when it cannot.
    """

    def __init__(self, open_link: Callable[[ShardEndpoint], RouterLink]) -> None:
        self._open_link = open_link
        self._pool = concurrent.futures.ThreadPoolExecutor(MAX_PARALLEL, thread_name_prefix="connect")
        self._futures: dict[ShardEndpoint, concurrent.futures.Future[RouterLink]] = {}

    def start(self, endpoints: Iterable[ShardEndpoint]) -> list[int]:
        """Start connecting to `endpoints` and drop all others; returns the ranks that are not done yet."""
        wanted = set(endpoints)
        for unwanted in self._futures.keys() - wanted:
            self._futures.pop(unwanted).add_done_callback(_close)
        for endpoint in wanted - self._futures.keys():
            self._futures[endpoint] = self._pool.submit(self._open_link, endpoint)
        return sorted(endpoint.rank for endpoint, future in self._futures.items() if not future.done())

    def take(
        self,
        endpoints: list[ShardEndpoint],
        timeout_s: float | None,
        stop: threading.Event | None = None,
        connecting: list[int] | None = None,
    ) -> tuple[dict[int, RouterLink], dict[int, str], list[int]]:
        """({rank: link}, {rank: why there is none}, those lost ranks that refused this router).

        A connection that takes longer than `timeout_s` (None: until its own time-out) goes on in the background, for
        the next epoch; so does one that is still made when `stop` is set. `connecting` is kept up to date meanwhile.
        """
        self.start(endpoints)
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = _LOOK_S if deadline_s is None else min(_LOOK_S, max(deadline_s - time.monotonic(), 0.0))
            _, waiting = concurrent.futures.wait(self._futures.values(), left_s)
            if connecting is not None:
                connecting[:] = sorted(e.rank for e, future in self._futures.items() if not future.done())
            late = deadline_s is not None and time.monotonic() >= deadline_s
            if not waiting or late or (stop is not None and stop.is_set()):
                break
        links, lost, refused = {}, {}, []
        for endpoint in endpoints:
            future = self._futures[endpoint]
            if not future.done():
                lost[endpoint.rank] = "still connecting"
                continue
            del self._futures[endpoint]
            try:
                links[endpoint.rank] = future.result()
            except ShardError as error:
                logger.error("cannot reach shard %d: %s", endpoint.rank, error.reason)
                lost[endpoint.rank] = error.reason
                if isinstance(error, ShardRejectedError):
                    refused.append(endpoint.rank)
            except Exception as error:  # the router's own trouble, such as too few descriptors: keep the other links
                logger.exception("cannot connect to shard %d", endpoint.rank)
                lost[endpoint.rank] = f"{type(error).__name__}: {error}"
        return links, lost, refused

    def close(self) -> None:
        """Close what was not taken; connections in progress end by their own time-outs."""
        self.start(())
        self._pool.shutdown(wait=False, cancel_futures=True)


def _close(future: concurrent.futures.Future[RouterLink]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
