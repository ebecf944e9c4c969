"""What Serve gets for the ingress: a shell that imports the API, and so vllm, only in its replicas."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config.apps import LLMAppConfig
from cluster.config.parse import parse


@serve.ingress()
class Ingress:
    """The OpenAI API: `cluster.http.api.build_app`."""

    def __init__(self, mesh: dict[str, Any], routers: DeploymentHandle) -> None:
        self._config = parse(LLMAppConfig, mesh)
        self._routers = routers

    async def __serve_build_asgi_app__(self) -> Any:
        from cluster.http.api import build_app

        return build_app(self._config, self._routers)
