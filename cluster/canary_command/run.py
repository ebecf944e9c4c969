"""The actions: show, set, promote, rollback. Each change is deployed, and followed until every gateway has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.canary_command.change import models_of, versions_of, weights_of, with_models
from cluster.config.gateway.sections import GATEWAY, GatewayLive
from cluster.controller.client import ROUTER
from cluster.gateway.ray_joints import running_config
from cluster.ray_joints import broadcast, deploy_config, deployment_handle, replicas_of
from placement.command.ending import CommandError, tell

ASK_S, POLL_S = 5.0, 0.2


def show(app: str, as_json: bool) -> None:
    """Print the versions of each model, their share, and how many of their routers run."""
    live = models_of(running_config(), app)
    rows = {
        model: {name: _version(one.app, one.weight) for name, one in versions.versions.items()}
        for model, versions in live.models.items()
    }
    tell(as_json, {"models": rows}, _lines(live, rows))


async def change(
    app: str, model: str, changed: Callable[[GatewayLive], GatewayLive], timeout_s: float, as_json: bool
) -> None:
    """Deploy other weights, and return once every gateway that runs has them. CommandError if they do not get there."""
    config = running_config()
    before = models_of(config, app)
    after = changed(before)
    _refuse_without_routers(before, after, model)
    deploy_config(with_models(config, app, after))
    await _until_there(app, weights_of(after), timeout_s)
    was, now = weights_of(before)[model], weights_of(after)[model]
    versions = versions_of(after, model)
    told = [
        f"{model}: {_shares(was)} -> {_shares(now)}",
        "so that the next `serve deploy` keeps it, write in the file: "
        + ", ".join(f"{name}: {{app: {one.app}, weight: {one.weight}}}" for name, one in versions.versions.items()),
    ]
    tell(as_json, {"model": model, "weights": now, "before": was}, told)


async def _until_there(app: str, weights: dict[str, dict[str, int]], timeout_s: float) -> None:
    handle, end_s = deployment_handle(GATEWAY, app), time.monotonic() + timeout_s
    while True:
        try:
            told: list[Any] = await broadcast(handle, "shares", ASK_S)
        except Exception as error:
            told = [error]
        if told and all(each == weights for each in told):
            return
        if time.monotonic() > end_s:
            raise CommandError(
                f"the change is deployed, but not every gateway has it after {timeout_s:g} s; `serve status` says more"
            )
        time.sleep(POLL_S)


def _refuse_without_routers(before: GatewayLive, after: GatewayLive, model: str) -> None:
    """CommandError if a version would get more traffic than before and has no router."""
    old = versions_of(before, model).versions
    for name, version in versions_of(after, model).versions.items():
        counts = replicas_of(version.app, ROUTER) if version.weight > old[name].weight else None
        if counts is not None and counts.running == 0:
            raise CommandError(f"version {name!r}: no router of the application {version.app!r} runs")


def _version(app: str, weight: int) -> dict[str, Any]:
    counts = replicas_of(app, ROUTER)
    return {"app": app, "weight": weight, "routers": None if counts is None else counts.running}


def _lines(live: GatewayLive, rows: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    for model, versions in live.models.items():
        header = f" {versions.split_header}" if versions.split_header else ""
        yield f"{model} (split by {versions.split_by}{header}, stable: {versions.stable_version})"
        total = sum(one.weight for one in versions.versions.values())
        for name, row in rows[model].items():
            share = 100 * row["weight"] / total
            routers = "?" if row["routers"] is None else row["routers"]
            yield f"  {name}: {share:.4g} % (weight {row['weight']}), {routers} router(s) of {row['app']}"


def _shares(weights: dict[str, int]) -> str:
    return ", ".join(f"{name} {weight}" for name, weight in weights.items())
