"""A router as one of a pool: what it does beside what every router does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.middleware import Middleware

from cluster.config.apps import LLMAppConfig
from cluster.pools.prefill import sweep
from cluster.pools.prompts import PromptJob, Prompts
from cluster.pools.ray_joints import has_replicas
from cluster.pools.remote_prefill import remote_prefill
from experts.kv_transfer.files import KVFolder
from experts.protocol.status import RouterStatus


@dataclass(frozen=True)
class PoolMember:
    """By default a router of no pool, of which all of this does nothing."""

    pool: str = ""
    prompts: Prompts | None = None  # of a decode router
    folder: KVFolder | None = None
    max_age_s: float = 0.0

    @classmethod
    def of(cls, mesh: LLMAppConfig, prefill: DeploymentHandle | None) -> PoolMember:
        """The member that a config made by `of_pool` is for. OSError if the folder for KV cache cannot be had."""
        section = mesh.pools
        if section is None or mesh.pool is None:
            return cls()
        folder = None
        if section.moves_by_own_connector(mesh.routers):
            folder = KVFolder(section.kv_folder, section.kv_max_bytes)
        prompts = None
        if prefill is not None:
            ask = _AskDeployment(prefill)
            prompts = Prompts(section, mesh.model.id, ask, folder, lambda: has_replicas(prefill))
        return cls(mesh.pool, prompts, folder, section.kv_max_age_s)

    def middleware(self) -> Middleware | None:
        """What a decode router puts next to vLLM's routes."""
        return None if self.prompts is None else remote_prefill(self.prompts)

    def loops(self) -> list[asyncio.Task[None]]:
        """What runs as long as the router does."""
        if self.folder is None:
            return []
        return [asyncio.create_task(sweep(self.folder, self.max_age_s), name="sweep")]

    def added_to(self, status: RouterStatus) -> RouterStatus:
        """A status with what is known here."""
        if not self.pool:
            return status
        handed_over, given_up = (0, 0) if self.prompts is None else (self.prompts.handed_over, self.prompts.given_up)
        return replace(status, pool=self.pool, prompts_handed_over=handed_over, prompts_given_up=given_up)


class _AskDeployment:
    """Asks the prefill router with the fewest requests, as Serve counts them."""

    def __init__(self, prefill: DeploymentHandle) -> None:
        self._prefill = prefill

    async def __call__(self, job: PromptJob) -> dict[str, Any] | None:
        response = self._prefill.compute_prompt.remote(job)
        try:
            answer: dict[str, Any] | None = await response
        except asyncio.CancelledError:
            response.cancel()  # nobody waits any more: the engine shall not go on
            raise
        return answer
