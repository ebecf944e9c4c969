"""What the project adds to vLLM's FastAPI app inside a router."""

from __future__ import annotations

import os

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from cluster.config.http_sections import HttpSection
from cluster.http.connections import CloseAfterResponse
from cluster.http.errors import ErrorsStayInside
from cluster.http.gate import Gate
from cluster.http.health import HealthSource
from cluster.serve_environment import HAPROXY_SWITCH


def front_door(app: FastAPI, *, http: HttpSection, model_id: str, health: HealthSource) -> FastAPI:
    """Keys, queue limit, OpenAI's error format and health routes on vLLM's app, in place."""
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", "") not in ("/health",)]

    @app.get("/health")
    async def get_health() -> JSONResponse:
        routers, errors = await health.all_routers()
        ok = any(router.ok for router in routers)
        errors = [*errors, *(f"{router.router_id}: {router.reason}" for router in routers if not router.ok)]
        body = {"status": "ok" if ok else "unavailable", "reason": "; ".join(errors)}
        return JSONResponse(body | {"routers": [r.to_dict() for r in routers]}, status_code=200 if ok else 503)

    @app.get("/ready")
    async def get_ready() -> JSONResponse:
        state = await health.ready()
        return JSONResponse(state.to_dict(), status_code=200 if state.ok else 503)

    @app.get("/live")
    async def get_live() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    app.middleware_stack = None
    app.add_middleware(ErrorsStayInside, retry_after_s=http.retry_after_s)
    app.add_middleware(Gate, keys=http.keys(), max_pending=http.max_pending_requests, retry_after_s=http.retry_after_s)
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    if os.environ.get(HAPROXY_SWITCH) == "1":
        app.add_middleware(CloseAfterResponse)
    return app
