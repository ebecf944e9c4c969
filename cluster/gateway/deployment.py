"""The gateway deployment: an ASGI app in each replica, whose models are its `user_config`.

So a change of the split takes effect in the replicas that run, reaches all of them, and is Serve's to keep.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve

from cluster.config.gateway.sections import GatewayAppConfig, GatewayLive
from cluster.config.parse import ConfigError, parse
from cluster.observability.exporter import EXPORT_S, Exporter
from cluster.observability.gateway_series import GATEWAY_SERIES
from cluster.ray_joints import deployment_handle, show_data_plane_log

logger = logging.getLogger("ray.serve")


@serve.ingress()
class GatewayServer:
    """One replica. There may be any number of them; each counts shares for itself."""

    def __init__(self, gateway: dict[str, Any], ledger: Any = None) -> None:
        """`ledger` is there so that the application has one: routers count with it what each key uses."""
        # Here, so that Serve's build task does without Starlette and aiohttp.
        from cluster.controller.client import ROUTER
        from cluster.gateway.forward import Forwarder
        from cluster.gateway.models import Models
        from cluster.gateway.pool import RouterPool
        from cluster.gateway.ray_joints import http_endpoints

        def pool_of(app: str) -> RouterPool:
            handle = deployment_handle(ROUTER, app)
            return RouterPool(lambda: http_endpoints(handle))

        self._config = parse(GatewayAppConfig, gateway)
        self._models, self._forwarder = Models(pool_of), Forwarder()
        self._exporting: asyncio.Task[None] | None = None
        show_data_plane_log(role="gateway")

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take on the models. ConfigError if they are wrong at the start; later the last good ones stay in use."""
        try:
            live = parse(GatewayLive, user_config or {}, "user_config of Gateway")
        except ConfigError as error:
            if not self._models.versions:
                raise
            logger.error("the new models are refused, and the last ones stay in use: %s", error)
            return
        self._models.configure(live)
        weights = {name: {v: one.weight for v, one in each.versions.items()} for name, each in live.models.items()}
        logger.info("models and the weights of their versions: %s", weights)

    async def __serve_build_asgi_app__(self) -> Any:
        from cluster.gateway.app import gateway_app

        self._exporting = asyncio.create_task(self._export())
        return gateway_app(self._models, self._config.http, self._forwarder)

    async def shares(self) -> dict[str, dict[str, int]]:
        """Weights in use, by model and version: whether a change has arrived."""
        versions = self._models.versions
        return {name: {v: one.weight for v, one in each.versions.items()} for name, each in versions.items()}

    def check_health(self) -> None:
        """Raises when the loop that exports has ended."""
        if self._exporting is not None and self._exporting.done():
            raise RuntimeError(f"the export of series ended: {self._exporting.exception()!r}")

    async def __del__(self) -> None:
        if self._exporting is not None:
            self._exporting.cancel()
        await self._forwarder.close()

    async def _export(self) -> None:
        exporter = Exporter(GATEWAY_SERIES)
        while True:
            exporter.export(self._models.counts)
            await asyncio.sleep(EXPORT_S)
