"""The places where the project reaches into Ray and Ray Serve LLM: a new version that moves one fails here, by name."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import ray
from ray.serve.context import ReplicaContext
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaRank

import cluster.ray_joints as joints


def test_replica_context_tells_rank_application_and_name() -> None:
    assert "rank" in {field.name for field in dataclasses.fields(ReplicaContext)}
    assert {"app_name", "replica_tag"} <= set(dir(ReplicaContext))
    assert "rank" in ReplicaRank.model_fields


def test_handles_broadcast() -> None:
    assert callable(DeploymentHandle.broadcast)
    from ray.serve.handle import DeploymentBroadcastResponse

    assert inspect.iscoroutinefunction(DeploymentBroadcastResponse._fetch_replica_results_async)
    assert "rr.get_async()" in inspect.getsource(DeploymentBroadcastResponse.results_async)


def test_a_config_can_be_handed_to_a_running_serve() -> None:
    from ray.serve import context
    from ray.serve._private.client import ServeControllerClient

    assert callable(context._get_global_client)
    assert "_blocking" in inspect.signature(ServeControllerClient.deploy_apps).parameters


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
def test_ingress_takes_our_app_and_handles_by_model() -> None:
    from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

    assert {"endpoint_map", "app"} <= set(inspect.signature(make_fastapi_ingress).parameters)
    assert {"llm_deployments", "model_cards"} <= set(inspect.signature(OpenAiIngress.__init__).parameters)
    assert callable(joints.model_card)
    assert "await self._get_model_id(body.model)" in inspect.getsource(OpenAiIngress._get_response)
    assert "_model_cards" in inspect.getsource(OpenAiIngress._get_model_id)
