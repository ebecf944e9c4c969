"""`num_replicas` and `autoscaling_config` of shards and routers: bounds, policy, and what they contradict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cluster.config.apps import LLMAppConfig
from cluster.config.live_sections import LiveConfig
from cluster.config.llm_sections import RoutersSection
from cluster.config.parse import ConfigError
from experts.kv_transfer.engine_options import Pool

ROUTER, PREFILL_ROUTER = "Router", "PrefillRouter"
_POOL_OF: dict[str, Pool] = {PREFILL_ROUTER: "prefill", ROUTER: "decode"}
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


def router_scaling(llm: dict[str, Any], config: LLMAppConfig, where: str) -> dict[str, dict[str, Any]]:
    """autoscaling_config of each deployment of routers that has one, from `deployments` of the application `llm` or
    from its arguments.

    Raises ConfigError that starts with `where`, the application's place.
    """
    deployments = llm.get("deployments", [])
    if not isinstance(deployments, list) or not all(isinstance(each, dict) for each in deployments):
        raise ConfigError(f"{where}.deployments: expected a list of deployments, each with a name")
    pools = {name: f"pools.{pool}" for name, pool in _POOL_OF.items()}
    places = {ROUTER: "routers"} if config.pools is None else pools
    entries: dict[str, tuple[str, dict[str, Any]]] = {}
    for index, each in enumerate(deployments):
        place, name = f"{where}.deployments[{index}]", each.get("name")
        if name not in places:
            raise ConfigError(f"{place}.name is {name!r}, expected {' or '.join(sorted(places, reverse=True))}")
        if name in entries:
            raise ConfigError(f"{place}.name: {name} is listed twice")
        entries[name] = (place, each)
    found = {}
    for name, section in places.items():
        routers = config.routers if config.pools is None else config.of_pool(_POOL_OF[name]).routers
        place, entry = entries.get(name, (f"{where}.args.{section}.deployment_config", {}))
        scaling = _scaling_of(entry, routers, place, f"args.{section}", where)
        if scaling is not None:
            found[name] = scaling
    return found


def _scaling_of(
    entry: dict[str, Any], routers: RoutersSection, place: str, section: str, where: str
) -> dict[str, Any] | None:
    """Of one deployment: `entry` stands at `place` in the file, `section` has its arguments."""
    in_args = routers.deployment_config.get("autoscaling_config")
    found = entry.get("autoscaling_config", in_args)
    if found is None:
        return None
    if entry.get("num_replicas") not in (None, "auto"):
        raise ConfigError(f"{place}: num_replicas and autoscaling_config exclude each other: remove one")
    if in_args is not None and found is not in_args:
        raise ConfigError(f"{place}: autoscaling_config is in {section}.deployment_config, too: remove that one")
    if entry and routers.count is not None:
        raise ConfigError(f"{place}: {section}.count and autoscaling_config exclude each other: remove count")
    place = f"{place}.autoscaling_config"
    _checked_bounds(found, "routers", 0, place)
    own = _policy_of(found, ROUTER_POLICY, f"{place}.policy") == ROUTER_POLICY
    if own and routers.engine_kwargs.get("disable_log_stats"):
        raise ConfigError(
            f"{where}.{section}.engine_kwargs.disable_log_stats is true: remove it, or {ROUTER_POLICY} would see no "
            "load"
        )
    return dict(found)


def scaling_problems(
    live: LiveConfig, shards: Mapping[str, Any] | None, routers: Iterable[Mapping[str, Any]]
) -> Iterator[str]:
    """What the section `scaling` contradicts, one line each. `shards`, `routers`: autoscaling_config of each that has
    one."""
    scaling, slo = live.scaling, live.scaling.slo
    for settings, policy, section, key, value in (
        (
            [] if shards is None else [shards],
            SHARD_POLICY,
            "shards",
            "time_per_output_token_ms",
            slo.time_per_output_token_ms,
        ),
        (list(routers), ROUTER_POLICY, "routers", "time_to_first_token_ms", slo.time_to_first_token_ms),
    ):
        if all(_policy_of(each, policy, "") != policy for each in settings):
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


def wanted_pairs(llm: LLMAppConfig, scaling: dict[str, dict[str, Any]]) -> tuple[int, list[str]]:
    """(most pairs that the routers of an application have with one shard, where they come from, in words).

    `scaling` as `router_scaling` gives it. Routers whose number only Serve knows are left out.
    """
    pairs, told = 0, []
    for each in llm.each_pool:
        routers = each.routers
        most = scaling.get(PREFILL_ROUTER if each.pool == "prefill" else ROUTER, {}).get("max_replicas")
        count = most or routers.count or routers.deployment_config.get("num_replicas") or 1
        if isinstance(count, int):
            pairs += count * routers.workers
            told.append(f"{count} routers of {routers.workers} worker(s)")
    return pairs, told
