"""How shards, routers and the ingress ask the placement controller: by name, with deadlines, through its restarts."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve

from cluster.config.parse import ConfigError

CONTROLLER = "PlacementController"
SHARD = "ExpertShard"
ROUTER = "Router"

logger = logging.getLogger("ray.serve")


class ControllerLostError(RuntimeError):
    """The placement controller did not answer; the message says what was asked and how long it was waited."""


class ControllerClient:
    """Calls methods of the controller of one `experts` application."""

    def __init__(self, app_name: str) -> None:
        if not app_name:
            raise ConfigError("the application of shards has no name")
        self.app_name = app_name
        self._handle = serve.get_deployment_handle(CONTROLLER, app_name)

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """One call. Raises ControllerLostError after `timeout_s`, or when the controller died under the call."""
        response = getattr(self._handle, method).remote(*args)
        try:
            return await asyncio.wait_for(response, timeout_s)
        except TimeoutError:
            raise ControllerLostError(
                f"the placement controller of application {self.app_name!r} did not answer {method} in {timeout_s} s"
            ) from None
        except Exception as error:
            raise ControllerLostError(
                f"{method} of the placement controller of application {self.app_name!r} failed: {error!r}"
            ) from error

    async def call_with_retry(self, method: str, *args: Any, timeout_s: float, pause_s: float = 0.5) -> Any:
        """Call until it answers, through the controller's restarts; ControllerLostError after `timeout_s`."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while True:
            try:
                return await self.call(method, *args, timeout_s=max(0.1, end_s - loop.time()))
            except ControllerLostError as error:
                if loop.time() + pause_s >= end_s:
                    raise
                logger.warning("%s; asking again", error)
                await asyncio.sleep(pause_s)
