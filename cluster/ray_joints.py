"""Every use of undocumented internals of Ray and Ray Serve LLM, in one place.

`tests/cluster/test_ray_joints.py` says which of these a new version has moved. Imports of `ray.serve.llm` stay inside
functions: they import vllm, which takes seconds and which shards and the controller do not need.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle

from cluster.autoscaling.measure import EngineMeasure
from experts.protocol.log_lines import ProcessFields, set_log_fields

FIND_REPLICAS_S = 3.0  # Serve pushes the list of replicas; a handle that is new waits for it


@dataclass(frozen=True)
class ReplicaIdentity:
    """Who this Serve replica is."""

    app_name: str
    replica_id: str
    rank: int  # Serve's, 0 to num_replicas - 1; a dead replica's rank passes to its successor
    node_id: str


def replica_identity() -> ReplicaIdentity:
    """Identity of the replica that this code runs in."""
    context = serve.get_replica_context()
    return ReplicaIdentity(
        app_name=context.app_name,
        replica_id=context.replica_tag,
        rank=context.rank.rank,
        node_id=ray.get_runtime_context().get_node_id(),
    )


def deploy_config(serve_config: dict[str, Any]) -> None:
    """Hand a whole Serve config to a running Serve, as `serve run` does; `serve deploy` can then change it in place."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(serve_config), _blocking=False)


def delete_applications(names: list[str]) -> None:
    """Delete applications side by side, and wait until they are gone; `serve.delete` takes one after another."""
    from ray.serve.context import _get_global_client

    _get_global_client().delete_apps(names, blocking=True)


def deployment_handle(name: str, app_name: str) -> DeploymentHandle:
    """A handle to a deployment that need not exist yet, as applications of one config start side by side."""
    return serve.get_deployment_handle(name, app_name, _check_exists=False)


@dataclass(frozen=True)
class ReplicaCounts:
    """Replicas of one deployment, as Serve's controller counts them."""

    wanted: int
    running: int


def replicas_of(app_name: str, deployment: str) -> ReplicaCounts | None:
    """How many replicas a deployment should have and how many run; None if Serve does not say. Blocks for a moment."""
    from ray.serve.context import _get_global_client

    try:
        details = _get_global_client().get_serve_details()["applications"][app_name]["deployments"][deployment]
        running = sum(replica["state"] == "RUNNING" for replica in details["replicas"])
        return ReplicaCounts(int(details["target_num_replicas"]), running)
    except Exception as error:
        logging.getLogger("ray.serve").info("Serve does not say how many replicas %s has: %r", deployment, error)
        return None


def in_replica() -> bool:
    """Whether this process is a Serve replica. Those that serve HTTP also call what is meant for Serve's proxies."""
    from ray.serve.exceptions import RayServeException

    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return True


def any_replica_serves(path: str) -> bool | None:
    """Whether the application that takes requests for `path` has a replica that runs; None if Serve does not say.

    Blocks for a moment.
    """
    from ray.serve.context import _get_global_client

    try:
        applications = _get_global_client().get_serve_details()["applications"].values()
        prefixes = {app["route_prefix"]: app for app in applications if app.get("route_prefix")}
        fitting = [prefix for prefix in prefixes if f"{path}/".startswith(f"{prefix.rstrip('/')}/")]
        deployments = prefixes[max(fitting, key=len)]["deployments"].values()
        return any(replica["state"] == "RUNNING" for each in deployments for replica in each["replicas"])
    except Exception as error:
        logging.getLogger("ray.serve").info("Serve does not say what serves %s: %r", path, error)
        return None


def with_request_router(application: Application, options: dict[str, Any]) -> Application:
    """`application` with a deployment that HAProxy asks which replica of its ingress gets a request."""
    from ray.llm._internal.serve.core.ingress.router import LLMRouter

    asked = serve.deployment(LLMRouter, **options).bind(server=application)
    return application._with_ingress_request_router(asked)


def show_data_plane_log(**fields: Any) -> None:
    """Send what `experts` logs, downloads and loading among it, where Serve's own log of this process goes.

    Where that is JSON, all of it is, on standard error too, and each line has `fields` (see `set_log_fields`).
    """
    serve_log, ours = logging.getLogger("ray.serve"), logging.getLogger("experts")
    set_log_fields(**fields)
    if logs_are_json():
        _log_json(serve_log)
    ours.setLevel(serve_log.getEffectiveLevel())
    for handler in serve_log.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)


def logs_are_json() -> bool:
    """Whether Serve writes the log file of this process, a replica or an application's builder, as JSON."""
    from ray._common.formatters import JSONFormatter

    handlers = logging.getLogger("ray.serve").handlers
    return any(isinstance(getattr(each, "target", each).formatter, JSONFormatter) for each in handlers)


def _log_json(log: logging.Logger) -> None:
    """Serve writes JSON to its file alone. The file's filters add fields to a record, so the stream comes after it."""
    from ray._common.formatters import JSONFormatter

    log.handlers.sort(key=lambda handler: type(handler) is logging.StreamHandler)
    for handler in log.handlers:
        if not any(isinstance(each, ProcessFields) for each in handler.filters):
            handler.addFilter(ProcessFields())
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(JSONFormatter())


def take_worker_lines(take: Callable[[dict[str, Any]], Any]) -> None:
    """Hand what the cluster's processes print to `take` ({lines, pid, ip, actor_name}), instead of printing it here.

    What Ray says of dead workers and nodes comes the same way, with the pid "raylet".
    """
    from ray._private import worker
    from ray._private.ray_logging import global_worker_stdstream_dispatcher

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.add_handler("ray_print_logs", take)
    worker.print_to_stdstream = lambda data, ignore_prefix: take(data)


def agree(key: str, propose: Callable[[], str]) -> str:
    """One answer for all processes of this Serve: that of whoever asked first, until Serve is shut down.

    Kept in Ray's key-value store. Without a running Serve, `propose()`.
    """
    from ray.experimental import internal_kv
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    if not ray.is_initialized():
        return propose()
    try:
        # A controller that is restarted keeps its id.
        serve_id = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)._actor_id.hex()
    except ValueError:
        return propose()
    place = f"expertmesh/{serve_id}/{key}"
    answer = internal_kv._internal_kv_get(place)
    if answer is None:
        internal_kv._internal_kv_put(place, propose(), overwrite=False)
        answer = internal_kv._internal_kv_get(place)
    return str(answer, "utf-8")


def cluster_at(address: str) -> str | None:
    """HOST:PORT of the cluster that `ray.init` would connect to. None: Ray finds none, or would start one."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address(address)
    except Exception:  # an address of another form, which ray.init judges
        return None


def wants_other_token(address: str, timeout_s: float) -> bool:
    """Whether the cluster at HOST:PORT refuses this process's token, or its lack of one.

    Ray's own client asks for half a minute before it says so. An older Ray, or one that is slow, refuses nothing.
    """
    import grpc
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    metadata = []
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        token = AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True)
        if token:
            metadata = [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def begin_at_zero(counter: Any, tags: dict[str, str]) -> None:
    """Have a counter of `ray.serve.metrics` appear with the value 0, which its `inc` refuses."""
    counter._record(0.0, tags=tags)


def node_address() -> str:
    """IP address at which other nodes reach this one; 127.0.0.1 on a single machine without a network."""
    return ray.util.get_node_ip_address()


class NoReplicaError(RuntimeError):
    """A deployment has no replica that runs, or is not deployed."""


async def broadcast(handle: DeploymentHandle, method: str, timeout_s: float, *args: Any) -> list[Any]:
    """What each replica answers to a method, in no order; an exception from one that failed or took too long.

    Ray's own way of collecting gives no answer at all if one is missing. Raises what Ray raises if the replicas are not
    known, and NoReplicaError if Serve names none, for which it would wait for ever.
    """
    end_s = asyncio.get_running_loop().time() + timeout_s
    find_s = min(timeout_s, FIND_REPLICAS_S)
    try:
        results = await asyncio.wait_for(handle.broadcast(method, *args)._fetch_replica_results_async(), find_s)
    except TimeoutError:
        raise NoReplicaError(f"Serve named no replica for {method} in {find_s:g} s") from None
    asked = [asyncio.ensure_future(result.get_async()) for result in results]
    try:
        if asked:
            await asyncio.wait(asked, timeout=max(0.0, end_s - asyncio.get_running_loop().time()))
        answered = [task.done() and not task.cancelled() for task in asked]
        return [
            (task.exception() or task.result()) if there else TimeoutError()
            for task, there in zip(asked, answered, strict=True)
        ]
    finally:
        for task in asked:
            if not task.done():
                task.cancel()
                task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else retrieves it


def unfinished_requests(llm_server: Any) -> int:
    """Requests that the engine of an LLMServer replica holds, running or waiting."""
    return int(llm_server.engine._engine_client.output_processor.get_num_unfinished_requests())


def follow_engine(llm_server: Any, measure: EngineMeasure) -> bool:
    """Have vLLM tell `measure` what each step brought. False: the engine counts nothing (`disable_log_stats`)."""
    engine = llm_server.engine._engine_client
    measure.max_requests = int(engine.vllm_config.scheduler_config.max_num_seqs)
    if engine.logger_manager is None:
        return False
    engine.logger_manager.stat_loggers.append(_StepListener(measure))
    return True


class _StepListener:
    """One of vLLM's stat loggers, which has to bear all of their methods."""

    def __init__(self, measure: EngineMeasure) -> None:
        self._measure = measure

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._measure.record(scheduler_stats.num_running_reqs, waiting, scheduler_stats.kv_cache_usage)
        if iteration_stats is not None:
            self._measure.add(
                between_s=iteration_stats.inter_token_latencies_iter,
                first_s=iteration_stats.time_to_first_tokens_iter,
                queue_s=[request.queued_time for request in iteration_stats.finished_requests],
            )

    def log(self) -> None: ...

    def log_engine_initialized(self) -> None: ...

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None: ...

    def record_admission_rejection(self, reason: str) -> None: ...


def vllm_engine_cls(in_process: bool) -> type:
    """Ray Serve LLM's engine class; `in_process` puts the one worker of a CPU engine into the engine's own process.

    On CPU vLLM gives each worker a process of its own, to bind the worker's threads to cores. Without a binding that
    process gains nothing and costs ten seconds of start-up and two hops in every step.
    """
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    class MeshEngine(VLLMEngine):
        def _start_async_llm_engine(self, engine_args: Any, engine_config: Any, placement_group: Any) -> Any:
            parallel = engine_config.parallel_config
            if in_process and parallel.distributed_executor_backend == "mp" and parallel.world_size == 1:
                parallel.distributed_executor_backend = "uni"
            return super()._start_async_llm_engine(engine_args, engine_config, placement_group)

        async def start(self) -> None:
            await super().start()
            # Ray 2.60 looks for it under its name before vLLM 0.32.
            renamed = getattr(self._app_state, "serving_tokenization", None)
            self._oai_serving_tokenization: Any = renamed or self._oai_serving_tokenization

    return MeshEngine


def no_download_callback() -> type:
    """A callback for LLMConfig that skips the download step, since the checkpoint is a folder.

    The step would start one more process on each node, which would import vllm and find nothing to do.
    """
    from ray.llm._internal.common.callbacks.base import CallbackBase

    class NoDownload(CallbackBase):
        async def on_before_node_init(self) -> None:
            self.ctx.run_init_node = False

    return NoDownload
