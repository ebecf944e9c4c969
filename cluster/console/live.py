"""The live page: its files, which anybody may have, and what it shows, which the keys of the console guard."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import Response

from cluster.console.watch import Watch
from cluster.controller.client import ControllerClient
from cluster.http.errors import error_response
from cluster.router.client import RouterClient

FILES = "cluster.console.page"
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # an upgrade of the console is one of the page
}

LIVE: dict[str, Callable[[FastAPI], Callable[..., Any]]] = {
    "page": lambda app: app.get("/", include_in_schema=False),
    "file": lambda app: app.get("/page/{name}", include_in_schema=False),
    "watch": lambda app: app.get("/watch"),
}

Name = Annotated[str, Query(max_length=400)]


@functools.cache
def page_files() -> dict[str, bytes]:
    """The files of the page by name."""
    found = [entry for entry in resources.files(FILES).iterdir() if entry.name.rpartition(".")[2] in TYPES]
    return {entry.name: entry.read_bytes() for entry in found}


def open_paths() -> frozenset[str]:
    """Paths of the page's files, and the one without a slash, which leads to it. There is no data in them."""
    return frozenset({"", "/", *(f"/page/{name}" for name in page_files())})


class Live:
    """The handlers of LIVE."""

    def __init__(self, controller: ControllerClient, routers: Sequence[RouterClient]) -> None:
        self._watch = Watch(controller, routers)

    async def page(self) -> Response:
        """The page."""
        return _file("index.html")

    async def file(self, name: str) -> Response:
        """A style sheet or module of the page."""
        if name not in page_files():
            return error_response(404, f"the page has no file {name!r}")
        return _file(name)

    async def watch(self, since: float = 0.0, placement: Name = "", load: Name = "", log: Name = "") -> Response:
        """What the page shows. One look a second at the controller and all routers serves all who ask.

        Time lines have what came after `since` (seconds since 1970). The large parts are left out for who names those
        that there are: `placement`, `load`, `log`.
        """
        body = await self._watch.ask(since, placement, load, log)
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})


def _file(name: str) -> Response:
    content_type = f"{TYPES[name.rpartition('.')[2]]}; charset=utf-8"
    return Response(page_files()[name], headers={**HEADERS, "Content-Type": content_type})
