"""Other weights for a model's versions, in the Serve config that is deployed. Pure functions of that config."""

from __future__ import annotations

import copy
from typing import Any

from cluster.config.gateway.sections import GATEWAY, GatewayLive, VersionsSection
from cluster.config.parse import parse
from placement.command.ending import CommandError, refusing

WHOLE = 100  # the weight of a version that has all the traffic


def models_of(config: dict[str, Any], app: str) -> GatewayLive:
    """The models of the gateway `app`. CommandError if there is no such gateway."""
    with refusing():
        return parse(GatewayLive, _deployment(config, app).get("user_config") or {}, f"{app}: user_config of {GATEWAY}")


def with_models(config: dict[str, Any], app: str, live: GatewayLive) -> dict[str, Any]:
    """A copy of the config in which the gateway `app` has these models."""
    config = copy.deepcopy(config)
    _deployment(config, app)["user_config"] = live.model_dump(exclude_unset=True)
    return config


def with_weights(live: GatewayLive, model: str, weights: dict[str, int]) -> GatewayLive:
    """Other weights for some versions of a model; those that are not named keep theirs. CommandError."""
    versions = versions_of(live, model)
    for name in weights:
        if name not in versions.versions:
            raise CommandError(f"{model} has no version {name!r}; there are {', '.join(versions.versions)}")
    with refusing():
        try:
            changed = versions.weighted(weights)
        except ValueError:
            raise CommandError(f"every weight of {model} would be 0: one version has to take the traffic") from None
    return live.model_copy(update={"models": {**live.models, model: changed}})


def with_all_for(live: GatewayLive, model: str, version: str | None) -> GatewayLive:
    """All the traffic of a model for one version; None: for the stable one. CommandError."""
    versions = versions_of(live, model)
    chosen = versions.stable_version if version is None else version
    return with_weights(live, model, {**dict.fromkeys(versions.versions, 0), chosen: WHOLE})


def versions_of(live: GatewayLive, model: str) -> VersionsSection:
    """The versions of a model. CommandError lists the models there are."""
    if model not in live.models:
        raise CommandError(f"the gateway has no model {model!r}; there are {', '.join(live.models) or 'none'}")
    return live.models[model]


def weights_of(live: GatewayLive) -> dict[str, dict[str, int]]:
    """Weights by model and version."""
    return {name: {v: one.weight for v, one in each.versions.items()} for name, each in live.models.items()}


def _deployment(config: dict[str, Any], app: str) -> dict[str, Any]:
    """The gateway's entry among `deployments`, made if it is not listed."""
    found = next((each for each in config["applications"] if each.get("name") == app), None)
    if found is None or not str(found.get("import_path", "")).endswith(":build_gateway"):
        raise CommandError(f"no gateway that was deployed from a config is named {app!r} (--app names another)")
    listed = found.setdefault("deployments", [])
    entry = next((each for each in listed if each["name"] == GATEWAY), None)
    if entry is None:
        entry = {"name": GATEWAY}
        listed.append(entry)
    return entry
