"""Changes of a running service by `serve deploy`, and waiting until they are done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.serve.service import Service


def deploy(service: Service, change: Callable[[dict[str, dict[str, Any]]], None]) -> None:
    """`serve deploy` of the service's config with a change to `deployments` of experts, by name."""
    change({each["name"]: each for each in service.config["applications"][0]["deployments"]})
    service.run("serve", "deploy", str(service.write_config("live.yaml")), "--address", service.dashboard)


def still(service: Service, num_shards: int) -> dict[str, Any] | None:
    """The controller's status once so many shards serve, nothing moves, and routers are at that epoch."""
    status = service.status()
    controller = status["controller"]
    if not controller or controller["migration"]["moving"] or controller["missing_ranks"]:
        return None
    states = [shard["state"] for shard in controller["shards"]]
    at_epoch = all(router["epoch"] == controller["epoch"] for router in status["routers"])
    return controller if states == ["serving"] * num_shards and at_epoch else None
