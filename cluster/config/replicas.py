"""`num_replicas` and `autoscaling_config` of shards and routers: bounds, policy, and what they contradict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.config.live_sections import LiveConfig
from cluster.config.llm_sections import RoutersSection
from cluster.config.parse import ConfigError

ROUTER = "Router"
SHARD_POLICY, ROUTER_POLICY = OURS = (
    "cluster.autoscaling.policies:shards",
    "cluster.autoscaling.policies:routers",
)


def shard_count(deployment: dict[str, Any], where: str) -> int:
    """How many shards Serve starts first, of the entry `ExpertShard`. Raises ConfigError that starts with `where`."""
    scaling, count = deployment.get("autoscaling_config"), deployment.get("num_replicas", 1)
    if scaling is None:
        return _at_least(1, count, "shards", f"{where}.num_replicas")
    if deployment.get("num_replicas") not in (None, "auto"):
        raise ConfigError(f"{where}: num_replicas and autoscaling_config exclude each other: remove one")
    place = f"{where}.autoscaling_config"
    first = _checked_bounds(scaling, "shards", 1, place)
    if _policy_of(scaling, SHARD_POLICY, f"{place}.policy") is None:
        raise ConfigError(
            f'{place}.policy is missing; write policy: {{policy_function: "{SHARD_POLICY}"}}: '
            "Serve's own counts requests through Serve, of which shards get none"
        )
    return first


def router_scaling(llm: dict[str, Any], routers: RoutersSection, where: str) -> dict[str, Any] | None:
    """autoscaling_config of the routers, from `deployments` of the application `llm` or from its arguments.

    Raises ConfigError that starts with `where`, the application's place.
    """
    in_args = routers.deployment_config.get("autoscaling_config")
    found, place = in_args, f"{where}.args.routers.deployment_config"
    deployments = llm.get("deployments", [])
    if not isinstance(deployments, list) or not all(isinstance(each, dict) for each in deployments):
        raise ConfigError(f"{where}.deployments: expected a list of deployments, each with a name")
    for index, each in enumerate(deployments):
        place = f"{where}.deployments[{index}]"
        if each.get("name") != ROUTER:
            raise ConfigError(f"{place}.name is {each.get('name')!r}, expected {ROUTER}")
        if index:
            raise ConfigError(f"{place}.name: {ROUTER} is listed twice")
        found = each.get("autoscaling_config", found)
        if found is not None and each.get("num_replicas") not in (None, "auto"):
            raise ConfigError(f"{place}: num_replicas and autoscaling_config exclude each other: remove one")
        if in_args is not None and found is not in_args:
            raise ConfigError(f"{place}: autoscaling_config is in args.routers.deployment_config, too: remove that one")
        if found is not None and routers.count is not None:
            raise ConfigError(f"{place}: args.routers.count and autoscaling_config exclude each other: remove count")
    if found is None:
        return None
    place = f"{place}.autoscaling_config"
    _checked_bounds(found, "routers", 0, place)
    own = _policy_of(found, ROUTER_POLICY, f"{place}.policy") == ROUTER_POLICY
    if own and routers.engine_kwargs.get("disable_log_stats"):
        raise ConfigError(
            f"{where}.args.routers.engine_kwargs.disable_log_stats is true: remove it, or {ROUTER_POLICY} would see no "
            "load"
        )
    return dict(found)


def scaling_problems(
    live: LiveConfig, shards: Mapping[str, Any] | None, routers: Mapping[str, Any] | None
) -> Iterator[str]:
    """What the section `scaling` contradicts, one line each. `shards`, `routers`: autoscaling_config, None without."""
    scaling, slo = live.scaling, live.scaling.slo
    for settings, policy, section, key, value in (
        (shards, SHARD_POLICY, "shards", "time_per_output_token_ms", slo.time_per_output_token_ms),
        (routers, ROUTER_POLICY, "routers", "time_to_first_token_ms", slo.time_to_first_token_ms),
    ):
        if settings is None or _policy_of(settings, policy, "") != policy:
            idle = [f"slo.{key}"] * (value is not None) + [section] * (section in scaling.model_fields_set)
            if idle:
                yield (
                    f"scaling.{idle[0]} is set, but no autoscaling_config names the policy {policy}: it would have no "
                    "effect"
                )
    if shards is not None:
        most, copies, spare = shards.get("max_replicas", 1), live.placement.min_replicas, scaling.shards.spare
        if most <= spare:
            yield (
                f"max_replicas of ExpertShard is {most}, but scaling.shards.spare is {spare}: expected at least "
                f"{spare + 1} shards, or a smaller spare"
            )
        elif most < copies:
            yield f"max_replicas of ExpertShard is {most}, expected at least placement.min_replicas ({copies})"


def _checked_bounds(scaling: Any, what: str, least: int, where: str) -> int:
    """The first number of replicas."""
    if not isinstance(scaling, dict):
        raise ConfigError(f"{where} is {scaling!r}, expected a mapping")
    bounds = {
        key: _at_least(floor, scaling[key], what, f"{where}.{key}")
        for key, floor in (("min_replicas", least), ("initial_replicas", least), ("max_replicas", 1))
        if scaling.get(key) is not None
    }
    low, high = bounds.get("min_replicas", 1), bounds.get("max_replicas", 1)
    first = bounds.get("initial_replicas", low)
    if not low <= first <= high:
        raise ConfigError(
            f"{where}: min_replicas is {low}, initial_replicas {first}, max_replicas {high}: expected them to ascend"
        )
    return first


def _policy_of(scaling: Mapping[str, Any], own: str, where: str) -> str | None:
    """The policy's function. ConfigError if it is the project's for other replicas."""
    policy = scaling.get("policy")
    function = policy.get("policy_function") if isinstance(policy, dict) else None
    if function in OURS and function != own:
        raise ConfigError(f"{where}.policy_function is {function!r}, expected {own!r} here")
    return function


def _at_least(least: int, count: Any, what: str, where: str) -> int:
    if type(count) is not int or count < least:
        raise ConfigError(f"{where} is {count!r}, expected a number of {what} of {least} or more")
    return count
