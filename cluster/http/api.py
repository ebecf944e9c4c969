"""The OpenAI API before the routers: Ray Serve LLM's ingress plus health that generates, metrics and inspection."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress

from cluster.config.apps import LLMAppConfig
from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.http.errors import OpenAIApp, UnavailableError, add_error_handlers, error_response
from cluster.http.gate import Gate
from cluster.observability.metrics import render
from cluster.ray_joints import broadcast, model_card
from cluster.router.server import llm_config_of

logger = logging.getLogger("ray.serve")

CONTROLLER_TIMEOUT_S = 5.0

ENDPOINTS: dict[str, Callable[[FastAPI], Callable[..., Any]]] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "tokenize": lambda app: app.post("/tokenize"),
    "detokenize": lambda app: app.post("/detokenize"),
    "health": lambda app: app.get("/health"),
    "metrics": lambda app: app.get("/metrics"),
    "mesh_status": lambda app: app.get("/expertmesh/status"),
    "mesh_placement": lambda app: app.get("/expertmesh/placement"),
    "mesh_trace": lambda app: app.get("/expertmesh/trace"),
    "mesh_clear_trace": lambda app: app.delete("/expertmesh/trace", status_code=204),
}


class ExpertMeshIngress(OpenAiIngress):
    """Ray Serve LLM's ingress with the project's own paths."""

    def __init__(
        self, llm_deployments: dict[str, DeploymentHandle], model_cards: dict[str, Any], *, mesh: LLMAppConfig
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        self._mesh = mesh
        self._controller = ControllerClient(mesh.experts_app)
        [self._routers] = llm_deployments.values()

    async def health(self) -> JSONResponse:
        """200 when every router generates tokens through the shards, else 503 with the reason."""
        routers, errors = await self._ask_each_router("generation_health", self._mesh.deadlines.probe_s + 5)
        errors += [f"{router['router_id']}: {router['reason']}" for router in routers if not router["ok"]]
        reason = "; ".join(errors) if routers or errors else "there is no router yet"
        ok = bool(routers) and not reason
        body = {"status": "ok" if ok else "unavailable", "reason": reason, "routers": routers}
        headers = None if ok else {"Retry-After": str(self._mesh.http.retry_after_s)}
        return JSONResponse(body, status_code=200 if ok else 503, headers=headers)

    async def metrics(self) -> Response:
        """Counters of all routers that answer, and of the shards, as Prometheus text."""
        routers, controller, errors = await self._ask_all()
        for error in errors:
            logger.warning("counters are missing: %s", error)
        text = render(routers, controller)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def mesh_status(self) -> JSONResponse:
        """What the controller and each router know: epochs, shards, lost ranks, counters; and who did not answer."""
        routers, controller, errors = await self._ask_all()
        return JSONResponse({"controller": controller, "routers": routers, "errors": errors})

    async def mesh_placement(self) -> Response:
        """The placement: slots of every layer, and the experts of each rank."""
        try:
            return JSONResponse(await self._controller.call("placement", timeout_s=CONTROLLER_TIMEOUT_S))
        except ControllerLostError as error:
            return error_response(503, str(error), retry_after_s=self._mesh.http.retry_after_s)

    async def mesh_trace(self, router: str = "") -> Response:
        """Sampled routing decisions (.npz): of the router that `router` names, else of all of them as one trace."""
        if (refusal := self._no_trace()) is not None:
            return refusal
        samples = dict(await self._ask_routers("mesh_trace", self._mesh.deadlines.apply_s))
        if router and router not in samples:
            return error_response(404, f"no router is named {router!r}; there are {sorted(samples)}", param="router")
        if not samples:
            return error_response(503, "there is no router yet", retry_after_s=self._mesh.http.retry_after_s)
        wanted = [samples[name] for name in ([router] if router else sorted(samples)) if samples[name]]
        if not wanted:
            return error_response(404, "no tokens have been recorded yet: send requests first", code="no_trace")
        trace = wanted[0] if len(wanted) == 1 else await asyncio.to_thread(_merged, wanted)
        return Response(trace, media_type="application/octet-stream")

    async def mesh_clear_trace(self) -> Response:
        """Let every router forget what it sampled and begin anew."""
        if (refusal := self._no_trace()) is not None:
            return refusal
        await self._ask_routers("mesh_clear_trace", self._mesh.deadlines.apply_s)
        return Response(status_code=204)

    def _no_trace(self) -> Response | None:
        if self._mesh.routers.trace_tokens:
            return None
        return error_response(404, "routers.trace_tokens is 0, so no trace is recorded")

    async def _get_model_id(self, model: str | None) -> str:
        """The model that a request means; 404 for one that is not served.

        Ray Serve LLM takes what follows a colon for the name of an adapter, to be loaded and remembered.
        """
        if model is not None and model not in self._model_cards:
            message = f'Got request for model "{model}". Could not find base model with ID "{model}".'
            raise HTTPException(404, message)
        return await super()._get_model_id(model)

    async def _ask_all(self) -> tuple[list[Any], dict[str, Any] | None, list[str]]:
        """Statuses of the routers and of the controller, None if it is away, and one line on each that has none."""
        (routers, errors), controller = await asyncio.gather(
            self._ask_each_router("mesh_status", CONTROLLER_TIMEOUT_S), self._controller_status()
        )
        if controller is None:
            errors.append("the placement controller does not answer")
        return routers, controller, errors

    async def _ask_routers(self, method: str, timeout_s: float) -> list[Any]:
        """The answers of all routers. Raises UnavailableError where one is missing."""
        answers, errors = await self._ask_each_router(method, timeout_s)
        if errors:
            raise UnavailableError("; ".join(errors))
        return answers

    async def _ask_each_router(self, method: str, timeout_s: float) -> tuple[list[Any], list[str]]:
        """The answers of the routers that give one within the deadline, and one line on each that does not."""
        try:
            answers = await broadcast(self._routers, method, timeout_s)
        except Exception as error:
            return [], [_why(error, "the routers", method, timeout_s)]
        errors = [_why(a, "a router", method, timeout_s) for a in answers if isinstance(a, BaseException)]
        return [answer for answer in answers if not isinstance(answer, BaseException)], errors

    async def _controller_status(self) -> dict[str, Any] | None:
        try:
            return await self._controller.call("status", timeout_s=CONTROLLER_TIMEOUT_S)
        except ControllerLostError as error:
            logger.warning("%s", error)
            return None


def _why(error: BaseException, who: str, method: str, timeout_s: float) -> str:
    """One line on a call that has no answer."""
    cause = getattr(error, "cause", None) or error  # Ray's errors hold what was raised on the other side
    if isinstance(cause, DeploymentUnavailableError):
        return "no router is available"
    if isinstance(cause, TimeoutError):
        return f"{who} did not answer {method} in {timeout_s:g} s"
    return f"{who} failed at {method}: {type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


def _merged(samples: list[bytes]) -> bytes:
    """One .npz of several."""
    from placement.traces.trace import ActivationTrace, merge_traces  # numba, which an ingress mostly does without

    return merge_traces([ActivationTrace.load_npz(io.BytesIO(sample)) for sample in samples]).to_bytes()


def build_app(config: LLMAppConfig, routers: DeploymentHandle) -> FastAPI:
    """The ASGI app of one ingress replica: routes, error format, keys, queue limit, CORS.

    Raises ValueError where http.api_keys_env names a variable that holds no key.
    """
    http, model_id = config.http, config.model.id
    card = model_card(llm_config_of(config))
    ingress = ExpertMeshIngress({model_id: routers}, {model_id: card}, mesh=config)
    app = OpenAIApp(title="expertmesh")
    add_error_handlers(app, http.retry_after_s)
    app.add_middleware(Gate, keys=http.keys(), max_pending=http.max_pending_requests, retry_after_s=http.retry_after_s)
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    for name, route in ENDPOINTS.items():
        route(app)(getattr(ingress, name))
    return app
