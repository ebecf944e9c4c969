"""The section `pools`: what each pool's routers get, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from cluster.config.apps import LLMAppConfig
from cluster.config.parse import ConfigError, parse
from cluster.config.replicas import ROUTER_POLICY
from cluster.config.serve_file import MeshConfig
from tests.support.serve.service import REPOSITORY

MODEL = {"id": "m", "path": str(REPOSITORY / "examples" / "tiny-moe"), "dtype": "float32"}
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
SCALING = {"min_replicas": 1, "max_replicas": 3, "policy": {"policy_function": ROUTER_POLICY}}


def llm(pools: dict[str, Any], **routers: Any) -> LLMAppConfig:
    return parse(LLMAppConfig, {"model": MODEL, "routers": routers, "pools": pools})


def shipped() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((REPOSITORY / "configs" / "tiny-pools.yaml").read_text())
    data["applications"][0]["args"]["model"]["path"] = MODEL["path"]
    return data


def test_a_pool_has_its_own_values_over_those_of_all_routers() -> None:
    config = llm(
        {
            "prefill": {"count": 2, "engine_kwargs": {"max_num_seqs": 4}, "max_rows_per_dispatch": 64},
            "decode": {"deployment_config": {"num_replicas": 3}, "env_vars": {"A": "2"}},
            "kv_folder": "/dev/shm/here",
        },
        engine_kwargs={"max_num_seqs": 8, "max_model_len": 99},
        deployment_config={"health_check_period_s": 7},
        env_vars={"A": "1", "B": "1"},
    )
    prefill, decode = config.of_pool("prefill"), config.of_pool("decode")
    assert [each.pool for each in config.each_pool] == ["prefill", "decode"]
    assert (prefill.routers.count, prefill.routers.deployment_config) == (2, {"health_check_period_s": 7})
    assert decode.routers.deployment_config == {"health_check_period_s": 7, "num_replicas": 3}
    assert decode.routers.env_vars == {"A": "2", "B": "1"}
    assert prefill.router_settings().max_rows_per_dispatch == 64
    assert decode.router_settings().max_rows_per_dispatch == config.transport.max_rows_per_dispatch
    for each, sequences, role in ((prefill, 4, "kv_producer"), (decode, 8, "kv_consumer")):
        options = each.engine_kwargs()
        assert (options["max_num_seqs"], options["max_model_len"]) == (sequences, 99)
        transfer = options["kv_transfer_config"]
        assert (transfer["kv_role"], transfer["kv_load_failure_policy"]) == (role, "recompute")
        assert transfer["kv_connector_extra_config"]["folder"] == "/dev/shm/here"
        assert options["additional_config"]["expertmesh"]["pool"] == each.pool


def test_without_pools_nothing_of_this_reaches_an_engine() -> None:
    config = parse(LLMAppConfig, {"model": MODEL})
    assert config.each_pool == [config]
    assert "kv_transfer_config" not in config.engine_kwargs()
    assert config.router_settings().pool is None
    with pytest.raises(ValueError, match="no section pools"):
        config.of_pool("decode")


def test_a_connector_of_vllm_is_handed_on() -> None:
    config = llm({}, engine_kwargs={"kv_transfer_config": NIXL, "tensor_parallel_size": 2}, accelerator="gpu")
    for each in config.each_pool:
        # A load that fails costs a prompt computed twice, where vLLM by itself fails the request.
        more = {"kv_load_failure_policy": "recompute", "kv_buffer_device": "cuda"}
        assert each.engine_kwargs()["kv_transfer_config"] == {**NIXL, **more}


def test_a_connector_of_vllm_gets_what_the_user_leaves_open() -> None:
    told = {"kv_connector": "NixlConnector", "kv_load_failure_policy": "fail"}
    config = llm({}, engine_kwargs={"kv_transfer_config": told})
    for each, role in zip(config.each_pool, ("kv_producer", "kv_consumer"), strict=True):
        asked = each.engine_kwargs()["kv_transfer_config"]
        assert asked == {**told, "kv_role": role, "kv_buffer_device": "cpu"}


@pytest.mark.parametrize(
    ("pools", "routers", "expected"),
    [
        ({}, {"count": 2}, "routers.count is set: with pools, set pools.prefill.count and pools.decode.count"),
        ({}, {"deployment_config": {"num_replicas": 2}}, "routers.deployment_config.num_replicas is set"),
        ({}, {"accelerator": "gpu"}, "pools.prefill: accelerator is gpu, but KV cache goes through files"),
        ({"decode": {"engine_kwargs": {"tensor_parallel_size": 2}}}, {}, "pools.decode: tensor_parallel_size is 2"),
        (
            {},
            {"engine_kwargs": {"speculative_config": {"method": "draft_model", "model": "x"}}},
            "speculative_config.method is 'draft_model', expected ngram",
        ),
        ({"decode": {"engine_kwargs": {"kv_transfer_config": NIXL}}}, {}, "set it for both, or for neither"),
        (
            {"prefill": {"count": 1, "deployment_config": {"num_replicas": 1}}},
            {},
            "pools.prefill: count and deployment_config.num_replicas are both set",
        ),
        ({"decode": {"engine_kwargs": {"load_format": "auto"}}}, {}, "load_format is set by the project"),
        ({}, {"engine_kwargs": {"kv_transfer_config": "Nixl"}}, "kv_transfer_config is 'Nixl', expected a mapping"),
        ({}, {"expert_signatures": {}}, "routers.expert_signatures is set: with pools, prefill routers compute"),
        ({"kv_folder": "kv"}, {}, "'kv' is no absolute path"),
        ({"prefill_s": 200}, {}, "kv_max_age_s is 120, expected more than prefill_s (200)"),
        ({"prefil": {}}, {}, "prefil"),
    ],
)
def test_what_does_not_go_together_is_refused(pools: dict[str, Any], routers: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        llm(pools, **routers)
    assert expected in str(refused.value)


def test_each_pool_scales_by_its_own_deployment() -> None:
    data = shipped()
    args = data["applications"][1]["args"]
    del args["pools"]["prefill"]["count"]
    data["applications"][1]["deployments"] = [
        {"name": "PrefillRouter", "autoscaling_config": SCALING},
        {"name": "Router", "num_replicas": 2},
    ]
    assert MeshConfig.from_serve_config(data).router_scaling == {"PrefillRouter": SCALING}
    args["pools"]["prefill"]["count"] = 1
    with pytest.raises(ConfigError, match=r"args\.pools\.prefill\.count and autoscaling_config exclude each other"):
        MeshConfig.from_serve_config(data)
    data["applications"][1]["deployments"][0]["name"] = "Prefill"
    with pytest.raises(ConfigError, match="'Prefill', expected Router or PrefillRouter"):
        MeshConfig.from_serve_config(data)


def test_pairs_of_both_pools_count() -> None:
    data = shipped()
    data["applications"][0]["args"]["shards"]["max_pairs"] = 1
    with pytest.raises(
        ConfigError, match=r"up to 1 routers of 1 worker\(s\) and 1 routers of 1 worker\(s\) have 2 pairs"
    ):
        MeshConfig.from_serve_config(data)


def test_a_pools_messages_fit_the_shards() -> None:
    data = shipped()
    data["applications"][1]["args"]["pools"]["decode"]["max_rows_per_dispatch"] = 4096
    with pytest.raises(ConfigError, match="max_rows_per_dispatch is 4096, more than shards"):
        MeshConfig.from_serve_config(data)
