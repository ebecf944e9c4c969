"""What the project adds to vLLM's FastAPI app inside a router's process."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from cluster.config.http_sections import HttpSection
from cluster.http import vllm_joints
from cluster.http.connections import close_where_haproxy_is, open_to_origins
from cluster.http.gate import Gate
from cluster.http.health import HealthSource, add_health_routes
from cluster.http.metering import count_tokens
from cluster.http.paths.served import take_off, working_paths
from cluster.http.quota import Quota
from cluster.http.requests import BodyCheck
from cluster.http.responses import PATHS, OneErrorFormat, answer_exception
from cluster.keys.leases import Leases
from cluster.keys.sources import source_of

logger = logging.getLogger("ray.serve")

# `Exception` itself would be handled outside all middleware, and raised again.
HANDLED: tuple[type[Exception], ...] = (
    *(RequestValidationError, HTTPException, ValueError, TypeError, ArithmeticError, LookupError, AttributeError),
    *(AssertionError, RuntimeError, OSError),
)


def front_door(
    app: FastAPI,
    *,
    http: HttpSection,
    model_id: str,
    health: HealthSource,
    leases: Leases | None = None,
    traced: bool = False,
    adapters: Middleware | None = None,
    prefill: Middleware | None = None,
) -> FastAPI:
    """Keys, limits, OpenAI's error format and health routes on vLLM's app, in place.

    Call it once the app's state is set; `app.state.expertmesh_keys` is the source of keys afterwards. Raises ValueError
    if http names a file or a variable that holds no key, RuntimeError if vLLM's routes are not found. Usage
    counts where keys have names; without `leases` no limit holds. `traced`: requests to the engine have spans.
    `adapters` and `prefill` stand next to the routes, and find in the scope what a body asks for.
    """
    source = source_of(http, vllm_joints.take_keys(app))
    app.state.expertmesh_keys = source
    vllm_joints.take_cors(app)
    engine = app.state.engine_client
    generates = vllm_joints.engine_generates(engine)
    gone = take_off(app, generates)
    logger.info("these paths of vLLM's app are not served: %s", ", ".join(gone))
    add_health_routes(app, health, http.retry_after_s)

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> JSONResponse:
        """One model of /v1/models."""
        return JSONResponse((await vllm_joints.model_card(app, model)).model_dump())

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return answer_exception(request.scope, error, http.retry_after_s)

    app.exception_handlers = dict.fromkeys((*HANDLED, *vllm_joints.error_classes()), handle)
    vllm_joints.guard_engine(engine, http.max_prompt_logprobs, has_adapters=adapters is not None)
    paths, max_model_len = working_paths(app), engine.model_config.max_model_len
    setattr(app.state, PATHS, paths)
    # From the outside in: errors first, so that they come in one format from every layer; then vLLM's own middleware
    # (metrics); then, next to the routes, what may refuse a request, so that refusals are counted too.
    refusals: list[tuple[Any, dict[str, Any]]] = [
        (
            Gate,
            {
                "keys": source.ring,
                "limited_paths": paths,
                "max_pending": http.max_pending_requests,
                "retry_after_s": http.retry_after_s,
            },
        ),
        (
            BodyCheck,
            {
                "max_body_bytes": http.max_body_bytes,
                "max_sequences": http.max_sequences_per_request,
                "max_model_len": max_model_len,
                "pools": not generates,
                "estimate": http.names_keys or adapters is not None or prefill is not None,
            },
        ),
    ]
    if http.names_keys:
        count_tokens(engine)
        quota = {
            "leases": leases or Leases("", None),
            "model_id": model_id,
            "max_model_len": max_model_len,
            "generation_paths": paths if generates else (),
        }
        refusals.append((Quota, quota))
    app.user_middleware[:] = [
        *close_where_haproxy_is(),
        *_http_spans(paths, traced),
        Middleware(OneErrorFormat, retry_after_s=http.retry_after_s),
        *open_to_origins(http.cors_origins),
        *app.user_middleware,
        *(Middleware(cls, **options) for cls, options in refusals),
        *(each for each in (adapters, prefill) if each is not None),
    ]
    app.middleware_stack = None  # vLLM has built it already; Starlette builds it again at the next request
    vllm_joints.forget_http_metrics()
    app.title = f"{model_id} on expertmesh"
    return app


def _http_spans(paths: Collection[str], traced: bool) -> list[Middleware]:
    """The middleware that traces, outside of what may refuse, so that refusals have spans too."""
    if not traced:
        return []
    from cluster.observability.http_spans import HttpSpans  # imports OpenTelemetry

    return [Middleware(HttpSpans, paths=paths)]
