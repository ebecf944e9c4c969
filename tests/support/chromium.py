"""A real browser for the live page: Debian's Chromium, driven by playwright, with what went wrong in it noted."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.support.waiting import wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TIMEOUT_S = 60.0

# Ratio of each visible text's colour to what is behind it, the least first.
CONTRAST = """() => {
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    if (node.closest(".unseen, .skip, noscript, script")) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walk.currentNode.textContent.slice(0, 40)]);
  }
  return found.sort((one, other) => one[0] - other[0]);
}"""
# Counts what the canvas is asked to do, without changing it.
COUNT_CALLS = """
window.drawn = {};
for (const name of ["drawImage", "putImageData", "stroke", "fillText", "fillRect", "fill"]) {
  const call = CanvasRenderingContext2D.prototype[name];
  CanvasRenderingContext2D.prototype[name] = function (...all) {
    window.drawn[name] = (window.drawn[name] || 0) + 1;
    return call.apply(this, all);
  };
}
"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """One browser, without a window."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield running
        finally:
            running.close()


class Opened:
    """A page with what went wrong in it."""

    def __init__(
        self,
        browser: Browser,
        url: str,
        width: int = 1440,
        height: int = 900,
        scheme: str = "light",
        clock: bool = False,
    ) -> None:
        """`clock`: the page's clock can be put forward."""
        shape: Any = {"width": width, "height": height}
        self.context = browser.new_context(viewport=shape, color_scheme=scheme)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(1000 * TIMEOUT_S)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.add_init_script(COUNT_CALLS)
        if clock:
            self.page.clock.install()
        self.page.goto(url)

    def _heard(self, message: ConsoleMessage) -> None:
        if "willReadFrequently" not in message.text:  # tests read the canvas back; the page does not
            self.problems.append(f"{message.type}: {message.text}")

    def shown(self) -> Page:
        """The page, once it shows loads of experts."""
        self.page.wait_for_selector("#hottest li")
        return self.page

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def until(page: Page, condition: str) -> None:
    """Playwright's own way to wait for a script's condition needs `eval`, which the page's policy forbids."""
    wait_for(lambda: page.evaluate(condition), TIMEOUT_S, condition)


def pixels_of(data: bytes) -> np.ndarray:
    """uint8 [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def luminance(colour: np.ndarray) -> np.ndarray:
    """Of sRGB colours [..., 3], 0 to 1."""
    share = colour / 255
    linear = np.where(share <= 0.03928, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])
