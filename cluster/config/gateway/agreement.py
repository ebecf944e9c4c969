"""Contradictions between the applications of a file with a gateway, one line each.

`file` is the MeshConfig of `cluster/config/serve_file.py`, which asks for them, and which is not imported here again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cluster.config.replicas import ROUTER, wanted_pairs


def gateway_disagreements(file: Any) -> Iterator[str]:
    """Those of each model's applications, and those of the gateway with them. `file` is the first of `file.meshes`."""
    for each in file.meshes:
        yield from (f"{each.llm_name}: {line}" for line in each.own_disagreements(several=True))
    named = [
        *(each.experts_name for each in file.pools),
        *(each.llm_name for each in file.meshes),
        *{each.console_name for each in file.meshes if each.console is not None},
        file.gateway_name,
    ]
    yield from (f"two applications are named {name!r}" for name, count in Counter(named).items() if count > 1)
    yield from _prefixes(file)
    yield from _choices(file)
    yield from _pairs(file)
    yield from _versions(file)
    yield from _keys(file)


def _prefixes(file: Any) -> Iterator[str]:
    for each in file.meshes:
        if each.llm_route_prefix == file.gateway_route_prefix:
            yield (
                f"{each.llm_name}: route_prefix is {each.llm_route_prefix!r}, the gateway's: give the routers one of "
                f"their own, such as /models/{each.llm_name}"
            )


def _choices(file: Any) -> Iterator[str]:
    for each in file.meshes:
        if each.llm.routers.expert_signatures is not None:
            yield (
                f"{each.llm_name}: routers.expert_signatures is set, but the gateway itself chooses a model's router: "
                "remove it"
            )


def _pairs(file: Any) -> Iterator[str]:
    """Routers of several applications that have more pairs with a shard together than any of them alone."""
    for pool in file.pools:
        sharing = [each for each in file.meshes if each.experts_name == pool.experts_name]
        most = sum(wanted_pairs(each.llm, each.router_scaling)[0] for each in sharing)
        if len(sharing) > 1 and most > pool.experts.shards.max_pairs:
            yield (
                f"{pool.experts_name}: shards.max_pairs is {pool.experts.shards.max_pairs}, but the routers of "
                f"{', '.join(each.llm_name for each in sharing)} have up to {most} pairs with a shard together, twice "
                "as many during an upgrade: raise it"
            )


def _versions(file: Any) -> Iterator[str]:
    """The gateway's models against the applications of routers."""
    routers = {each.llm_name: each for each in file.meshes}
    reached = set()
    if not file.models.models:
        yield "the gateway has no models: list them in deployments: [{name: Gateway, user_config: {models: ...}}]"
    for model, versions in file.models.models.items():
        for name, version in versions.versions.items():
            where = f"models.{model}.versions.{name}"
            reached.add(version.app)
            if version.app not in routers:
                there = ", ".join(routers)
                yield f"{where}.app is {version.app!r}, expected an application of routers: {there}"
                continue
            served = routers[version.app].llm.model.id
            if served != model:
                yield f"{where}: {version.app} has model.id {served!r}, but clients name {model!r}: make them equal"
            scaling = routers[version.app].router_scaling.get(ROUTER, {})
            if scaling.get("min_replicas") == 0:
                yield (
                    f"{where}: min_replicas of {version.app} is 0, but requests of the gateway go straight to routers "
                    "and would wake none: have at least 1"
                )
    for name in routers:
        if file.models.models and name not in reached:
            yield f"no model of the gateway has a version with app: {name}"


def _keys(file: Any) -> Iterator[str]:
    asking = [each.llm_name for each in file.meshes if each.llm.http.asks_for_keys]
    yield from _ledgers(file)
    if file.gateway is None or file.gateway.http.asks_for_keys:
        return
    if asking:
        yield f"{asking[0]} has API keys and the gateway has none: set the same in its http"
    for model, versions in file.models.models.items():
        if versions.split_by == "key":
            yield f"models.{model}.split_by is key, but the gateway has no API keys: set them in its http"


def _ledgers(file: Any) -> Iterator[str]:
    """A key has one limit for all models, so all routers count with the gateway's ledger."""
    counting = [each for each in file.meshes if each.llm.http.names_keys]
    for each in counting:
        named = each.llm.http.ledger_app
        if named != file.gateway_name:
            yield (
                f"{each.llm_name}: http.ledger_app is {named!r}, expected {file.gateway_name!r}: a key has one limit "
                "for all models behind the gateway, whose application counts what it uses"
            )
    if counting and file.gateway.http.asks_for_keys and not file.gateway.http.names_keys:
        yield (
            f"{counting[0].llm_name} has keys with names and the gateway has none, so nothing would count what they "
            "use: name the same keys_file or keys_env in its http"
        )
