"""How many replicas a file asks for: bounds and policies of shards and routers, and what they contradict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config.parse import ConfigError
from cluster.config.replicas import ROUTER_POLICY, SHARD_POLICY
from cluster.config.serve_file import MeshConfig

TINY = Path(__file__).parents[3] / "configs" / "tiny-autoscaling.yaml"
EXPERTS, LLM = 0, 1  # positions in `applications`
SHARDS = ("applications", EXPERTS, "deployments", 0, "autoscaling_config")
LIVE = ("applications", EXPERTS, "deployments", 1, "user_config")
ROUTERS = ("applications", LLM, "deployments", 0, "autoscaling_config")
ARGS = ("applications", LLM, "args", "routers")


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """The shipped config with another value; None removes the key."""
    data = yaml.safe_load(TINY.read_text())
    place = data
    for part in path[:-1]:
        place = place[part]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return data


def test_the_shipped_file_starts_with_the_fewest() -> None:
    mesh = MeshConfig.from_file(TINY)
    assert mesh.num_shards == 2
    assert mesh.shard_scaling is not None
    assert (mesh.shard_scaling["max_replicas"], mesh.router_scaling["Router"]["max_replicas"]) == (4, 2)
    assert mesh.live.scaling.slo.time_per_output_token_ms == 30


def test_routers_may_scale_by_the_arguments_and_by_serves_own_policy() -> None:
    data = changed(*ARGS, "deployment_config", to={"autoscaling_config": {"min_replicas": 1, "max_replicas": 3}})
    del data["applications"][LLM]["deployments"]
    del data["applications"][EXPERTS]["deployments"][1]["user_config"]["scaling"]["routers"]
    del data["applications"][EXPERTS]["deployments"][1]["user_config"]["scaling"]["slo"]["time_to_first_token_ms"]
    mesh = MeshConfig.from_serve_config(data)
    assert mesh.router_scaling == {"Router": {"min_replicas": 1, "max_replicas": 3}}


@pytest.mark.parametrize("least", [0, 1])
def test_routers_may_go_to_zero(least: int) -> None:
    mesh = MeshConfig.from_serve_config(changed(*ROUTERS, "min_replicas", to=least))
    assert mesh.router_scaling["Router"]["min_replicas"] == least


IN_EXPERTS, IN_LLM = "config: applications[0]", "config: applications[1]"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (changed(*SHARDS, "policy", to=None), f"{IN_EXPERTS}.deployments[0].autoscaling_config.policy is missing"),
        (changed(*SHARDS, "policy", to=3), f"{IN_EXPERTS}.deployments[0].autoscaling_config.policy is missing"),
        (
            changed(*SHARDS, "policy", "policy_function", to=ROUTER_POLICY),
            f"{IN_EXPERTS}.deployments[0].autoscaling_config.policy.policy_function is {ROUTER_POLICY!r}, expected "
            f"{SHARD_POLICY!r} here",
        ),
        (
            changed(*ROUTERS, "policy", "policy_function", to=SHARD_POLICY),
            f"{IN_LLM}.deployments[0].autoscaling_config.policy.policy_function is {SHARD_POLICY!r}",
        ),
        (changed(*SHARDS, "min_replicas", to=5), "min_replicas is 5, initial_replicas 5, max_replicas 4"),
        (changed(*SHARDS, "initial_replicas", to=1), "min_replicas is 2, initial_replicas 1, max_replicas 4"),
        (changed(*SHARDS, "max_replicas", to=0), "max_replicas is 0, expected a number of shards of 1 or more"),
        (changed(*ROUTERS, "min_replicas", to=-1), "min_replicas is -1, expected a number of routers of 0 or more"),
        (
            changed(*LIVE, "scaling", "shards", "spare", to=4),
            "config: max_replicas of ExpertShard is 4, but scaling.shards.spare is 4: expected at least 5 shards",
        ),
        (
            changed(*LIVE, "placement", "min_replicas", to=5),
            "config: max_replicas of ExpertShard is 4, expected at least placement.min_replicas (5)",
        ),
        (changed(*LIVE, "scaling", "shards", "utilization", to=1.5), "scaling.shards.utilization: Input should be"),
        (changed(*LIVE, "scaling", "slo", "tpot", to=5), "user_config.scaling.slo.tpot: unknown key"),
        (
            changed(*SHARDS, to=None),
            "config: scaling.slo.time_per_output_token_ms is set, but no autoscaling_config names the policy "
            f"{SHARD_POLICY}",
        ),
        (
            changed(*ROUTERS, "policy", to=None),
            "config: scaling.slo.time_to_first_token_ms is set, but no autoscaling_config names the policy "
            f"{ROUTER_POLICY}",
        ),
        (changed(*ARGS, "count", to=2), "args.routers.count and autoscaling_config exclude each other: remove count"),
        (
            changed(*ARGS, "deployment_config", to={"autoscaling_config": {"max_replicas": 3}}),
            f"{IN_LLM}.deployments[0]: autoscaling_config is in args.routers.deployment_config, too",
        ),
        (
            changed(*ARGS, "engine_kwargs", to={"disable_log_stats": True}),
            f"{IN_LLM}.args.routers.engine_kwargs.disable_log_stats is true: remove it",
        ),
        (changed(*ROUTERS[:-2], to=[{"name": "Server"}]), f"{IN_LLM}.deployments[0].name is 'Server', expected Router"),
        (changed(*ROUTERS[:-2], to=[{"name": "Router"}] * 2), f"{IN_LLM}.deployments[1].name: Router is listed twice"),
        (changed(*ROUTERS[:-2], to=["Router"]), f"{IN_LLM}.deployments: expected a list of deployments"),
        (
            changed(*ROUTERS[:-1], "num_replicas", to=2),
            f"{IN_LLM}.deployments[0]: num_replicas and autoscaling_config exclude each other",
        ),
    ],
)
def test_a_contradiction_is_named_with_its_remedy(data: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MeshConfig.from_serve_config(data)
    assert expected in str(caught.value)
