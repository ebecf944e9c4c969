"""What a gateway knows of its models: their splits, their routers, and what it has counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.config.gateway.sections import GatewayLive, VersionsSection
from cluster.gateway.pool import RouterPool
from cluster.gateway.split import Split
from cluster.observability.gateway_series import VersionCounts


class Models:
    """The models by the names that clients send. `pool_of` makes the pool of an application's routers."""

    def __init__(self, pool_of: Callable[[str], RouterPool]) -> None:
        self._pool_of = pool_of
        self._pools: dict[str, RouterPool] = {}  # by application
        self._splits: dict[str, Split] = {}
        self.counts: dict[tuple[str, str], VersionCounts] = {}

    def configure(self, live: GatewayLive) -> None:
        """Take on other models, versions or weights. Requests that run are not touched."""
        old = self._splits
        self._splits = {
            name: old[name] if name in old and old[name].versions == versions else Split(versions)
            for name, versions in live.models.items()
        }
        apps = {version.app for versions in live.models.values() for version in versions.versions.values()}
        self._pools = {app: self._pools.get(app) or self._pool_of(app) for app in apps}

    @property
    def versions(self) -> Mapping[str, VersionsSection]:
        """The versions of each model."""
        return {name: split.versions for name, split in self._splits.items()}

    def name_of(self, asked: str) -> str | None:
        """The model that a client's `model` names: itself, or the one whose adapter it is (`MODEL:ADAPTER`)."""
        if asked in self._splits:
            return asked
        base = asked.rpartition(":")[0]
        return base if base in self._splits else None

    def split(self, model: str) -> Split:
        """The split of a model."""
        return self._splits[model]

    def pool(self, model: str, version: str) -> RouterPool:
        """The routers of a version."""
        return self._pools[self._splits[model].versions.versions[version].app]

    def count(self, model: str, version: str) -> VersionCounts:
        """What is counted for a version."""
        return self.counts.setdefault((model, version), VersionCounts())
