"""The console deployment: its endpoints as one FastAPI app, with the keys and the error format of the API."""

from __future__ import annotations

from typing import Any

from ray import serve

from cluster.config.apps import ConsoleAppConfig
from cluster.config.parse import parse
from cluster.ray_joints import show_data_plane_log


@serve.ingress()
class ConsoleServer:
    """One replica. There may be any number of them: what one keeps are time lines of its own for the live page."""

    def __init__(self, console: dict[str, Any]) -> None:
        self._config = parse(ConsoleAppConfig, console)
        show_data_plane_log(role="console")

    async def __serve_build_asgi_app__(self) -> Any:
        # Here, so that Serve's build task does without FastAPI.
        from cluster.config.replicas import PREFILL_ROUTER
        from cluster.console.endpoints import Console, console_app
        from cluster.controller.client import ROUTER, ControllerClient
        from cluster.keys.deployment import KEY_LEDGER
        from cluster.ray_joints import deployment_handle
        from cluster.router.client import RouterClient

        routers = [
            RouterClient(deployment_handle(ROUTER, app), deployment_handle(PREFILL_ROUTER, app))
            for app in self._config.llm_apps
        ]
        counting = [self._config.http.ledger_app or app for app in self._config.llm_apps]
        handles = {app: deployment_handle(KEY_LEDGER, app) for app in counting}
        ledgers = [handles[app] for app in counting]
        return console_app(Console(self._config, ControllerClient(self._config.experts_app), routers, ledgers))
