"""Looks at the service once a period for all who watch the live page, and at nothing when nobody does."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Sequence

from cluster.console import shown
from cluster.console.growth import FIELDS, Growth, Loads, Point, pairs_by_rank, point
from cluster.console.router_events import RouterEvents
from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.controller.news import News
from cluster.mesh.messages import WatchView
from cluster.router.client import RouterClient
from cluster.router.messages import RouterLive

logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0
LINGER_S = 15.0  # after the last question of a page
ANSWER_S = 3.0  # for the controller and for routers
POINTS = 900  # kept: a quarter of an hour
LOADS_EVERY = 5  # looks, once the first ones are there
COUNT_S = 30.0  # how much longer than anybody asks a router counts
WINDOW_S = 60.0  # of loads, by expert and by rank
LONGEST_GAP_S = 5.0  # between two looks; growth over more is no point of a time line


class Watch:
    """The last look, and what is kept of those before. For one event loop."""

    def __init__(self, controller: ControllerClient, routers: Sequence[RouterClient]) -> None:
        self._controller, self._routers = controller, routers
        self._task: asyncio.Task[None] | None = None
        self._asked_s, self._looked_s = float("-inf"), float("-inf")  # on time.monotonic()
        self._looks, self._news = 0, News()
        self._lives: list[RouterLive] = []
        self._errors: list[str] = []
        self._view: WatchView | None = None
        self._view_at = 0.0  # seconds since 1970
        self._before: dict[str, tuple[RouterLive, float]] = {}
        self._growth: deque[Growth] = deque(maxlen=round(WINDOW_S / PERIOD_S))
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._loads = Loads(WINDOW_S)
        self._router_events = RouterEvents()
        self._placement, self._placement_name, self._epoch = "null", "", ("", -1)
        self._load, self._load_name = "null", ""

    async def ask(self, since: float, placement: str, load: str, log: str) -> bytes:
        """What a page shows, as JSON. It has points up to `since`, and the parts of these names already."""
        self._asked_s = time.monotonic()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow())
        if self._asked_s - self._looked_s > LONGEST_GAP_S:
            await self._news.next(2 * ANSWER_S)
        status = None if self._view is None else self._view.status
        log_name = f"{self._epoch[0]}:{self._view.events[-1].number if self._view and self._view.events else 0}"
        log_name += f":{self._router_events.number}:{shown.changes(self._view)}"
        body = {
            "now": round(time.time(), 3),
            "period_s": PERIOD_S,
            "controller": None if status is None else shown.controller(status),
            "controller_at": self._view_at,
            "shards": [] if status is None else shown.shards(status, pairs_by_rank(self._growth)),
            "routers": shown.routers(self._lives, status),
            "errors": self._errors,
            "fields": FIELDS,
            "points": [each for each in self._points if (each[0] or 0.0) > since],
            "log_name": log_name,
            "log": None if log == log_name else shown.log(self._view, self._router_events.events),
            "placement_name": self._placement_name,
            "load_name": self._load_name,
        }
        # The two large parts are text since the look that found them.
        placed = "null" if placement == self._placement_name else self._placement
        loaded = "null" if load == self._load_name else self._load
        plain = json.dumps(body, separators=(",", ":"))
        return f'{plain[:-1]},"placement":{placed},"load":{loaded}}}'.encode()

    async def _follow(self) -> None:
        """Look again and again until nobody asks."""
        while time.monotonic() - self._asked_s < LINGER_S:
            began_s = time.monotonic()
            try:
                await self._look(began_s)
            except Exception:
                logger.exception("a look for the live page failed; the next one follows")
            await asyncio.sleep(max(PERIOD_S - (time.monotonic() - began_s), 0.1))

    async def _look(self, now_s: float) -> None:
        wants_loads = self._looks % LOADS_EVERY == 0 or self._load == "null"
        self._looks += 1
        watch_s = COUNT_S if wants_loads else 0.0
        asked = asyncio.gather(*(client.live(watch_s, timeout_s=ANSWER_S) for client in self._routers))
        view, answers = await asyncio.gather(self._ask_controller(), asked)
        self._errors = [error for _, missing in answers for error in missing]
        if view is None:
            self._errors.append("the placement controller does not answer")
        else:
            self._take(view)
        self._lives = sorted((live for found, _ in answers for live in found), key=lambda live: live.status.router_id)
        self._router_events.note([live.status for live in self._lives], time.time())
        now_s, gap_s = time.monotonic(), time.monotonic() - self._looked_s
        if gap_s <= LONGEST_GAP_S:
            self._growth.append(Growth.of(self._before, self._lives, now_s))
            self._points.append(point(time.time(), list(self._growth), self._lives))
        else:
            self._growth.clear()
        self._before.update({live.status.router_id: (live, now_s) for live in self._lives})
        if wants_loads:
            told = {live.status.router_id: live.loads for live in self._lives if live.loads is not None}
            self._loads.add(told, now_s)
            self._load, self._load_name = json.dumps(self._loads.view(), separators=(",", ":")), f"{time.time():.3f}"
        self._looked_s = now_s
        self._news.announce()

    async def _ask_controller(self) -> WatchView | None:
        try:
            return await self._controller.watch(*self._epoch, timeout_s=ANSWER_S)
        except ControllerLostError as error:
            logger.warning("%s", error)
            return None

    def _take(self, view: WatchView) -> None:
        self._view, self._view_at = view, round(time.time(), 3)
        if view.published is not None:
            self._epoch = (view.status.term, view.published.epoch)
            self._placement = json.dumps(shown.placement(view.published), separators=(",", ":"))
            self._placement_name = f"{self._epoch[0]}:{self._epoch[1]}"
