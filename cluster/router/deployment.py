"""What Serve gets for the application `llm`: shells that import ray.serve.llm, and so vllm, only in their replicas.

Whoever builds the application (the command, `serve run`, Serve's build task) would otherwise import vllm just to name
the classes, ten seconds before the first replica begins to do the same.
"""

from __future__ import annotations

from typing import Any

from cluster.config.apps import LLMAppConfig
from cluster.config.parse import parse


class Router:
    """One router: `cluster.router.server.ExpertMeshLLMServer`, whose methods are reached through this."""

    _server: Any = None

    async def __init__(self, mesh: dict[str, Any]) -> None:  # type: ignore[misc]
        from cluster.router.server import ExpertMeshLLMServer, llm_config_of

        config = parse(LLMAppConfig, mesh)
        # Ray Serve LLM's servers have asynchronous constructors, which only Serve itself calls by their class.
        server = ExpertMeshLLMServer.__new__(ExpertMeshLLMServer)
        await server.__init__(llm_config_of(config), mesh=config)  # type: ignore[misc]
        self._server = server

    def __getattr__(self, name: str) -> Any:
        """Everything that Ray Serve LLM's server offers, and the project's own methods."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._server, name)

    async def check_health(self) -> None:
        """Raises when the engine or one of the router's loops has ended."""
        await self._server.check_health()

    async def __del__(self) -> None:
        if self._server is not None:
            await self._server.close()
