"""Endpoints for people and their tools: status, placement, routing trace, metrics."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from cluster.config.apps import LLMAppConfig
from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.controller.messages import ControllerStatus
from cluster.http.errors import error_response
from cluster.observability.metrics import render
from cluster.router.client import RouterClient
from experts.protocol.status import RouterStatus

logger = logging.getLogger("ray.serve")

STATUS_TIMEOUT_S = 5.0  # for the status of the controller and of all routers, and for the placement

ENDPOINTS: dict[str, Callable[[FastAPI], Callable[..., Any]]] = {
    "metrics": lambda app: app.get("/metrics"),
    "mesh_status": lambda app: app.get("/expertmesh/status"),
    "mesh_placement": lambda app: app.get("/expertmesh/placement"),
    "mesh_trace": lambda app: app.get("/expertmesh/trace"),
    "mesh_clear_trace": lambda app: app.delete("/expertmesh/trace", status_code=204),
}


class Console:
    """The handlers of ENDPOINTS."""

    def __init__(self, config: LLMAppConfig, controller: ControllerClient, routers: RouterClient) -> None:
        self._config = config
        self._controller = controller
        self._routers = routers

    async def metrics(self) -> Response:
        """Counters of the shards and of all routers that answer, as Prometheus text."""
        routers, controller, errors = await self._ask_all()
        for error in errors:
            logger.warning("counters are missing: %s", error)
        return Response(render(routers, controller), media_type="text/plain; version=0.0.4")

    async def mesh_status(self) -> JSONResponse:
        """What the controller and each router know (epochs, shards, lost ranks, counters), and who did not answer."""
        routers, controller, errors = await self._ask_all()
        return JSONResponse(
            {
                "controller": None if controller is None else controller.to_dict(),
                "routers": [router.to_dict() for router in routers],
                "errors": errors,
            }
        )

    async def mesh_placement(self) -> Response:
        """The placement: slots of every layer, and the experts of each rank."""
        try:
            placement = await self._controller.placement(timeout_s=STATUS_TIMEOUT_S)
        except ControllerLostError as error:
            return error_response(503, str(error), retry_after_s=self._config.http.retry_after_s)
        return JSONResponse(placement.to_dict())

    async def mesh_trace(self, router: str = "") -> Response:
        """Sampled routing decisions (.npz) of the router with the id `router`, by default of all as one trace."""
        if (refusal := self._no_trace()) is not None:
            return refusal
        samples = await self._routers.traces(timeout_s=self._config.deadlines.apply_s)
        if router and router not in samples:
            return error_response(404, f"no router is named {router!r}; there are {sorted(samples)}", param="router")
        if not samples:
            return error_response(503, "there is no router yet", retry_after_s=self._config.http.retry_after_s)
        wanted = [samples[name] for name in ([router] if router else sorted(samples)) if samples[name]]
        if not wanted:
            return error_response(404, "no tokens have been recorded yet: send requests first", code="no_trace")
        trace = wanted[0] if len(wanted) == 1 else await asyncio.to_thread(_merged, wanted)
        return Response(trace, media_type="application/octet-stream")

    async def mesh_clear_trace(self) -> Response:
        """Let every router drop what it sampled and start over."""
        if (refusal := self._no_trace()) is not None:
            return refusal
        await self._routers.clear_traces(timeout_s=self._config.deadlines.apply_s)
        return Response(status_code=204)

    def _no_trace(self) -> Response | None:
        if self._config.routers.trace_tokens:
            return None
        return error_response(404, "routers.trace_tokens is 0, so no trace is recorded")

    async def _ask_all(self) -> tuple[list[RouterStatus], ControllerStatus | None, list[str]]:
        """(statuses of the routers, status of the controller or None, one line for each that did not answer)."""
        (routers, errors), controller = await asyncio.gather(
            self._routers.statuses(timeout_s=STATUS_TIMEOUT_S), self._controller_status()
        )
        if controller is None:
            errors = [*errors, "the placement controller does not answer"]
        return routers, controller, errors

    async def _controller_status(self) -> ControllerStatus | None:
        try:
            return await self._controller.status(timeout_s=STATUS_TIMEOUT_S)
        except ControllerLostError as error:
            logger.warning("%s", error)
            return None


def _merged(samples: list[bytes]) -> bytes:
    """Several .npz traces as one."""
    from placement.traces.trace import ActivationTrace, merge_traces  # imports numba, which is rarely needed here

    return merge_traces([ActivationTrace.load_npz(io.BytesIO(sample)) for sample in samples]).to_bytes()
