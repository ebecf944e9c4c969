"""Devices and transports that cannot work together are refused by name, and those that can are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse as parse_module
from cluster.config.devices import device_disagreements, gpus_of_engine, router_device_problems
from cluster.config.experts_sections import ShardsSection
from cluster.config.llm_sections import RoutersSection, TransportSection
from cluster.config.parse import ConfigError
from cluster.config.serve_file import MeshConfig
from tests.support.serve.shipped_configs import serve_config


def shards(gpus: float) -> ShardsSection:
    return ShardsSection(device="cuda" if gpus else "cpu", ray_actor_options={"num_gpus": gpus} if gpus else {})


def routers(gpus: float, **engine_kwargs: Any) -> RoutersSection:
    group = {"bundles": [{"CPU": 1, "GPU": gpus}]} if gpus else None
    accelerator: Any = "gpu" if gpus else "cpu"
    return RoutersSection(accelerator=accelerator, placement_group_config=group, engine_kwargs=engine_kwargs)


@pytest.mark.parametrize(
    ("name", "of_router", "of_shard", "expected"),
    [
        ("nccl", 0.2, 0.8, "a router (0.2 of a GPU) and a shard (0.8) fit one GPU, and NCCL refuses two ranks"),
        ("nccl", 0.2, 0.9, None),  # 1.1 of a GPU: Ray keeps them apart
        ("nccl", 1, 1, None),
        ("nccl", 1, 0, "transport.name is nccl, but shards.device is 'cpu', expected cuda"),
        ("cuda_ipc", 1, 0, "transport.name is cuda_ipc, but shards.device is 'cpu', expected cuda"),
        ("cuda_ipc", 0.2, 0.8, None),
        ("auto", 0.2, 0.8, None),
        ("auto", 1, 0, None),
        ("auto", 0, 1, None),
        ("shm", 1, 0, None),
    ],
)
def test_rows_can_travel_or_the_reason_is_told(
    name: Any, of_router: float, of_shard: float, expected: str | None
) -> None:
    told = list(device_disagreements(shards(of_shard), routers(of_router), TransportSection(name=name), 2))
    assert len(told) == (expected is not None)
    assert expected is None or expected in told[0]


@pytest.mark.parametrize("name", ["nccl", "cuda_ipc"])
def test_a_transport_between_gpus_needs_engines_on_gpus(name: Any) -> None:
    told = list(router_device_problems(routers(0), TransportSection(name=name)))
    assert told == [f"transport.name is {name}, which joins GPUs, but routers.accelerator is 'cpu': use auto"]
    assert list(router_device_problems(routers(1), TransportSection(name=name))) == []


def test_an_engine_with_a_part_of_a_gpu_says_how_large_its_cache_is() -> None:
    told = list(router_device_problems(routers(0.22), TransportSection()))
    assert len(told) == 1
    assert "kv_cache_memory_bytes is not set, but an engine has 0.22 of a GPU" in told[0]
    assert list(router_device_problems(routers(0.22, kv_cache_memory_bytes=1 << 30), TransportSection())) == []
    assert list(router_device_problems(routers(1), TransportSection())) == []


@pytest.mark.parametrize(
    ("name", "engine_kwargs", "accelerator", "told"),
    [
        ("auto", {}, "gpu", True),
        ("nccl", {}, "gpu", True),
        ("cuda_ipc", {}, "gpu", False),  # rows are in memory of the shards' GPUs
        ("auto", {"kv_cache_memory_bytes": 1 << 30}, "gpu", False),
        ("auto", {}, "cpu", False),
    ],
)
def test_memory_is_left_for_as_many_shards_as_there_may_be(
    name: Any, engine_kwargs: dict[str, Any], accelerator: Any, told: bool
) -> None:
    transport = TransportSection(name=name, reserve_for_shards=4)
    engines = RoutersSection(accelerator=accelerator, engine_kwargs=engine_kwargs)
    assert list(device_disagreements(shards(1), engines, transport, 4)) == []
    problems = list(device_disagreements(shards(1), engines, transport, 5))
    assert len(problems) == told
    assert not told or "reserve_for_shards is 4, but there may be 5 shards" in problems[0]


def test_the_most_shards_are_those_of_the_autoscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse_module, "find_path", lambda value, where, folder: Path(value))
    data = serve_config("qwen3-30b-a3b-4gpu.yaml")
    MeshConfig.from_serve_config(data)
    experts = next(app for app in data["applications"] if app["name"] == "experts")
    shard = next(each for each in experts["deployments"] if each["name"] == "ExpertShard")
    shard.pop("num_replicas", None)
    policy = {"policy_function": "cluster.autoscaling.policies:shards"}
    shard["autoscaling_config"] = {"min_replicas": 3, "max_replicas": 17, "policy": policy}
    with pytest.raises(ConfigError, match="reserve_for_shards is 16, but there may be 17 shards"):
        MeshConfig.from_serve_config(data)


def test_gpus_of_an_engine_are_those_of_its_bundles() -> None:
    assert gpus_of_engine(RoutersSection(accelerator="gpu")) == 1
    assert gpus_of_engine(RoutersSection()) == 0
    one = {"bundle_per_worker": {"GPU": 0.5}}
    assert gpus_of_engine(RoutersSection(accelerator="gpu", placement_group_config=one)) == 0.5
    assert gpus_of_engine(RoutersSection(accelerator="gpu", engine_kwargs={"tensor_parallel_size": 4})) == 4


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (None, None),
        ({"bundle_per_worker": {"CPU": 1, "GPU": 1}}, None),
        ({"bundles": [{"GPU": 1}, {"GPU": 1}, {"CPU": 1}], "strategy": "STRICT_PACK"}, None),
        ({"bundles": [{"GPU": 2}]}, "has bundles with 2 GPU(s), but the 2 workers of an engine (tensor_parallel_size)"),
        ({"bundles": [{"GPU": 1}]}, "has bundles with 1 GPU(s)"),
        ({"bundles": [{"GPU": 1}] * 3}, "has bundles with 1, 1, 1 GPU(s)"),
        ({"bundle_per_worker": {"GPU": 0.5}}, "has bundles with 0.5, 0.5 GPU(s)"),
        ({"bundle_per_worker": {"GPU": 1}, "strategy": "SPREAD"}, "strategy is SPREAD, but the 2 workers"),
        ({"bundle_per_worker": {"GPU": 1}, "strategy": "PACK"}, "remove it, the default is STRICT_PACK then"),
    ],
)
def test_workers_of_an_engine_have_a_gpu_each_on_one_host(group: dict[str, Any] | None, expected: str | None) -> None:
    section = RoutersSection(accelerator="gpu", placement_group_config=group, engine_kwargs={"tensor_parallel_size": 2})
    told = list(router_device_problems(section, TransportSection()))
    assert len(told) == (expected is not None)
    assert expected is None or expected in told[0]


@pytest.mark.parametrize("name", ["mixtral-8x7b-2gpu.yaml", "gpt-oss-120b-2gpu.yaml"])
def test_a_config_whose_router_shares_a_gpu_is_refused_over_nccl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse_module, "find_path", lambda value, where, folder: Path(value))
    data = serve_config(name)
    MeshConfig.from_serve_config(data)
    args = next(app["args"] for app in data["applications"] if app["name"] == "llm")
    args["transport"]["name"] = "nccl"
    with pytest.raises(ConfigError, match="NCCL refuses two ranks on one GPU: use auto or cuda_ipc"):
        MeshConfig.from_serve_config(data)
