"""The router deployment as Serve gets it: a shell that imports ray.serve.llm, and with it vllm, only in its replicas.

Otherwise everything that builds the application (the command, `serve run`, Serve's build task) would import vllm just
to name the class, ten seconds before the first replica starts to do the same.

A router is its application's HTTP ingress: its replica serves vLLM's own FastAPI app, so that a token takes no hop but
the proxy's.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any, ClassVar

from ray import serve

from cluster.config.apps import LLMAppConfig
from cluster.config.parse import parse
from cluster.pools.side_channel import take_side_channel
from cluster.ray_joints import logs_are_json, replica_identity, show_data_plane_log
from experts.kv_transfer.engine_options import Pool
from experts.vllm_plugin.early_engine import EarlyEngine
from experts.vllm_plugin.engine_kwargs import JSON_LOGGING


class PrefillRouter:
    """A router that computes prompts for others, and has no HTTP side. Passes its methods on to a
    `cluster.router.server.ExpertMeshLLMServer`."""

    POOL: ClassVar[Pool] = "prefill"

    _server: Any = None

    async def __init__(  # type: ignore[misc]
        self, mesh: dict[str, Any], ledger: Any = None, prefill: Any = None
    ) -> None:
        config = parse(LLMAppConfig, mesh)
        if config.pools is not None:
            config = config.of_pool(self.POOL)
        take_side_channel(config.routers.engine_kwargs.get("kv_transfer_config"))
        show_data_plane_log(role="router", router=replica_identity().replica_id)
        if logs_are_json():
            os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(JSON_LOGGING))
        early_engine = EarlyEngine()  # it imports vllm while this process does
        importing_s = time.monotonic()
        from cluster.router.server import ExpertMeshLLMServer, llm_config_of
        from experts.checkpoint.reader import fetch_rest

        import_s = time.monotonic() - importing_s
        fetching_s = time.monotonic()
        show_data_plane_log()  # again: what was imported may have set up logging
        folder = await asyncio.to_thread(fetch_rest, config.model.path)
        started = {"import": import_s, "fetch": time.monotonic() - fetching_s}
        # Ray Serve LLM's servers have asynchronous constructors; only Serve can call those by calling the class.
        server = ExpertMeshLLMServer.__new__(ExpertMeshLLMServer)
        await server.__init__(  # type: ignore[misc]
            llm_config_of(config, str(folder)),
            mesh=config,
            early_engine=early_engine,
            started=started,
            ledger=ledger,
            prefill=prefill,
        )
        self._server = server

    def __getattr__(self, name: str) -> Any:
        """Everything that the server offers."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._server, name)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaler hands to the policy `cluster.autoscaling.policies:routers`."""
        return self._server.scaling.stats()

    async def check_health(self) -> None:
        """Raises when the engine or one of the router's loops has ended."""
        await self._server.check_health()

    async def __del__(self) -> None:
        if self._server is not None:
            await self._server.close()


@serve.ingress()
class Router(PrefillRouter):
    """A router that takes requests; where there are pools, one of the decode pool."""

    POOL = "decode"

    async def __serve_build_asgi_app__(self) -> Any:
        return await self._server.__serve_build_asgi_app__()
