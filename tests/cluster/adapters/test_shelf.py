"""Which adapters an engine holds, without an engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.adapters.shelf import Shelf
from tests.support.waiting import asynchronous, within


class Engine:
    """Notes what it holds, and what happened; `gate` holds fetching up, and names in `broken` cannot be loaded."""

    def __init__(self, most: int) -> None:
        self.holds: dict[str, Path] = {}
        self.events: list[str] = []
        self.most_at_once = 0
        self.broken: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.shelf = Shelf(most, self.fetch, self.load, self.unload)

    async def fetch(self, name: str) -> Path:
        self.events.append(f"fetch {name}")
        await self.gate.wait()
        return Path("/adapters", name)

    async def load(self, name: str, folder: Path) -> None:
        assert name not in self.holds
        await asyncio.sleep(0)
        if name in self.broken:
            raise ValueError(f"{name} is broken")
        self.holds[name] = folder
        self.events.append(f"load {name}")
        self.most_at_once = max(self.most_at_once, len(self.holds))

    async def unload(self, name: str) -> None:
        await asyncio.sleep(0)
        del self.holds[name]
        self.events.append(f"unload {name}")

    async def use(self, *names: str) -> None:
        for name in names:
            async with self.shelf.using(name):
                assert self.holds[name] == Path("/adapters", name)


@asynchronous
async def test_the_one_used_longest_ago_makes_room() -> None:
    engine = Engine(2)
    await engine.use("a", "b", "a", "c", "a", "b")
    assert engine.events == [
        *("fetch a", "load a", "fetch b", "load b"),
        *("fetch c", "unload b", "load c"),
        *("fetch b", "unload c", "load b"),
    ]
    assert engine.shelf.names == ["a", "b"]
    assert engine.most_at_once == 2


@asynchronous
async def test_requests_at_the_same_time_load_an_adapter_once() -> None:
    engine = Engine(1)
    engine.gate.clear()
    requests = [asyncio.create_task(engine.use("a")) for _ in range(5)]
    await asyncio.sleep(0)
    engine.gate.set()
    await within(asyncio.gather(*requests), "the requests")
    assert engine.events == ["fetch a", "load a"]


@asynchronous
async def test_an_adapter_in_use_stays_and_goes_when_the_next_one_comes() -> None:
    engine = Engine(1)
    async with engine.shelf.using("a"):
        await engine.use("b")
        assert engine.holds.keys() == {"a", "b"}
    await engine.use("c")
    assert engine.holds.keys() == {"c"}


@asynchronous
async def test_who_hangs_up_while_an_adapter_comes_stops_it_for_nobody() -> None:
    engine = Engine(1)
    engine.gate.clear()
    first, second = (asyncio.create_task(engine.use("a")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    engine.gate.set()
    await within(second, "the other request")
    await engine.use("b")
    assert engine.holds.keys() == {"b"}


@asynchronous
async def test_a_failure_reaches_all_who_asked_and_the_next_one_tries_again() -> None:
    engine = Engine(1)
    engine.broken = {"a"}
    answers = await asyncio.gather(engine.use("a"), engine.use("a"), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["a is broken"] * 2
    assert engine.shelf.names == []
    engine.broken = set()
    await engine.use("a")
    assert engine.events == ["fetch a", "fetch a", "load a"]


@asynchronous
async def test_many_requests_in_any_order_never_use_what_is_not_there() -> None:
    engine = Engine(3)
    await within(asyncio.gather(*(engine.use(*(f"{(7 * i + k) % 5}" for k in range(20))) for i in range(8))), "all")
    await engine.use("last")
    assert len(engine.holds) == 3
    assert engine.holds.keys() == set(engine.shelf.names)
