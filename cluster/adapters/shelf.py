"""Which adapters a router's engine holds: loaded when first asked for, and the ones used longest ago make room."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class _Held:
    """An adapter of the shelf. Requests in progress keep it there."""

    loaded: asyncio.Task[None]
    users: int = 0


class Shelf:
    """At most `most` adapters, unless requests of more are in progress; the engine then has them take turns.

    Args:
        most: adapters that are kept.
        fetch: gives the local folder of an adapter by name; what it raises, whoever asked for the adapter gets.
        load: has the engine load the adapter of a name from a folder.
        unload: has the engine forget it. `load` and `unload` are called one at a time.
    """

    def __init__(
        self,
        most: int,
        fetch: Callable[[str], Awaitable[Path]],
        load: Callable[[str, Path], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
    ) -> None:
        self._most = most
        self._fetch, self._load, self._unload = fetch, load, unload
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the one asked for last comes last
        self._changing = asyncio.Lock()

    @property
    def names(self) -> list[str]:
        """Adapters that are held or being loaded, the one asked for last at the end."""
        return list(self._held)

    @contextlib.asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[None]:
        """While this is open the engine holds the adapter. Loads it first, once for all who wait for it."""
        held = self._held.get(name)
        if held is None:
            held = self._held[name] = _Held(asyncio.create_task(self._bring(name)))
        self._held.move_to_end(name)
        held.users += 1
        try:
            await asyncio.shield(held.loaded)  # whoever hangs up does not stop it for others
            yield
        finally:
            held.users -= 1

    async def _bring(self, name: str) -> None:
        try:
            folder = await self._fetch(name)
            async with self._changing:
                while (old := self._spare()) is not None:
                    del self._held[old]
                    await self._unload(old)
                await self._load(name, folder)
        except BaseException:
            del self._held[name]  # the next request tries again
            raise

    def _spare(self) -> str | None:
        """The adapter to give up for the one that comes; None if there is room, or all are in use."""
        if len(self._held) <= self._most:
            return None
        idle = (name for name, held in self._held.items() if held.users == 0 and held.loaded.done())
        return next(idle, None)
