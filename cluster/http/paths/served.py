"""Which paths of vLLM's app clients may use, and which of those make its engine work.

Written against vLLM 0.32. `tests/cluster/http/paths/test_served.py` fails when one of them moves.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.routing import BaseRoute

# Clients may use what is below these, and these. Everything else is taken off the app: control of the engine
# (scaling, sleep, pause, caches, weights, profiles, adapters, collective_rpc, server_info and what comes with
# VLLM_SERVER_DEV_MODE), scale-out's internals, and SageMaker's /ping and /invocations.
SERVED_BELOW = ("/v1/", "/v2/")
SERVED = frozenset(
    {
        *("/tokenize", "/detokenize", "/generative_scoring", "/classify", "/score", "/rerank", "/pooling"),
        *("/load", "/version", "/metrics", "/docs", "/openapi.json"),
    }
)
CONTROL = ("lora_adapter", "weight", "cache", "/render", "/derender", "/realtime")  # in paths below SERVED_BELOW
# POST without work for the engine; every other POST counts for the queue limit.
LIGHT = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/responses/{response_id}/cancel"})

# Beginnings of the paths that an engine needs which generates text.
GENERATING = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/systemone"),
    "/generative_scoring",
)
_ALWAYS = {True: "/v1/completions", False: "/pooling"}  # of an engine that generates, and of one that pools


def path_of(route: BaseRoute) -> str:
    """The path of a route or a mount."""
    return str(getattr(route, "path", ""))


def is_served(path: str, generates: bool = True) -> bool:
    """Whether clients may use a path of vLLM's app; `generates`: its engine makes text, and does not pool."""
    below = path.startswith(SERVED_BELOW) and not any(word in path for word in CONTROL)
    return (below or path in SERVED) and (generates or not path.startswith(GENERATING))


def take_off(app: FastAPI, generates: bool = True) -> list[str]:
    """Remove the routes that clients may not use; their paths. RuntimeError if a route that must be there is not."""
    gone = sorted({path_of(route) for route in app.router.routes if not is_served(path_of(route), generates)})
    app.router.routes[:] = [route for route in app.router.routes if is_served(path_of(route), generates)]
    app.openapi_schema = None
    if _ALWAYS[generates] not in working_paths(app):  # FastAPI 0.137 hides the routes of a router
        raise RuntimeError(f"vLLM's app has no route {_ALWAYS[generates]} with this version of FastAPI; it has {gone}")
    return gone


def working_paths(app: FastAPI) -> frozenset[str]:
    """The paths whose requests make the engine work."""
    return frozenset(
        path_of(route)
        for route in app.router.routes
        if "POST" in (getattr(route, "methods", None) or ()) and path_of(route) not in LIGHT
    )
