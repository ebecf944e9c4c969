"""The live page in a real browser: what it shows is what the service says, for eyes, fingers and screen readers.

Screenshots are looked at: pixels of the map against the data, contrast of text, nothing wider than the window.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.live_service import TOP_K, MadeUpService, served
from tests.support.waiting import wait_for

pytest.importorskip("playwright", reason="playwright drives the browser")
pytest.importorskip("PIL", reason="pillow reads screenshots")
from playwright.sync_api import Browser, Page

from tests.support.chromium import CHROMIUM, CONTRAST, Opened, chromium, luminance, pixels_of, until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")

LAYERS, EXPERTS, RANKS = 58, 256, 64


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def large() -> Iterator[tuple[MadeUpService, str]]:
    """58 layers x 256 experts on 64 ranks, for tests that change nothing of it."""
    service = MadeUpService(LAYERS, EXPERTS, RANKS)
    with served(service) as url:
        yield service, url


def cells(page: Page) -> np.ndarray:
    """uint8 [L, E, 3]: the colour in the middle of each expert's cell."""
    width, height, ratio, data = page.evaluate(
        """() => {
          const canvas = document.querySelector("#heat canvas");
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const text = Array.from(data, (value) => String.fromCharCode(value)).join("");
          return [canvas.width, canvas.height, devicePixelRatio, btoa(text)];
        }"""
    )
    canvas = np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[..., :3]
    left, top, right, bottom = (round(edge * ratio) for edge in (34, 16, 2, 2))
    x_E = left + (np.arange(EXPERTS) + 0.5) * (width - left - right) / EXPERTS
    y_L = top + (np.arange(LAYERS) + 0.5) * (height - top - bottom) / LAYERS
    return canvas[y_L.astype(int)[:, None], x_E.astype(int)[None]]


def expected_colours(page: Page, times_LE: np.ndarray) -> np.ndarray:
    """float [L, E, 3]: as the legend says, five colours in even steps of the root of load, 8 times the mean last."""
    style = "getComputedStyle(document.documentElement)"
    stops = [page.evaluate(f"{style}.getPropertyValue('--ramp-{at}')").strip() for at in range(5)]
    stops_S3 = np.array([[int(stop[at : at + 2], 16) for at in (1, 3, 5)] for stop in stops])
    place_LE = 4 * np.minimum(np.sqrt(times_LE / 8), 1)
    return np.stack([np.interp(place_LE, range(5), stops_S3[:, channel]) for channel in range(3)], -1)


def shown_loads(page: Page, url: str) -> tuple[np.ndarray, np.ndarray]:
    """(float [L, E]: picks to the mean of the layer, what `cells` finds) of a moment at which the page shows these."""

    def same() -> tuple[np.ndarray, np.ndarray] | None:
        load = page.request.get(f"{url}watch").json()["load"]
        page.evaluate("() => new Promise(requestAnimationFrame)")
        found = cells(page)
        if f" {load['tokens']:,} tokens of" not in page.inner_text("#experts-note"):
            return None
        counts_LE = np.array(load["counts"]).reshape(LAYERS, EXPERTS)
        return counts_LE / counts_LE.mean(1, keepdims=True), found

    return wait_for(same, 60, "the page to show the loads that there are")


def test_the_map_is_as_dark_as_the_load_and_words_say_the_same(
    browser: Browser, large: tuple[MadeUpService, str]
) -> None:
    service, url = large
    with Opened(browser, url) as opened:
        page = opened.shown()
        times_LE, found = shown_loads(page, url)
        assert np.corrcoef(times_LE.ravel(), service.share_LE.ravel())[0, 1] > 0.95, "as the traffic is made up"
        assert np.abs(found - expected_colours(page, times_LE)).max() < 2, "but for rounding"
        assert len(np.unique(found.reshape(-1, 3), axis=0)) > 50, "many shades"
        hottest = int(np.argmax(times_LE))
        layer, expert = divmod(hottest, EXPERTS)
        name, more = page.locator("#hottest li").first.inner_text().split(" ", 1)
        assert name == f"{layer + 3}/{expert}", "layers have the model's numbers"
        assert float(more.split("\u00d7")[0]) == pytest.approx(times_LE[layer, expert], rel=0.1)
        page.locator("#hottest button").first.click()
        words = page.inner_text("#readout")
        ranks = np.flatnonzero(service.held_RLE[:, layer, expert])
        assert words.startswith(f"Layer {layer + 3}, expert {expert}")
        assert all(str(rank) in words.rpartition("rank")[2] for rank in ranks)
        assert ("sole copy" in words) == (len(ranks) == 1)
        assert opened.problems == []


def test_replicas_are_shown_and_a_shards_experts_are_framed(browser: Browser, large: tuple[MadeUpService, str]) -> None:
    service, url = large
    with Opened(browser, url) as opened:
        page = opened.shown()
        page.get_by_role("button", name="Replicas").click()
        until(page, "document.querySelector('#legend').textContent.includes('sole copy')")
        page.evaluate("() => new Promise(requestAnimationFrame)")
        copies_LE, shade_LE = service.held_RLE.sum(0), luminance(cells(page))
        assert shade_LE[copies_LE == 1].min() > shade_LE[copies_LE == 2].max() > 0
        before = pixels_of(page.locator("#heat").screenshot())
        page.get_by_role("button", name="Rank 5", exact=True).click()
        held = int(service.held_RLE[5].sum())
        until(page, f"document.querySelector('#readout').textContent.includes('holds {held} experts')")
        sole = int((service.held_RLE[5] & (copies_LE == 1)).sum())
        assert f"{sole} of them nobody else has" in page.inner_text("#readout")
        page.evaluate("() => new Promise(requestAnimationFrame)")
        after = pixels_of(page.locator("#heat").screenshot())
        assert (before != after).any(-1).sum() > 5 * held, "a frame around each of them"
        assert "GPU-3f" in page.inner_text("#shard-detail")


def test_a_frame_costs_a_few_calls_however_many_experts(browser: Browser, large: tuple[MadeUpService, str]) -> None:
    _, url = large
    with Opened(browser, url) as opened:
        page = opened.shown()
        page.evaluate("window.drawn = {}")
        page.locator("#heat canvas").focus()
        for _ in range(40):
            page.keyboard.press("ArrowRight")
        page.evaluate("() => new Promise(requestAnimationFrame)")
        drawn = page.evaluate("window.drawn")
        frames = drawn["drawImage"]
        assert frames <= 45
        assert drawn.get("putImageData", 0) <= 2, "the picture is painted when data come, not when a cursor moves"
        assert drawn["stroke"] <= 6 * frames
        assert drawn["fillText"] <= 60 * frames
        assert drawn.get("fillRect", 0) == 0, "no call an expert"
        assert page.evaluate("document.getElementsByTagName('*').length") < 2500, (
            "nodes grow with shards, not with experts"
        )


def test_nothing_comes_from_elsewhere_and_the_console_is_quiet(
    browser: Browser, large: tuple[MadeUpService, str]
) -> None:
    _, url = large
    with Opened(browser, url) as opened:
        opened.shown()
        assert opened.problems == []
        assert {request for request in opened.requests if not request.startswith(url)} == set()
        names = {request.removeprefix(url).partition("?")[0] for request in opened.requests}
        assert {"", "watch", "page/main.js", "page/style.css"} <= names


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1440, 2560])
def test_it_fits_the_window_and_every_text_can_be_read(
    browser: Browser, large: tuple[MadeUpService, str], scheme: str, width: int, tmp_path: Path
) -> None:
    _, url = large
    with Opened(browser, url, width, 900, scheme) as opened:
        page = opened.shown()
        page.get_by_role("button", name="Rank 3", exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        least = page.evaluate(CONTRAST)[:5]
        assert least[0][0] >= 4.5, least
        picture = pixels_of(page.screenshot(full_page=True))
        assert picture.shape[1] == width
        page_colour = picture[2, 2]
        assert (luminance(page_colour[None])[0] > 0.5) == (scheme == "light")
        inked = (np.abs(picture.astype(int) - page_colour).sum(-1) > 24).mean()
        assert inked > 0.05, "not blank"
        for name in ("lines", "heat", "shards", "routers", "moves", "events", "pilot"):
            box = page.locator(f"#{name}").bounding_box()
            assert box is not None
            assert box["width"] > 300, name
            assert box["height"] > 20, name
            assert box["x"] + box["width"] <= width + 1, name


def test_a_loss_a_move_and_the_return_are_seen_as_they_come(browser: Browser) -> None:
    service = MadeUpService(4, 32, 3, routers=2)
    with served(service) as url, Opened(browser, url) as opened:
        page = opened.shown()
        assert page.inner_text("#state").startswith("3 of 3 shards")
        service.lose(1)
        page.wait_for_selector('[data-state="lost"]')
        assert page.inner_text("#state").startswith("2 of 3 shards")
        assert "Without rank 1" in page.inner_text("#notices")
        events = page.get_by_role("list", name="Events")
        events.get_by_text("Rank 1: a router gave it up").wait_for()
        events.get_by_text("Rank 1: no link: the connection ended (2 routers)").wait_for()
        assert "gave it up" in (page.text_content("#said") or "") or "no link" in (page.text_content("#said") or "")
        until(page, "document.querySelector('.plot .marks').getAttribute('d') !== ''")
        service.migration = service.moving(7, "drain of rank 1", left=30)
        page.get_by_text("Towards target 7 (drain of rank 1)").wait_for()
        assert page.locator("progress").is_visible()
        service.migration = service.moving(7, "drain of rank 1", left=9)
        page.get_by_text("4 copies in flight, 9 of 9 left (396 MB)").wait_for()
        service.find(1)
        until(page, "!document.querySelector('[data-state=lost]')")
        assert page.inner_text("#notices") == ""
        assert opened.problems == []


def test_a_router_says_of_how_many_workers_its_engine_is(browser: Browser) -> None:
    service = MadeUpService(4, 32, 3, routers=3)
    two, one, silent = service.routers
    service.workers[two] = 2
    service.silent_routers = {silent}
    with served(service) as url, Opened(browser, url) as opened:
        page = opened.shown()
        column = page.locator("#routers thead th").all_inner_texts().index("Workers")
        shown = {
            row.locator("th").get_attribute("title"): row.locator("th, td").nth(column).inner_text()
            for row in page.locator("#routers tbody tr").all()
        }
        assert shown == {two: "2", one: "1", silent: "\u2013"}
        assert opened.problems == []


def test_text_from_the_service_is_never_markup(browser: Browser) -> None:
    service = MadeUpService(4, 32, 3)
    service.event("lost", "<img src=x onerror=alert(1)><b>bold</b>", 1)
    service.migration = service.moving(2, "<script>alert(2)</script>", left=1)
    with served(service) as url, Opened(browser, url) as opened:
        page = opened.shown()
        assert "<b>bold</b>" in page.inner_text("#events")
        assert "<script>alert(2)</script>" in page.inner_text("#moves")
        assert page.locator("main img, main script, #events b").count() == 0
        assert opened.problems == []


def test_a_key_is_asked_for_kept_in_the_tab_and_sent_nowhere_else(browser: Browser) -> None:
    service = MadeUpService(4, 32, 3)
    with served(service, admin_keys=("admin-key",), api_keys=("reader-key",)) as url, Opened(browser, url) as opened:
        page = opened.page
        page.wait_for_selector("#key-form:not([hidden])")
        assert page.evaluate("document.activeElement.id") == "key"
        for key, told in (("wrong", "not a key of the console"), ("reader-key", "takes an admin key")):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            page.get_by_text(told).wait_for()
            assert not page.locator("#main").is_visible()
        page.fill("#key", "admin-key")
        page.keyboard.press("Enter")
        opened.shown()
        assert not page.locator("#key-form").is_visible()
        assert all("admin-key" not in request for request in opened.requests), "not in an address"
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.reload()
        opened.shown()
        page.get_by_role("button", name="Forget the key").click()
        page.wait_for_selector("#key-form:not([hidden])")
        assert page.evaluate("sessionStorage.length") == 0


def test_silence_is_said_with_its_beginning_and_ends_when_the_console_is_back(browser: Browser) -> None:
    service = MadeUpService(4, 32, 3)
    with served(service) as url, Opened(browser, url) as opened:
        page = opened.shown()
        away = lambda route: route.abort()  # noqa: E731
        page.route("**/watch?*", away)
        page.get_by_text("No answer since").wait_for()
        first = page.inner_text("#notices")
        until(page, "/in (4|8|15) s/.test(document.querySelector('#notices').textContent)")
        assert first.partition("(")[0] == page.inner_text("#notices").partition("(")[0], "since the same moment"
        assert page.locator("html.stale").count() == 1
        page.unroute("**/watch?*", away)
        page.get_by_role("button", name="Ask now").click()
        until(page, "document.querySelector('#notices').textContent === ''")
        assert page.locator("html.stale").count() == 0


def test_a_page_that_is_hidden_asks_nothing(browser: Browser) -> None:
    hide = """(hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    service = MadeUpService(4, 32, 3)
    with served(service) as url, Opened(browser, url, clock=True) as opened:
        page = opened.shown()
        page.evaluate(hide, True)
        page.wait_for_load_state("networkidle")
        asked = len(opened.requests)
        page.clock.run_for(60_000)
        page.wait_for_load_state("networkidle")
        assert len(opened.requests) == asked
        with page.expect_request("**/watch?*"):
            page.evaluate(hide, False)


def test_what_the_page_says_of_its_source_is_what_was_counted(browser: Browser) -> None:
    service = MadeUpService(4, 32, 3, routers=2)
    with served(service) as url, Opened(browser, url) as opened:
        page = opened.shown()
        note = page.inner_text("#experts-note")
        assert "4 layers \u00d7 32 experts" in note
        assert "2 routers" in note
        assert "every one counted" in note
        with page.expect_response("**/watch?*") as answer:
            pass
        load = page.request.get(f"{url}watch").json()["load"]
        assert answer.value.ok
        assert sum(load["counts"]) == pytest.approx(4 * TOP_K * load["tokens"], rel=0.01), "all picks of all tokens"
