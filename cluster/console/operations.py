"""Endpoints that show and change where experts are: target, history, apply, drain, pause."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.http.errors import RefusedError, UnavailableError, error_response
from placement.placement import Placement

READ_TIMEOUT_S = 5.0
CHANGE_TIMEOUT_S = 60.0  # the rounds of a large placement take seconds to plan
MAX_PLACEMENT_BYTES = 64 * 2**20  # 58 layers on 1,024 ranks with 8 slots take 3 MB
PLACEMENT_KEYS = ("num_ranks", "num_nodes", "num_experts", "nodes", "partial", "physical_to_logical_map")

OPERATIONS: dict[str, Callable[[FastAPI], Callable[..., Any]]] = {
    "placement": lambda app: app.get("/placement"),
    "target": lambda app: app.get("/placement/target"),
    "history": lambda app: app.get("/history"),
    "apply": lambda app: app.post("/placement"),
    "drain": lambda app: app.post("/shards/{rank}/drain"),
    "undrain": lambda app: app.post("/shards/{rank}/undrain"),
    "pause": lambda app: app.post("/migration/pause"),
    "resume": lambda app: app.post("/migration/resume"),
}

T = TypeVar("T")


class Operations:
    """The handlers of OPERATIONS. `AdminGate` keeps those who may not change anything from them."""

    def __init__(self, controller: ControllerClient) -> None:
        self._controller = controller

    async def placement(self) -> Response:
        """The placement: slots of every layer, and the experts of each rank."""
        view = await _answer(self._controller.placement(timeout_s=READ_TIMEOUT_S))
        return JSONResponse(view.to_dict())

    async def target(self) -> Response:
        """The placement to reach, with its version and why it is what it is; 404 before the first."""
        status, view = await asyncio.gather(
            _answer(self._controller.status(timeout_s=READ_TIMEOUT_S)),
            _answer(self._controller.placement(timeout_s=READ_TIMEOUT_S)),
        )
        if view.target is None:
            return error_response(404, "there is no target yet: the shards of the first placement are not all there")
        return JSONResponse(
            {
                "target_version": view.target_version,
                "origin": status.migration.origin if status.migration.target_version == view.target_version else "",
                "target": view.target.to_json(),
            }
        )

    async def history(self) -> Response:
        """What became of each target in this life of the controller, and of the autopilot's plans, oldest first."""
        entries, decisions = await asyncio.gather(
            _answer(self._controller.history(timeout_s=READ_TIMEOUT_S)),
            _answer(self._controller.decisions(timeout_s=READ_TIMEOUT_S)),
        )
        return JSONResponse(
            {
                "history": [entry.to_dict() for entry in entries],
                "autopilot": [decision.to_dict() for decision in decisions],
            }
        )

    async def apply(self, request: Request, dry_run: bool = False) -> Response:
        """Work towards the placement in the body, or (`dry_run`) say what that would take."""
        placement = await asyncio.to_thread(_read_placement, await _read_body(request))
        view = await _answer(self._controller.apply(placement, dry_run, timeout_s=CHANGE_TIMEOUT_S))
        if not view.accepted:
            return error_response(409, f"the placement does not fit: {view.reason}", code="placement_refused")
        return JSONResponse(view.to_dict(), status_code=200 if dry_run else 202)

    async def drain(self, rank: int) -> Response:
        """Let the other shards take over what the shard at `rank` has."""
        return await self._drain(rank, back=False)

    async def undrain(self, rank: int) -> Response:
        """Let a drained shard take experts again."""
        return await self._drain(rank, back=True)

    async def pause(self) -> Response:
        """Move no more experts after the round at hand."""
        return await self._pause(True)

    async def resume(self) -> Response:
        """Go on moving experts."""
        return await self._pause(False)

    async def _drain(self, rank: int, back: bool) -> Response:
        why_not = await _answer(self._controller.drain(rank, back, timeout_s=CHANGE_TIMEOUT_S))
        if why_not:
            return error_response(409, why_not, param="rank", code="drain_refused")
        return JSONResponse({"rank": rank, "draining": not back}, status_code=202)

    async def _pause(self, paused: bool) -> Response:
        await _answer(self._controller.pause(paused, timeout_s=CHANGE_TIMEOUT_S))
        return JSONResponse({"paused": paused})


async def _answer(call: Awaitable[T]) -> T:
    """What the controller answers; UnavailableError, which becomes a 503, without it."""
    try:
        return await call
    except ControllerLostError as error:
        raise UnavailableError(str(error)) from error


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_PLACEMENT_BYTES:
            raise RefusedError(
                f"the request body has more than {MAX_PLACEMENT_BYTES} bytes, expected a placement", status=413
            )
    return bytes(body)


def _read_placement(body: bytes) -> Placement:
    """RefusedError, which becomes a 400 and names the key, if the body is no placement."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the request body is not JSON: {error}", code="invalid_json") from None
    try:
        return Placement.from_json(data)
    except (ValueError, OverflowError) as error:
        raise RefusedError(str(error), param=_key_named(data, str(error)), code="invalid_value") from None


def _key_named(data: Any, message: str) -> str | None:
    """The key of a placement that a message of `Placement` is about; where it names a layer or slots, the map."""
    if not isinstance(data, dict):
        return None
    for key in PLACEMENT_KEYS:
        if message.startswith(f"{key} ") or f"has no {key!r}" in message:
            return key
    return "num_nodes" if message.endswith(" nodes") else "physical_to_logical_map"
