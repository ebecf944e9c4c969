"""A router: Ray Serve LLM's server whose engine follows the placement controller.

Two loops run beside the engine: `epochs.EpochFollower.follow` and `health.RouterHealth.watch`. Both reach its worker
between steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import CompletionRequest

from cluster.adapters.by_name import Adapters, by_name
from cluster.config.apps import LLMAppConfig
from cluster.controller.client import ROUTER, ControllerClient, ControllerLostError
from cluster.http.app import front_door
from cluster.http.health import GenerationHealth
from cluster.http.vllm_joints import front_end_options
from cluster.keys.deployment import KEY_LEDGER, settle_of
from cluster.keys.leases import Leases, RouterKeys
from cluster.keys.sources import KeySource
from cluster.observability.exporter import Exporter
from cluster.observability.key_series import KEY_SERIES, KeysView
from cluster.observability.router_series import ROUTER_SERIES
from cluster.pools.member import PoolMember
from cluster.pools.prefill import compute_prompt
from cluster.pools.prompts import PromptJob
from cluster.ray_joints import (
    deployment_handle,
    follow_engine,
    no_download_callback,
    replica_identity,
    unfinished_requests,
    vllm_engine_cls,
)
from cluster.router.client import RouterClient
from cluster.router.epochs import EpochFollower
from cluster.router.health import RouterHealth
from cluster.router.messages import RouterLive, TraceSample
from cluster.router.observations import report_observations
from cluster.router.options import runtime_env_of
from cluster.router.pooling import NO_SIGNATURES, engine_pools, pool_one_token
from cluster.router.scaling import RouterScaling
from cluster.router.worker_calls import WorkerCalls
from cluster.serve_environment import HAPROXY_SWITCH, NO_HAPROXY
from cluster.signatures.ray_joints import text_of_tokens
from cluster.signatures.report import Signatures
from experts.protocol.log_lines import set_log_fields
from experts.protocol.status import RouterStatus
from experts.vllm_plugin.early_engine import EarlyEngine

logger = logging.getLogger("ray.serve")

THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"  # vLLM's: which cores each worker of an engine on CPUs gets
NO_STATISTICS = (
    "engine_kwargs.disable_log_stats is true, so the autoscaler learns nothing of this router's requests, KV cache and "
    "times"
)


def llm_config_of(config: LLMAppConfig, folder: str | None = None) -> LLMConfig:
    """Ray Serve LLM's config: the user's options, the model (fetched to `folder`), the plug-in and the server class."""
    routers = config.routers
    fields: dict[str, Any] = {
        "callback_config": {"callback_class": no_download_callback()},
        **routers.llm_config,
        "model_loading_config": {"model_id": config.model.id, "model_source": folder or config.model.path},
        "engine_kwargs": config.engine_kwargs(),
        "deployment_config": routers.deployment_config,
        "accelerator_config": {"kind": routers.accelerator},
        "runtime_env": runtime_env_of(routers),
        "server_cls": ExpertMeshLLMServer,
    }
    for key in ("accelerator_type", "placement_group_config"):
        if (value := getattr(routers, key)) is not None:
            fields[key] = value
    return LLMConfig(**fields)


class ExpertMeshLLMServer(LLMServer):
    """`server_cls` of the project's LLMConfig."""

    async def __init__(  # type: ignore[misc]
        self,
        llm_config: LLMConfig,
        *,
        mesh: LLMAppConfig,
        early_engine: EarlyEngine,
        started: dict[str, float],
        ledger: DeploymentHandle | None = None,
        prefill: DeploymentHandle | None = None,
    ) -> None:
        replica = replica_identity()
        self._set_up(mesh, replica.replica_id, ControllerClient(mesh.experts_app))
        self._peers = RouterClient(deployment_handle(ROUTER, replica.app_name))
        self._start_s.update(started)
        if mesh.http.ledger_app is not None and mesh.pool != "prefill":  # which takes no requests of clients
            ledger = deployment_handle(KEY_LEDGER, mesh.http.ledger_app)
        self._leases = Leases(self._router_id, None if ledger is None else settle_of(ledger))
        self._pool = PoolMember.of(mesh, prefill)
        extra = dict(llm_config.engine_kwargs["additional_config"])
        extra["expertmesh"] = {**extra["expertmesh"], "router_id": self._router_id}
        llm_config.update_engine_kwargs(additional_config=extra, **front_end_options(llm_config.engine_kwargs))
        on_cpu, several = mesh.routers.accelerator == "cpu", mesh.routers.workers > 1
        in_process = on_cpu and THREADS_BIND not in os.environ
        if on_cpu and several:
            # vLLM would give each worker the cores of a NUMA node of its own, and refuse where there are fewer nodes.
            os.environ.setdefault(THREADS_BIND, "nobind")
        with early_engine.vllm_uses():
            await super().__init__(llm_config, engine_cls=vllm_engine_cls(in_process))

    def _set_up(self, mesh: LLMAppConfig, router_id: str, controller: ControllerClient) -> None:
        """Everything of a router but its engine."""
        self._mesh = mesh
        self._router_id = router_id
        self._controller = controller
        self._worker = WorkerCalls(self.collective_rpc, mesh.deadlines.apply_s)
        self._epochs = EpochFollower(router_id, controller, self._worker, mesh.deadlines)
        set_log_fields(epoch=lambda: self._epochs.epoch)
        self._health = RouterHealth(router_id, self._worker, self._answer_once, self._note_lost)
        self.scaling = RouterScaling(router_id, controller, self._health.shared_reading)
        self._loops: list[asyncio.Task[None]] = []
        self._start_s: dict[str, float] = {}  # seconds of each part of the start
        self._leases = Leases(router_id, None)
        self._keys: KeySource | None = None  # once the HTTP side is built
        self._pool = PoolMember()
        self._signatures: Signatures | None = None  # once the engine runs, if the config wants them
        self._exporter, self._key_exporter = Exporter(ROUTER_SERIES), Exporter(KEY_SERIES)

    async def start(self) -> None:
        """Start the engine and meanwhile wait for the shards; not healthy before the first epoch is applied."""
        first = asyncio.create_task(self._epochs.first_membership())
        try:
            with self._timed("engine"):
                await super().start()
            with self._timed("shards"):
                await self._epochs.apply_first(await first)
        finally:
            first.cancel()
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self._start_s.items())
        logger.info("router %s started: %s", self._router_id, parts)
        if not follow_engine(self, self.scaling.measure):
            logger.warning(NO_STATISTICS)
        if os.environ.get(HAPROXY_SWITCH) != "1":
            logger.warning(NO_HAPROXY)
        self._loops = [
            asyncio.create_task(self._epochs.follow(), name="follow"),
            asyncio.create_task(self._health.watch(self._export), name="watch"),
            asyncio.create_task(self.scaling.follow(), name="scaling"),
            asyncio.create_task(report_observations(self._router_id, self._controller, self._worker), name="observe"),
            *self._pool.loops(),
        ]
        if (wanted := self._mesh.routers.expert_signatures) is not None:
            if engine_pools(self):
                raise ValueError(NO_SIGNATURES)
            self._signatures = Signatures(self._worker.prompts, text_of_tokens(self))
            self._loops.append(asyncio.create_task(self._signatures.follow(wanted.report_s), name="signatures"))

    async def __serve_build_asgi_app__(self) -> Any:
        """vLLM's FastAPI app behind the project's keys, limits, error format and health."""
        app = await super().__serve_build_asgi_app__()
        http, model_id = self._mesh.http, self._mesh.model.id
        traced = self._mesh.routers.tracing is not None
        lora = self._mesh.lora_config
        adapters = None if lora is None else by_name(Adapters(app, model_id, lora), http.retry_after_s)
        front = front_door(
            app,
            http=http,
            model_id=model_id,
            health=self,
            leases=self._leases,
            traced=traced,
            adapters=adapters,
            prefill=self._pool.middleware(),
        )
        self._keys = front.state.expertmesh_keys
        self._leases.start()
        return front

    async def check_health(self) -> None:
        """Raises when the engine or one of the loops has ended or is stuck; Serve then restarts this router."""
        try:
            await super().check_health()
        except Exception as error:
            self._worker.engine_ended(str(error))
            raise
        for task in self._loops:
            if task.done():
                raise RuntimeError(f"{task.get_name()} of this router ended: {task.exception()!r}")
        self._health.check()

    async def record_routing_stats(self) -> dict[str, Any]:
        """What Serve hands to request routers: Ray Serve LLM's own statistics, and what prompts said of experts."""
        own = {} if self._signatures is None else self._signatures.stats()
        return {**await super().record_routing_stats(), **own}

    async def mesh_status(self) -> RouterStatus:
        """The worker's counters and what this replica knows. Callers at the same time share a reading."""
        return replace(
            self._pool.added_to(await self._health.shared_reading()),
            term=self._epochs.term,
            pid=os.getpid(),
            unfinished_requests=unfinished_requests(self),
        )

    async def compute_prompt(self, job: PromptJob) -> dict[str, Any] | None:
        """What a decode router asks a prefill router for."""
        return await compute_prompt(self, job)

    async def mesh_live(self, watch_s: float) -> RouterLive:
        """Status, tokens and times; with `watch_s` also loads of experts, which are counted that much longer."""
        loads = await self._worker.loads(watch_s) if watch_s > 0 else None
        return RouterLive(await self.mesh_status(), self.scaling.measure.pulse(), loads)

    async def mesh_trace(self, reader: str = "") -> TraceSample:
        """The routing decisions this router sampled for a reader."""
        recording = self._mesh.routers.trace_tokens > 0
        return TraceSample(self._router_id, await self._worker.trace(reader) if recording else None)

    async def mesh_clear_trace(self, reader: str = "", end: bool = False) -> bool:
        """Let a reader of the sampled decisions begin anew, or end; False if this router records none."""
        if self._mesh.routers.trace_tokens == 0:
            return False
        await (self._worker.end_trace(reader) if end else self._worker.clear_trace(reader))
        return True

    async def mesh_keys(self) -> RouterKeys:
        """What this router knows of the usage of keys."""
        return RouterKeys(self._router_id, dict(self._leases.usage), self._leases.limits_by, self._key_problem())

    async def generation_health(self) -> GenerationHealth:
        """Whether tokens come out of this router with their experts on shards."""
        health = await self._health.generation_health(self._mesh.http.healthy_within_s, self._mesh.deadlines.probe_s)
        return replace(health, keys=self._key_problem() or None)

    async def all_routers(self) -> tuple[list[GenerationHealth], list[str]]:
        """(healths of all routers of this application, one line for each that did not answer)."""
        return await self._peers.generation_health(timeout_s=self._mesh.deadlines.probe_s + 5)

    async def ready(self) -> GenerationHealth:
        """Whether this router has answered since it started; if not, asks its engine for one token."""
        health = await self._health.ready(self._mesh.deadlines.probe_s)
        return replace(health, start_s={part: round(seconds, 1) for part, seconds in self._start_s.items()})

    async def close(self) -> None:
        """Tell the controller that this router stops, and release the engine."""
        for task in self._loops:
            task.cancel()
        try:
            await self._controller.deregister_router(self._router_id, timeout_s=1.0)
        except ControllerLostError as error:
            logger.info("stopping without deregistering first: %s", error)
        await self._leases.close()
        await self.engine.shutdown()

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Note how long a part of the start took."""
        begin_s = time.monotonic()
        yield
        self._start_s[part] = time.monotonic() - begin_s

    def _key_problem(self) -> str:
        """Why the keys in use are not those of the file; empty if they are."""
        if self._keys is None:
            return ""
        self._keys.ring()  # looks at the file
        return self._keys.problem

    def _export(self, status: RouterStatus) -> None:
        """Hand all counters to Ray's metrics agent."""
        self._exporter.export(replace(self._pool.added_to(status), unfinished_requests=unfinished_requests(self)))
        if self._leases.usage:  # nothing is told of keys before one was used
            self._key_exporter.export(KeysView(self._leases.usage, not self._key_problem()))

    def _note_lost(self, status: RouterStatus) -> None:
        """The next poll tells the controller which shards this router gave up."""
        self._epochs.lost = status.lost

    async def _answer_once(self) -> None:
        if engine_pools(self):
            await pool_one_token(self.engine._engine_client)
            return
        request = CompletionRequest(
            model=self._mesh.model.id, prompt=[0], max_tokens=1, temperature=0.0, ignore_eos=True
        )
        async for answer in await self.completions(request):
            if getattr(answer, "error", None) is not None:
                raise RuntimeError(answer.error.message)
