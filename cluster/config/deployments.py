"""`deployments` of the application `experts`: what of it Serve changes while the replicas run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config.live_sections import LiveConfig
from cluster.config.parse import ConfigError, MissingPath, parse, portable
from cluster.config.replicas import shard_count

CONTROLLER = "PlacementController"
SHARD = "ExpertShard"
# What the project reads of each deployment; Serve checks the rest.
NAMES = (SHARD, CONTROLLER)


@dataclass(frozen=True)
class DeploymentOverrides:
    """The checked list. `listed` is what Serve gets, with the paths in it absolute."""

    num_shards: int = 1
    live: LiveConfig = field(default_factory=LiveConfig)
    listed: list[dict[str, Any]] = field(default_factory=list)
    scaling: dict[str, Any] | None = None  # autoscaling_config of the shards

    @classmethod
    def of(
        cls, data: Any, where: str, folder: Path | None, missing: list[MissingPath] | None = None
    ) -> DeploymentOverrides:
        """Check a list of deployments. Raises ConfigError that starts with `where`. `missing`: as `parse` has it."""
        if not isinstance(data, list) or not all(isinstance(each, dict) for each in data):
            raise ConfigError(f"{where}: expected a list of deployments, each with a name")
        num_shards, live, scaling = 1, LiveConfig(), None
        listed: list[dict[str, Any]] = []
        for index, each in enumerate(data):
            place = f"{where}[{index}]"
            name = each.get("name")
            if name not in NAMES:
                raise ConfigError(f"{place}.name is {name!r}, expected one of {', '.join(NAMES)}")
            if name in [other["name"] for other in listed]:
                raise ConfigError(f"{place}.name: {name} is listed twice")
            if name == SHARD:
                if each.get("user_config") is not None:
                    raise ConfigError(f"{place}.user_config: a shard has none; the sections belong to {CONTROLLER}")
                num_shards, scaling = shard_count(each, place), each.get("autoscaling_config")
            elif "num_replicas" in each or "autoscaling_config" in each:
                raise ConfigError(f"{place}: there is one {CONTROLLER}: remove num_replicas and autoscaling_config")
            elif each.get("user_config") is not None:
                live = parse(LiveConfig, each["user_config"], f"{place}.user_config", folder, missing)
                each = {**each, "user_config": portable(each["user_config"], live)}
            listed.append(each)
        return cls(num_shards, live, listed, scaling)
