"""The live page of a running service, in a real browser, while a shard is killed and another one is drained."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from benchmarks.serving.endless_streams import Streams
from tests.support.serve.deploying import still
from tests.support.serve.service import API_KEY, Service
from tests.support.waiting import wait_for

pytest.importorskip("playwright", reason="playwright drives the browser")
from tests.support.chromium import CHROMIUM, Opened, chromium, until

PROMPTS = [[11, 12, 13, 14], [21, 22, 23, 24, 25], [31, 32, 33], [41]]
LONG_MS = 240_000.0  # a shard's start, on a machine that does other things too
CALL = """
import ray
from ray import serve
ray.init(log_to_driver=False)
print("answer:", repr(serve.get_app_handle("experts").drain.remote({rank}, {back}).result(timeout_s=60)))
"""


def drain(service: Service, rank: int, back: bool) -> None:
    """As an admin would over HTTP; this service's console has no admin keys."""
    assert "answer: ''" in service.run("python", "-c", CALL.format(rank=rank, back=back))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_loss_and_a_drain_are_seen_on_the_page_as_they_happen(service: Service, tmp_path: Path) -> None:
    wait_for(lambda: still(service, 3), 120, "the service to be still")
    pids = {rank: shard["pid"] for rank, shard in service.shards().items()}
    streams = Streams(service.url, "tiny-moe", PROMPTS, max_tokens=64, api_key=API_KEY)
    with streams.running() as running, chromium() as browser, Opened(browser, f"{service.url}/expertmesh") as opened:
        page = opened.page
        page.set_default_timeout(LONG_MS)
        wait_for(running.warm, 60, "the first text of every stream")
        page.fill("#key", API_KEY)
        page.keyboard.press("Enter")
        page = opened.shown()
        assert page.url.endswith("/expertmesh/")
        assert page.inner_text("#state").startswith("3 of 3 shards \u00b7 1 router \u00b7 every expert is served")
        assert page.inner_text("#experts-note").startswith("4 layers \u00d7 32 experts")
        until(page, "Number(document.querySelector('.value b').textContent.replace(',', '')) > 0")
        events = page.get_by_role("list", name="Events")
        starts = events.get_by_text("Rank 1: it serves").count()

        os.kill(pids[1], signal.SIGKILL)
        page.locator('[data-state="lost"], [data-state="missing"], [data-state="joining"]').first.wait_for()
        page.screenshot(path=tmp_path / "lost.png", full_page=True)
        events.get_by_text("Rank 1: no link").first.wait_for()
        served_again = events.get_by_text("Rank 1: it serves")
        served_again.nth(starts).wait_for()
        assert "s after the loss" in served_again.first.inner_text()
        until(page, "document.querySelector('.plot .marks').getAttribute('d') !== ''")
        page.locator('#shards [data-state="serving"]').nth(2).wait_for()
        wait_for(lambda: still(service, 3), LONG_MS / 1000, "the successor to be filled")

        drain(service, 2, back=False)
        events.get_by_text("Rank 2: it drains, as it was told to").wait_for()
        page.locator('#moves tr:has-text("shards -2")').first.wait_for()
        page.screenshot(path=tmp_path / "drain.png", full_page=True)
        drained = lambda: not service.status()["controller"]["migration"]["moving"]  # noqa: E731
        wait_for(drained, LONG_MS / 1000, "the drained shard to be empty")
        copies = json.loads(service.get("/expertmesh/history")[1])["history"][-1]["copies"]
        until(
            page,
            f"[...document.querySelectorAll('#moves tbody tr td')].some((cell) => cell.textContent === '{copies}')",
        )
        until(page, "document.querySelectorAll('#shards tbody tr')[2].children[3].textContent === '0'")
        drain(service, 2, back=True)
        events.get_by_text("Rank 2: it takes experts again").wait_for()
        wait_for(lambda: still(service, 3), LONG_MS / 1000, "the service to be still")
        page.get_by_text("Nothing moves: every expert is where").wait_for()
        page.screenshot(path=tmp_path / "after.png", full_page=True)
        refused = [problem for problem in opened.problems if "401" not in problem]  # before there was a key
        assert refused == []
    everything = running.window(0, float("inf"))
    assert everything.failed == []
    assert everything.changed == 0
