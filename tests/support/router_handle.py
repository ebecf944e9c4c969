"""Routers that are made up, behind what Serve's handle offers."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.handle import DeploymentBroadcastResponse


class Replica:
    """A router that gives its answer, raises it, or (None) is silent."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def get_async(self) -> Any:
        if self._answer is None:
            await asyncio.Event().wait()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class RouterHandle:
    """Serve's handle of a made-up router deployment; `replicas` holds an answer for each, or why there are none."""

    def __init__(self, replicas: list[Any] | Exception) -> None:
        self.replicas = replicas
        self.asked: list[str] = []

    def broadcast(self, method: str) -> DeploymentBroadcastResponse:
        self.asked.append(method)

        async def replicas() -> list[Any]:
            if isinstance(self.replicas, Exception):
                raise self.replicas
            return [Replica(answer) for answer in self.replicas]

        return DeploymentBroadcastResponse(replicas(), None)
