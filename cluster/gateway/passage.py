"""One request on its way to a router: version after version, router after router, until one answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Send

from cluster.gateway.forward import VERSION, Asked, Forwarder, RouterGoneError, pass_on
from cluster.gateway.models import Models
from cluster.gateway.pool import Endpoint
from cluster.http.errors import UnavailableError

logger = logging.getLogger("ray.serve")

MAX_BROKEN = 2  # routers that may die under one request before it is answered: it may be the reason


@dataclass
class Passage:
    """A request for `model`, that no router has answered yet."""

    models: Models
    forwarder: Forwarder
    model: str
    asked: Asked
    broken: int = 0  # routers that took the request and gave no answer

    async def through(self, order: Sequence[str], receive: Receive, send: Send) -> None:
        """Ask the first of the versions, and the next ones where no router of it answers.

        Ends early if the client leaves; the router hears of it by its closed connection. Raises UnavailableError if
        nobody answers, ConnectionError for an answer that broke off where the client can be told in no other way.
        """
        for version in order:
            tried: set[str] = set()
            while self.broken < MAX_BROKEN:
                endpoint = self.models.pool(self.model, version).pick(tried)
                if endpoint is None:
                    break
                tried.add(endpoint.router_id)
                try:
                    await while_there(self._ask(version, endpoint, send, taken_over=version != order[0]), receive)
                    return
                except RouterGoneError as error:
                    self._note(version, endpoint, error)
        counts = self.models.count(self.model, order[0])
        counts.requests += 1
        counts.errors += 1
        raise UnavailableError(f"no router of the model {self.model!r} ({', '.join(order)}) answers; try again")

    async def _ask(self, version: str, endpoint: Endpoint, send: Send, taken_over: bool) -> None:
        """One router's answer, passed on as it comes. Raises RouterGoneError before the first byte."""
        counts = self.models.count(self.model, version)
        begin_s = time.monotonic()
        with self.models.pool(self.model, version).request(endpoint):
            counts.open += 1
            try:
                answer = await self.forwarder.ask(endpoint, self.asked)
                counts.requests += 1
                counts.taken_over += taken_over
                counts.first_bytes += 1
                counts.first_byte_s += time.monotonic() - begin_s
                several = len(self.models.versions[self.model].versions) > 1
                more = {VERSION: version.encode()} if several else {}
                async with answer:
                    try:
                        whole = await pass_on(answer, send, more)
                    except ConnectionError:
                        counts.errors += 1
                        raise
                counts.errors += not whole or answer.status >= 500
            finally:
                counts.open -= 1
                counts.duration_s += time.monotonic() - begin_s

    def _note(self, version: str, endpoint: Endpoint, error: RouterGoneError) -> None:
        logger.warning("router %s of %s (%s) gives no answer: %s", endpoint.router_id, self.model, version, error)
        self.models.pool(self.model, version).set_aside(endpoint)
        self.models.count(self.model, version).retries += 1
        self.broken += error.sent


async def while_there(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do something for a client until it leaves; then cancel it. Raises what `work` raises."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await working


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
