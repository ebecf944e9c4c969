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
    """Serve's handle of a made-up router deployment; `replicas` holds an answer for each, or why there are none.

    `by_method` has those of methods that are answered otherwise.
    """

    def __init__(self, replicas: list[Any] | Exception, by_method: dict[str, list[Any] | Exception] | None = None):
        self.replicas = replicas
        self.by_method = by_method or {}
        self.asked: list[str] = []

    def broadcast(self, method: str, *args: Any) -> DeploymentBroadcastResponse:
        self.asked.append(method)

        async def replicas() -> list[Any]:
            answers = self.by_method.get(method, self.replicas)
            if isinstance(answers, Exception):
                raise answers
            return [Replica(answer) for answer in answers]

        return DeploymentBroadcastResponse(replicas(), None)
