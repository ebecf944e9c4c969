"""A router: Ray Serve LLM's server whose engine follows the placement controller.

Two loops run beside the engine, both through `collective_rpc`, which reaches the worker between steps:

    follow  long-polls the controller and applies each new epoch
    watch   reads the worker's counters, for health, metrics and the list of shards that were given up
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import CompletionRequest

from cluster.config.apps import LLMAppConfig
from cluster.controller.client import ControllerClient, ControllerLostError
from cluster.observability.metrics import RouterMetrics
from cluster.ray_joints import no_download_callback, replica_identity, unfinished_requests, vllm_engine_cls
from cluster.router.options import runtime_env_of

logger = logging.getLogger("ray.serve")

LONG_POLL_S = 5.0
CONNECT_AHEAD_S = 3.0  # how long an epoch is held back for a shard that is slow to connect; nobody else waits for it
WATCH_S = 1.0
MAX_MISSED_READINGS = (
    3  # readings in a row, of deadlines.apply_s each, after which an engine that does not answer is given up
)


class EngineSilentError(RuntimeError):
    """The engine's worker did not answer a call; the message says which and how long it was waited."""


def llm_config_of(config: LLMAppConfig) -> LLMConfig:
    """Ray Serve LLM's config: the user's options, with the model, the plug-in and the server class."""
    routers = config.routers
    fields: dict[str, Any] = {
        "callback_config": {"callback_class": no_download_callback()},
        **routers.llm_config,
        "model_loading_config": {"model_id": config.model.id, "model_source": config.model.path},
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

    async def __init__(self, llm_config: LLMConfig, *, mesh: LLMAppConfig) -> None:  # type: ignore[misc]
        self._mesh = mesh
        self._identity = replica_identity()
        self._controller = ControllerClient(self._mesh.experts_app)
        self._term, self._epoch = "", -1
        self._incarnations: dict[int, str] = {}
        self._status: dict[str, Any] = {}
        self._reading: asyncio.Task[dict[str, Any]] | None = None
        self._missed_readings = 0
        self._metrics = RouterMetrics(self._identity.replica_id)
        self._probe_lock = asyncio.Lock()
        self._loops: list[asyncio.Task[None]] = []
        extra = dict(llm_config.engine_kwargs["additional_config"])
        extra["expertmesh"] = {**extra["expertmesh"], "router_id": self._identity.replica_id}
        llm_config.update_engine_kwargs(additional_config=extra)
        in_process = self._mesh.routers.accelerator == "cpu" and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ
        await super().__init__(llm_config, engine_cls=vllm_engine_cls(in_process))

    async def start(self) -> None:
        """Start the engine and wait, meanwhile, for all shards; not healthy before the first epoch is applied."""
        deadlines = self._mesh.deadlines
        first = asyncio.create_task(self._first_membership(deadlines.membership_s))
        try:
            await super().start()
            answer = await first
            _check_taken(answer["membership"], await self._apply(answer, wait_s=None))
        finally:
            first.cancel()
        self._loops = [
            asyncio.create_task(self._follow(), name="follow"),
            asyncio.create_task(self._watch(), name="watch"),
        ]

    async def check_health(self) -> None:
        """Raises when the engine or one of the loops has ended or is stuck; Serve then restarts this router."""
        await super().check_health()
        for task in self._loops:
            if task.done():
                raise RuntimeError(f"{task.get_name()} of this router ended: {task.exception()!r}")
        if self._missed_readings >= MAX_MISSED_READINGS:
            raise EngineSilentError(
                f"the engine's worker answered none of {self._missed_readings} readings of its counters, "
                f"{self._mesh.deadlines.apply_s} s each"
            )

    async def mesh_status(self) -> dict[str, Any]:
        """The worker's counters plus what this replica knows; for the ingress. Callers at one time share a reading."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_status())
        return {
            **await asyncio.shield(self._reading),
            "term": self._term,
            "pid": os.getpid(),
            "unfinished_requests": unfinished_requests(self),
        }

    async def mesh_trace(self) -> tuple[str, bytes]:
        """This router's name, and its sampled routing decisions as the bytes of an .npz file (none: no bytes)."""
        return self._identity.replica_id, await self._ask_worker("expertmesh_trace")

    async def mesh_clear_trace(self) -> None:
        """Forget the sampled routing decisions and begin anew."""
        await self._ask_worker("expertmesh_clear_trace")

    async def generation_health(self) -> dict[str, Any]:
        """Whether tokens come out of this router, with their experts on shards: {"ok", "reason", "router_id", ...}.

        A recent dispatch to the shards counts; without one a token is generated.
        """
        within_s, timeout_s = self._mesh.http.healthy_within_s, self._mesh.deadlines.probe_s
        answer: dict[str, Any] = {
            "ok": False,
            "router_id": self._identity.replica_id,
            "reason": "",
            "how": "recent token",
        }
        try:
            async with asyncio.timeout(timeout_s):
                async with self._probe_lock:
                    status = await self._read_status()
                    if not _recent(status, within_s):
                        answer["how"] = "probe"
                        await self._generate_one_token()
                        status = await self._read_status()
        except TimeoutError:
            answer["reason"] = f"no token within {timeout_s} s"
            return answer
        except Exception as error:
            answer["reason"] = f"{type(error).__name__}: {error}"
            return answer
        answer.update(epoch=status["epoch"], connected=status["connected"], lost=status["lost"])
        answer["ok"] = _recent(status, max(within_s, timeout_s))
        if not answer["ok"]:
            answer["reason"] = f"no shard answered; lost: {status['lost']}"
        return answer

    async def close(self) -> None:
        """Say farewell to the controller and release the engine."""
        for task in self._loops:
            task.cancel()
        try:
            await self._controller.call("deregister_router", self._identity.replica_id, timeout_s=1.0)
        except ControllerLostError as error:
            logger.info("leaving without a farewell: %s", error)
        await self.engine.shutdown()

    async def _first_membership(self, timeout_s: float) -> dict[str, Any]:
        end_s = time.monotonic() + timeout_s
        missing: Any = "all"
        while time.monotonic() < end_s:
            try:
                answer = await self._poll()
            except ControllerLostError as error:
                logger.warning("%s; asking again", error)
                await asyncio.sleep(0.5)
                continue
            if answer["membership"] is not None:
                return answer
            if answer["waiting_for"] != missing:
                missing = answer["waiting_for"]
                logger.info("waiting for shards of ranks %s", missing)
        raise RuntimeError(f"no complete membership within {timeout_s} s; missing ranks: {missing}")

    async def _poll(self) -> dict[str, Any]:
        lost = {
            rank: self._incarnations[rank]
            for rank in map(int, self._status.get("lost", ()))
            if rank in self._incarnations
        }
        return await self._controller.call(
            "await_membership",
            self._identity.replica_id,
            self._term,
            self._epoch,
            lost,
            LONG_POLL_S,
            timeout_s=LONG_POLL_S + 10,
        )

    async def _connect_ahead(self, membership: dict[str, Any]) -> None:
        """Connect to new shards while the engine goes on; leave for the next epoch what takes too long."""
        end_s = time.monotonic() + CONNECT_AHEAD_S
        while time.monotonic() < end_s:
            missing = await self._ask_worker("expertmesh_connect_ahead", membership["endpoints"])
            if not missing:
                return
            await asyncio.sleep(0.05)
        logger.warning("shards %s are still connecting; this router goes on without them", missing)

    async def _apply(self, answer: dict[str, Any], wait_s: float | None) -> dict[str, Any]:
        membership = answer["membership"]
        connecting_s = self._mesh.deadlines.connect_s if wait_s is None else wait_s
        result = await self._ask_worker("expertmesh_apply_membership", membership, wait_s, and_s=connecting_s)
        self._term, self._epoch = answer["term"], membership["epoch"]
        self._incarnations = {
            rank: endpoint["incarnation"]
            for rank, endpoint in enumerate(membership["endpoints"])
            if endpoint is not None
        }
        logger.info("epoch %d: connected to shards %s, without %s", self._epoch, result["connected"], result["lost"])
        self._status = {**self._status, "lost": result["lost"]}
        return result

    async def _follow(self) -> None:
        while True:
            try:
                answer = await self._poll()
                if answer["membership"] is not None:
                    await self._connect_ahead(answer["membership"])
                    await self._apply(answer, wait_s=0.0)
            except ControllerLostError as error:
                logger.warning("%s; this router goes on at epoch %d", error, self._epoch)
                await asyncio.sleep(1.0)
            except Exception:
                logger.exception("epoch not applied; this router goes on at epoch %d", self._epoch)
                await asyncio.sleep(1.0)

    async def _watch(self) -> None:
        while True:
            try:
                self._metrics.export(await self._read_status())
            except EngineSilentError as error:
                self._missed_readings += 1
                logger.warning("%s", error)
            except Exception as error:
                logger.warning("counters of the worker not read: %r", error)
            await asyncio.sleep(WATCH_S)

    async def _read_status(self) -> dict[str, Any]:
        self._status = await self._ask_worker("expertmesh_status")
        self._missed_readings = 0
        return self._status

    async def _ask_worker(self, method: str, *args: Any, and_s: float = 0.0) -> Any:
        """What the worker's method answers. Raises EngineSilentError after deadlines.apply_s and `and_s`.

        The deadline is kept here: vLLM takes a timeout too, and its engines in another process, as its executor of
        one worker, do without it.
        """
        within_s = self._mesh.deadlines.apply_s + and_s
        try:
            async with asyncio.timeout(within_s):
                [answer] = await self.collective_rpc(method, args=args)
        except TimeoutError:
            raise EngineSilentError(f"the engine's worker did not answer {method} in {within_s} s") from None
        return answer

    async def _generate_one_token(self) -> None:
        request = CompletionRequest(
            model=self._mesh.model.id, prompt=[0], max_tokens=1, temperature=0.0, ignore_eos=True
        )
        async for answer in await self.completions(request):
            if getattr(answer, "error", None) is not None:
                raise RuntimeError(answer.error.message)


def _check_taken(membership: dict[str, Any], applied: dict[str, Any]) -> None:
    """Raises where every shard there is refused this router, which would compute all experts by itself, unnoticed.

    Shards that are away or slow do not count: they come back, and a router that starts meanwhile has to serve.
    """
    there = [rank for rank, endpoint in enumerate(membership["endpoints"]) if endpoint is not None]
    if there and sorted(applied["refused"]) == there:
        reasons = {reason for rank, reason in applied["lost"].items() if int(rank) in there}
        raise RuntimeError(f"no shard takes this router: {'; '.join(sorted(reasons))}")


def _recent(status: dict[str, Any], within_s: float) -> bool:
    age_s = status["last_success_age_s"]
    return bool(status["connected"]) and age_s is not None and age_s <= within_s
