"""The router's Serve options against those that Ray Serve LLM's own builder computes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.config import parse as parse_module
from cluster.config.serve_file import MeshConfig
from cluster.router.options import router_options
from tests.support.serve.shipped_configs import SHAPES, serve_config


@pytest.mark.parametrize(
    "name",
    [
        "tiny-cpu.yaml",
        "tiny-cpu-planned.yaml",
        "tiny-autopilot.yaml",
        "tiny-offload.yaml",
        "tiny-tp.yaml",
        "tiny-signatures.yaml",
        *SHAPES,
    ],
)
def test_options_equal_ray_serve_llms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve.llm", reason="ray.serve.llm needs vllm")
    from ray.llm._internal.serve.core.server.builder import DEFAULT_DEPLOYMENT_OPTIONS
    from ray.serve.llm.deployment import LLMServer

    from cluster.router.server import llm_config_of

    monkeypatch.setattr(parse_module, "find_path", lambda value, where, folder: Path(value))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    config = MeshConfig.from_serve_config(serve_config(name)).llm
    theirs: dict[str, Any] = LLMServer.get_deployment_options(llm_config_of(config))
    ours = router_options(config.routers)
    if config.routers.workers > 1:
        assert theirs.pop("placement_group_strategy") == "PACK", "which may part an engine's workers"
        theirs["placement_group_strategy"] = "STRICT_PACK"
    for key in ("placement_group_bundles", "placement_group_strategy", "ray_actor_options"):
        assert ours[key] == theirs[key], key
    assert ours["num_replicas"] == config.routers.count
    for key in ("max_ongoing_requests", "health_check_period_s", "health_check_timeout_s"):
        expected = config.routers.deployment_config.get(key, DEFAULT_DEPLOYMENT_OPTIONS[key])
        assert ours[key] == expected, key


def test_autoscaling_and_bundles_of_the_user_stay() -> None:
    from cluster.config.llm_sections import RoutersSection

    section = RoutersSection(
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}},
        placement_group_config={"bundle_per_worker": {"CPU": 3}, "strategy": "SPREAD"},
    )
    options = router_options(section)
    assert "num_replicas" not in options
    assert options["autoscaling_config"]["max_replicas"] == 4
    assert options["placement_group_bundles"] == [{"CPU": 4, "GPU": 0}]
    assert options["placement_group_strategy"] == "SPREAD"


@pytest.mark.parametrize(
    ("accelerator", "group", "expected"),
    [
        ("cpu", None, [{"CPU": 2, "GPU": 0}, {"CPU": 1}, {"CPU": 1}]),
        ("gpu", None, [{"CPU": 1, "GPU": 1}, {"GPU": 1}, {"GPU": 1}]),
        ("gpu", {"bundle_per_worker": {"CPU": 4, "GPU": 1}}, [{"CPU": 5, "GPU": 1}, *[{"CPU": 4, "GPU": 1}] * 2]),
        ("gpu", {"bundles": [{"GPU": 1}] * 3}, [{"CPU": 1, "GPU": 1}, {"GPU": 1}, {"GPU": 1}]),
        ("cpu", {"bundles": [{"CPU": 3}]}, [{"CPU": 4, "GPU": 0}]),
    ],
)
def test_each_worker_of_an_engine_has_a_bundle_on_one_node(
    accelerator: Any, group: dict[str, Any] | None, expected: list[dict[str, float]]
) -> None:
    from cluster.config.llm_sections import RoutersSection

    section = RoutersSection(
        accelerator=accelerator, placement_group_config=group, engine_kwargs={"tensor_parallel_size": 3}
    )
    options = router_options(section)
    assert options["placement_group_bundles"] == expected
    assert options["placement_group_strategy"] == "STRICT_PACK"


def test_a_new_router_serves_before_an_old_one_stops_unless_the_user_has_no_room() -> None:
    from cluster.config.llm_sections import RoutersSection

    options = router_options(RoutersSection(count=3))
    assert options["max_surge_percent"] == 100
    assert options["graceful_shutdown_timeout_s"] == 600
    options = router_options(
        RoutersSection(deployment_config={"max_surge_percent": 0, "graceful_shutdown_timeout_s": 3600})
    )
    assert options["max_surge_percent"] == 0
    assert options["graceful_shutdown_timeout_s"] == 3600


def test_serve_takes_the_options() -> None:
    """A joint: `max_surge_percent` is new in Ray 2.60."""
    from ray import serve

    from cluster.config.llm_sections import RoutersSection

    deployment = serve.deployment(type("Router", (), {}), name="Router", **router_options(RoutersSection()))
    config = deployment._deployment_config
    assert (config.max_surge_percent, config.graceful_shutdown_timeout_s) == (100, 600)
