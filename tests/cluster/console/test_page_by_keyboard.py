"""The live page in a real browser without a mouse: what the keyboard reaches, and keeps while the page changes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.live_service import MadeUpService, served

pytest.importorskip("playwright", reason="playwright drives the browser")
from playwright.sync_api import Browser

from tests.support.chromium import CHROMIUM, Opened, chromium, until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def test_the_keyboard_reaches_everything_and_the_map_has_words(browser: Browser) -> None:
    service = MadeUpService(58, 256, 64)
    with served(service) as url, Opened(browser, url) as opened:
        page = opened.shown()
        reached = []
        for _ in range(24):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent"))
        text = "\n".join(reached)
        for wanted in ("Skip to shards", "Output:", "Load", "Replicas", "58 layers of 256 experts", "Rank 0"):
            assert wanted in text, text
        page.locator("#heat canvas").focus()
        for key in ("Home", "PageUp", "ArrowDown", "ArrowDown", "ArrowRight"):
            page.keyboard.press(key)
        assert page.inner_text("#readout").startswith("Layer 5, expert 1 ")
        page.keyboard.press("Enter")
        rank = int(np.flatnonzero(service.held_RLE[:, 2, 1])[0])
        chosen = page.locator('.rank button[aria-pressed="true"]')
        assert chosen.inner_text() == str(rank)
        page.locator(".plot").first.focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator(".plot .crosshair").first.get_attribute("d")
        unnamed = page.evaluate(
            """[...document.querySelectorAll("button, input, canvas, [tabindex], meter, progress")].filter((node) =>
              node.checkVisibility() && node.ariaHidden !== "true" && !node.ariaLabel && !node.textContent.trim() &&
              !node.getAttribute("aria-labelledby") && !node.labels?.length).map((node) => node.outerHTML)"""
        )
        assert unnamed == []


def test_the_list_of_hot_experts_keeps_the_focus_when_others_get_hot(browser: Browser) -> None:
    service = MadeUpService(4, 16, 4)
    with served(service) as url, Opened(browser, url) as opened:
        page = opened.shown()
        button = page.locator("#hottest button").first
        button.focus()
        before = button.inner_text()
        layer, expert = divmod(int(service.share_LE.argmin()), 16)
        service.share_LE[layer] = 1e-3
        service.share_LE[layer, expert] = 1
        until(page, f"document.querySelector('#hottest button').textContent === '{layer + 3}/{expert}'")
        assert before != button.inner_text()
        assert page.evaluate("document.activeElement === document.querySelector('#hottest button')")
        page.keyboard.press("Enter")
        assert page.inner_text("#readout").startswith(f"Layer {layer + 3}, expert {expert} ")
