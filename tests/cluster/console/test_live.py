"""The live page's files and what it shows: who may have which, what is asked of the service, and how often."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest

from cluster.config.apps import ConsoleAppConfig
from cluster.config.http_sections import ConsoleHttpSection
from cluster.console import watch
from cluster.console.endpoints import Console, console_app
from cluster.console.growth import FIELDS
from cluster.console.live import open_paths, page_files
from tests.support.live_service import MadeUpService
from tests.support.waiting import run_async

ADMIN, READER = "admin-key", "reader-key"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look every 20 ms, and loads with every other one."""
    monkeypatch.setattr(watch, "PERIOD_S", 0.02)
    monkeypatch.setattr(watch, "LOADS_EVERY", 2)


class Browser:
    """A client of one console that watches a service."""

    def __init__(self, service: MadeUpService, keys: bool = False) -> None:
        section = ConsoleHttpSection(admin_keys=[ADMIN], api_keys=[READER]) if keys else ConsoleHttpSection()
        client: Any = service
        app = console_app(Console(ConsoleAppConfig(http=section), client, [client]))
        transport = httpx.ASGITransport(app, root_path="/expertmesh")
        self._client = httpx.AsyncClient(transport=transport, base_url="http://mesh")

    async def get(self, path: str, key: str = "", **query: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return await self._client.get(f"/expertmesh{path}", headers=headers, params=query)

    async def watch(self, **query: Any) -> dict[str, Any]:
        answer = await self.get("/watch", **query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def watch_until(self, what: Any) -> dict[str, Any]:
        """The first whole answer for which `what` holds."""
        while not what(found := await self.watch()):
            await asyncio.sleep(0.005)
        return found


def small() -> MadeUpService:
    return MadeUpService(3, 8, 4, routers=2)


def test_the_files_are_open_and_allow_nothing_from_elsewhere() -> None:
    async def run() -> None:
        browser = Browser(small(), keys=True)
        assert {"/", "/page/main.js", "/page/style.css", "/page/icon.svg"} <= open_paths()
        for path in sorted(open_paths() - {""}):
            answer = await browser.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "10.4." not in answer.text, "hosts are data"
        assert (await browser.get("/page/main.js")).headers["content-type"] == "text/javascript; charset=utf-8"
        assert (await browser.get("/page/__init__.py", ADMIN)).status_code == 404
        assert (await browser.get("/page/..%2Fwatch.py", ADMIN)).status_code == 404
        bare = await browser.get("")  # as people type it
        assert (bare.status_code, bare.headers["location"]) == (307, "http://mesh/expertmesh/")

    run_async(run())


def test_what_it_shows_takes_an_admin_key_where_there_are_any() -> None:
    async def run() -> None:
        service = small()
        browser = Browser(service, keys=True)
        for key, status in (("", 401), ("wrong", 401), (READER, 403)):
            assert (await browser.get("/watch", key)).status_code == status
        assert service.asked == {"controller": 0, "live": 0, "loads": 0}
        assert (await browser.get("/watch", ADMIN)).status_code == 200
        assert (await Browser(small()).get("/watch")).status_code == 200

    run_async(run())


def test_no_file_puts_data_into_markup_or_runs_text() -> None:
    for name, content in page_files().items():
        text = content.decode()
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert forbidden not in text.replace("without innerHTML", ""), name
        assert text.count("http://") + text.count("https://") == text.count("http://www.w3.org/2000/svg"), name
        assert len(text.splitlines()) <= 350, name


def test_many_viewers_cost_one_look_a_period_and_none_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PERIOD_S", 30.0)

    async def run() -> None:
        service = small()
        browser = Browser(service)
        await asyncio.sleep(0.05)
        assert service.asked["controller"] == 0, "nobody has asked yet"
        answers = await asyncio.gather(*(browser.watch() for _ in range(20)))
        assert len({answer["controller"]["term"] for answer in answers}) == 1
        assert service.asked == {"controller": 1, "live": 1, "loads": 1}

    run_async(run())


def test_the_service_is_left_alone_once_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LINGER_S", 0.1)

    async def run() -> None:
        service = small()
        browser = Browser(service)
        await browser.watch_until(lambda _: service.asked["controller"] > 2)
        before = -1
        while service.asked["controller"] != before:
            before = service.asked["controller"]
            await asyncio.sleep(0.2)
        assert service.asked["controller"] == before
        await browser.watch_until(lambda _: service.asked["controller"] > before)  # and looks again for the next one

    run_async(run())


def test_placement_load_and_log_are_sent_to_those_who_lack_them() -> None:
    async def run() -> None:
        service = small()
        browser = Browser(service)
        whole = await browser.watch_until(lambda found: found["load"] and len(found["points"]) > 3)
        placement = whole["placement"]
        assert (placement["num_layers"], placement["num_experts"]) == (3, 8)
        for rank in range(4):
            expected = np.flatnonzero(service.held_RLE[rank]).tolist()
            assert placement["experts"][str(rank)] == expected
        load = whole["load"]
        counts_LE = np.array(load["counts"]).reshape(3, 8)
        assert load["layers"] == [3, 4, 5], "numbers of the model"
        assert np.corrcoef(counts_LE.ravel(), service.share_LE.ravel())[0, 1] > 0.9
        have = {name: whole[f"{name}_name"] for name in ("placement", "load", "log")}
        have["since"] = whole["points"][-1][0]
        less = await browser.watch(**{**have, "since": have["since"]})
        assert less["placement"] is None
        assert all(point[0] > have["since"] for point in less["points"])
        service.lose(2)
        after = await browser.watch_until(lambda found: found["controller"]["epoch"] == service.epoch)
        changed = await browser.watch(**have)
        assert "2" not in changed["placement"]["experts"]
        assert changed["log"]["events"][0]["rank"] == 2
        assert after["shards"][2]["lost_by"] == service.routers

    run_async(run())


def test_a_point_has_what_grew_and_percentiles_of_it() -> None:
    async def run() -> None:
        service = small()
        service.tokens_per_s = 5000.0
        found = await Browser(service).watch_until(lambda found: len(found["points"]) > 20)
        assert found["fields"] == list(FIELDS)
        last = dict(zip(FIELDS, found["points"][-1][1:], strict=True))
        assert 4.0 < last["fan_out"] < 4.6, "as made up"
        assert last["between_p50_ms"] < last["between_p99_ms"]
        assert 15 < last["between_p50_ms"] < 40, "drawn around 24 ms"
        assert (last["running"], last["waiting"], last["kv_cache"]) == (74, 0, 0.61)
        assert 0 < last["balancedness"] <= 1
        rates = [point[1] for point in found["points"]]
        assert 1000 < np.mean(rates) < 20_000, "about 5,000 tokens a second, on a clock that others share"

    run_async(run())


def test_without_the_controller_the_last_look_stays_and_its_age_is_told() -> None:
    async def run() -> None:
        service = small()
        browser = Browser(service)
        before = await browser.watch()
        service.controller_away = True
        service.silent_routers = {service.routers[0]}
        away = await browser.watch_until(lambda found: found["errors"])
        assert away["controller_at"] >= before["controller_at"]
        assert away["controller"]["epoch"] == before["controller"]["epoch"]
        assert "the placement controller does not answer" in away["errors"]
        routers = {router["id"]: router["answers"] for router in away["routers"]}
        assert routers == {service.routers[0]: False, service.routers[1]: True}

    run_async(run())


def test_a_name_that_is_too_long_is_refused() -> None:
    async def run() -> None:
        assert (await Browser(small()).get("/watch", placement="x" * 500)).status_code == 400
        assert (await Browser(small()).get("/watch", since="soon")).status_code == 400

    run_async(run())


def test_an_answer_is_small_for_58_layers_of_256_experts_on_64_ranks() -> None:
    """What goes over the wire each second, and what only when it changed."""

    async def run() -> None:
        browser = Browser(MadeUpService(58, 256, 64))
        whole = await browser.watch_until(lambda found: found["load"])
        have = {name: whole[f"{name}_name"] for name in ("placement", "load", "log")}
        answer = await browser.get("/watch", since=whole["points"][-1][0], **have)
        parts = answer.json()
        for large in ("placement", "load", "log"):
            parts.pop(large)
        assert len(json.dumps(parts)) < 48_000, "64 shards of half a kB"
        assert len(json.dumps(whole)) < 400_000

    run_async(run())
