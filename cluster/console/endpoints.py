"""Endpoints for people and their tools: status, routing trace.

Those of `operations`, `usage` and `live` join them in one app.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import JSONResponse, Response

from cluster.config.apps import ConsoleAppConfig
from cluster.console.admin import AdminGate
from cluster.console.live import LIVE, Live, open_paths
from cluster.console.operations import OPERATIONS, Operations
from cluster.console.usage import USAGE, Usage
from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.http.connections import open_to_origins
from cluster.http.errors import OpenAIApp, add_error_handlers, error_response
from cluster.http.gate import OPEN_PATHS, Gate
from cluster.keys.sources import source_of
from cluster.mesh.messages import ControllerStatus
from cluster.router.client import RouterClient
from experts.protocol.status import RouterStatus

logger = logging.getLogger("ray.serve")

Reader = Annotated[str, Query(max_length=64, pattern=r"^[\w.-]*$")]
STATUS_TIMEOUT_S = 5.0  # for the status of the controller and of all routers
TRACE_TIMEOUT_S = 120.0  # a worker packs its whole sample between two steps

ENDPOINTS: dict[str, Callable[[FastAPI], Callable[..., Any]]] = {
    "status": lambda app: app.get("/status"),
    "trace": lambda app: app.get("/trace"),
    "clear_trace": lambda app: app.delete("/trace", status_code=204),
}


def console_app(console: Console) -> FastAPI:
    """The FastAPI app of one replica. Raises ValueError if http names a file or a variable that holds no key."""
    http = console.config.http
    source = source_of(http)
    app = OpenAIApp(title="expertmesh console")
    add_error_handlers(app, http.retry_after_s)
    page = open_paths()
    app.add_middleware(AdminGate, keys=source.ring, named=http.names_keys, open_paths=page)
    app.add_middleware(
        Gate, keys=source.ring, max_pending=0, retry_after_s=http.retry_after_s, open_paths=OPEN_PATHS | page
    )
    app.user_middleware[:0] = open_to_origins(http.cors_origins)
    for name, route in ENDPOINTS.items():
        route(app)(getattr(console, name))
    for name, route in OPERATIONS.items():
        route(app)(getattr(console.operations, name))
    for name, route in USAGE.items():
        route(app)(getattr(console.usage, name))
    for name, route in LIVE.items():
        route(app)(getattr(console.live, name))
    return app


class Console:
    """The handlers of ENDPOINTS. `ledgers`: handles of the ledgers of keys, one for each of `routers`."""

    def __init__(
        self,
        config: ConsoleAppConfig,
        controller: ControllerClient,
        routers: Sequence[RouterClient],
        ledgers: Sequence[Any] = (),
    ) -> None:
        self.config = config
        self.operations = Operations(controller)
        self.usage = Usage(routers, ledgers)
        self.live = Live(controller, routers)
        self._controller = controller
        self._routers = routers

    async def status(self) -> JSONResponse:
        """What the controller and each router know (epochs, shards, lost ranks, counters), and who did not answer."""
        routers, controller, errors = await self._ask_all()
        return JSONResponse(
            {
                "controller": None if controller is None else controller.to_dict(),
                "routers": [router.to_dict() for router in routers],
                "errors": errors,
            }
        )

    async def trace(self, router: str = "", reader: Reader = "") -> Response:
        """Sampled routing decisions (.npz) of the router with the id `router`, by default of all as one trace.

        `reader`: a sample of its own, that began when it was last cleared; without a name the one that all share.
        """
        answers = await asyncio.gather(*(client.traces(reader, timeout_s=TRACE_TIMEOUT_S) for client in self._routers))
        samples = {sample.router_id: sample for answer in answers for sample in answer}
        if not samples:
            return self._no_router()
        if router and router not in samples:
            return error_response(404, f"no router is named {router!r}; there are {sorted(samples)}", param="router")
        wanted = [samples[name] for name in ([router] if router else sorted(samples))]
        if all(sample.npz is None for sample in wanted):
            return _no_trace()
        recorded = [sample.npz for sample in wanted if sample.npz]
        if not recorded:
            return error_response(404, "no tokens have been recorded yet: send requests first", code="no_trace")
        trace = recorded[0] if len(recorded) == 1 else await asyncio.to_thread(_merged, recorded)
        return Response(trace, media_type="application/octet-stream")

    async def clear_trace(self, reader: Reader = "", end: bool = False) -> Response:
        """Let a reader's sample begin anew at every router, or (`end`) drop it; other readers keep theirs."""
        if end and not reader:
            return error_response(422, "the sample that all share does not end: name a reader", param="reader")
        answers = await asyncio.gather(
            *(client.clear_traces(reader, end, timeout_s=TRACE_TIMEOUT_S) for client in self._routers)
        )
        recording = [router for answer in answers for router in answer]
        if not recording:
            return self._no_router()
        return Response(status_code=204) if any(recording) else _no_trace()

    def _no_router(self) -> Response:
        return error_response(503, "there is no router yet", retry_after_s=self.config.http.retry_after_s)

    async def _ask_all(self) -> tuple[list[RouterStatus], ControllerStatus | None, list[str]]:
        """(statuses of the routers, status of the controller or None, one line for each that did not answer)."""
        asked = asyncio.gather(*(client.statuses(timeout_s=STATUS_TIMEOUT_S) for client in self._routers))
        controller, answers = await asyncio.gather(self._controller_status(), asked)
        routers = [router for found, _ in answers for router in found]
        errors = [error for _, missing in answers for error in missing]
        if controller is None:
            errors = [*errors, "the placement controller does not answer"]
        return routers, controller, errors

    async def _controller_status(self) -> ControllerStatus | None:
        try:
            return await self._controller.status(timeout_s=STATUS_TIMEOUT_S)
        except ControllerLostError as error:
            logger.warning("%s", error)
            return None


def _no_trace() -> Response:
    return error_response(404, "routers.trace_tokens is 0, so no trace is recorded")


def _merged(samples: list[bytes]) -> bytes:
    """Several .npz traces as one."""
    from placement.traces.trace import ActivationTrace, merge_traces  # imports numba, which is rarely needed here

    return merge_traces([ActivationTrace.load_npz(io.BytesIO(sample)) for sample in samples]).to_bytes()
