"""The ingress deployment: `cluster.http` and `cluster.console` put together as one ASGI app."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config.apps import LLMAppConfig
from cluster.config.parse import parse


@serve.ingress()
class Ingress:
    """A shell that imports the API, and with it vllm, only in its replicas."""

    def __init__(self, mesh: dict[str, Any], routers: DeploymentHandle) -> None:
        self._config = parse(LLMAppConfig, mesh)
        self._routers = routers

    async def __serve_build_asgi_app__(self) -> Any:
        return build_app(self._config, self._routers)


def build_app(config: LLMAppConfig, routers: DeploymentHandle) -> Any:
    """The FastAPI app of one ingress replica: routes, error format, keys, queue limit, CORS.

    Raises ValueError if http.api_keys_env names a variable that holds no key.
    """
    from fastapi.middleware.cors import CORSMiddleware

    from cluster.console import endpoints as console
    from cluster.controller.client import ControllerClient
    from cluster.http import openai_api
    from cluster.http.errors import OpenAIApp, add_error_handlers
    from cluster.http.gate import Gate
    from cluster.router.client import RouterClient

    http = config.http
    app = OpenAIApp(title="expertmesh")
    add_error_handlers(app, http.retry_after_s)
    app.add_middleware(Gate, keys=http.keys(), max_pending=http.max_pending_requests, retry_after_s=http.retry_after_s)
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    api = openai_api.ExpertMeshIngress(config, routers)
    for name, route in openai_api.ENDPOINTS.items():
        route(app)(getattr(api, name))
    people = console.Console(config, ControllerClient(config.experts_app), RouterClient(routers))
    for name, route in console.ENDPOINTS.items():
        route(app)(getattr(people, name))
    return app
