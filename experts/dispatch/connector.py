"""Connects a router to shards in the background, so that an engine's steps need not wait for a shard that is slow."""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable, Iterable

from experts.protocol.errors import ShardError, ShardRejectedError
from experts.protocol.membership import ShardEndpoint
from experts.transports.base import RouterLink

logger = logging.getLogger(__name__)

MAX_AT_ONCE = 64


class Connector:
    """Connections under way or made but not yet taken, one for each shard.

    `open_link` connects to one shard, within a deadline of its own; ShardError when it cannot.
    """

    def __init__(self, open_link: Callable[[ShardEndpoint], RouterLink]) -> None:
        self._open_link = open_link
        self._pool = concurrent.futures.ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="connect")
        self._under_way: dict[ShardEndpoint, concurrent.futures.Future[RouterLink]] = {}

    def start(self, endpoints: Iterable[ShardEndpoint]) -> list[int]:
        """Begin to connect to `endpoints`, and to nobody else; returns the ranks that are not done yet."""
        wanted = set(endpoints)
        for unwanted in self._under_way.keys() - wanted:
            self._under_way.pop(unwanted).add_done_callback(_close)
        for endpoint in wanted - self._under_way.keys():
            self._under_way[endpoint] = self._pool.submit(self._open_link, endpoint)
        return sorted(endpoint.rank for endpoint, future in self._under_way.items() if not future.done())

    def take(
        self, endpoints: list[ShardEndpoint], wait_s: float | None
    ) -> tuple[dict[int, RouterLink], dict[int, str], list[int]]:
        """({rank: link}, {rank: the reason why there is none}, ranks of the latter that refused this router).

        A connection that is not made within `wait_s` (None: as long as its own deadline lasts) goes on in the
        background, for the epoch after.
        """
        self.start(endpoints)
        concurrent.futures.wait(self._under_way.values(), wait_s)
        links, lost, refused = {}, {}, []
        for endpoint in endpoints:
            future = self._under_way[endpoint]
            if not future.done():
                lost[endpoint.rank] = "still connecting"
                continue
            del self._under_way[endpoint]
            try:
                links[endpoint.rank] = future.result()
            except ShardError as error:
                logger.error("cannot reach shard %d: %s", endpoint.rank, error.reason)
                lost[endpoint.rank] = error.reason
                if isinstance(error, ShardRejectedError):
                    refused.append(endpoint.rank)
            except Exception as error:  # this router's own trouble, say too few descriptors: the other links count
                logger.exception("cannot connect to shard %d", endpoint.rank)
                lost[endpoint.rank] = f"{type(error).__name__}: {error}"
        return links, lost, refused

    def close(self) -> None:
        """Close what nobody took; connections under way end by their own deadlines."""
        self.start(())
        self._pool.shutdown(wait=False, cancel_futures=True)


def _close(future: concurrent.futures.Future[RouterLink]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
