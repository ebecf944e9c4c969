"""One YAML file with the Serve applications: reading it, and checking them against each other.

The file is a Serve config, so `serve run` and `serve deploy` take it as it is. The arguments of its applications
are the sections of `cluster.config.apps`; their builders are in `serve_app`:

    applications:
      - name: experts
        import_path: serve_app:build_experts
        args: {model: &model {...}, shards: ...}
        deployments: [{name: ExpertShard, num_replicas: 3}, {name: PlacementController, user_config: ...}]
      - {name: llm, import_path: "serve_app:build_llm", args: {model: *model, routers: ...}}
      - {name: console, import_path: "serve_app:build_console"}  # may be left out
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field

from cluster.config.apps import ConsoleAppConfig, ExpertsAppConfig, LLMAppConfig
from cluster.config.deployments import DeploymentOverrides
from cluster.config.devices import device_disagreements
from cluster.config.live_sections import LiveConfig
from cluster.config.model_section import ModelSection
from cluster.config.parse import ConfigError, MissingPath, parse, portable
from cluster.config.replicas import PREFILL_ROUTER, ROUTER, router_scaling, scaling_problems
from experts.protocol.settings import StrictModel

EXPERTS_BUILDER = "serve_app:build_experts"
LLM_BUILDER = "serve_app:build_llm"
CONSOLE_BUILDER = "serve_app:build_console"
UNNAMED = "default"  # what Serve calls an application without a name


class MeshConfig(StrictModel):
    """The applications of one file, checked against each other."""

    experts: ExpertsAppConfig = Field(description="Arguments of the application that holds the shards.")
    live: LiveConfig = Field(default=LiveConfig(), description="What a running controller takes on.")
    num_shards: int = Field(default=1, description="Shards that Serve starts.")
    shard_scaling: dict[str, Any] | None = Field(default=None, description="autoscaling_config of the shards.")
    llm: LLMAppConfig = Field(description="Arguments of the application that holds the routers.")
    router_scaling: dict[str, dict[str, Any]] = Field(
        default={}, description="autoscaling_config of the deployments of routers that have one, by name."
    )
    console: ConsoleAppConfig | None = Field(default=None, description="Arguments of the console, if there is one.")
    experts_name: str = Field(default="experts", description="Name of the application that holds the shards.")
    llm_name: str = Field(default="llm", description="Name of the application that holds the routers.")
    llm_route_prefix: str = Field(default="/", description="Route prefix of the OpenAI API.")
    console_name: str = Field(default="console", description="Name of the application for people.")
    console_route_prefix: str = Field(default="/expertmesh", description="Route prefix of the console.")
    serve: dict[str, Any] = Field(
        description="The whole Serve config. Paths that were relative to the file's folder are absolute."
    )

    @classmethod
    def from_file(cls, path: str | Path) -> MeshConfig:
        """Read and check a file. Raises ConfigError with the file, the place, the value and what was expected."""
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {error}") from None
        return cls.from_serve_config(data, source=str(path), folder=path.resolve().parent)

    @classmethod
    def from_serve_config(cls, data: Any, source: str = "config", folder: Path | None = None) -> MeshConfig:
        """Check a Serve config that was read already.

        Relative paths are looked up in `folder` first. Raises ConfigError that starts with `source`.
        """
        mesh = cls.assembled(data, source, folder)
        for problem in mesh.disagreements():
            raise ConfigError(f"{source}: {problem}")
        return mesh

    @classmethod
    def assembled(
        cls, data: Any, source: str, folder: Path | None, missing: list[MissingPath] | None = None
    ) -> MeshConfig:
        """The same, without checking the applications against each other. `missing`: as `parse` has it."""
        if not isinstance(data, dict) or not isinstance(data.get("applications"), list):
            raise ConfigError(f"{source}: expected a Serve config with a list of applications")
        serve = {**data, "applications": list(data["applications"])}

        def checked(index: int, schema: type[BaseModel]) -> Any:
            app = data["applications"][index]
            args = app.get("args", {})
            config = parse(schema, args, f"{source}: applications[{index}].args", folder, missing)
            serve["applications"][index] = {**app, "args": portable(args, config)}
            return config

        applications = data["applications"]
        experts, llm = (_index_of(builder, applications, source) for builder in (EXPERTS_BUILDER, LLM_BUILDER))
        console = _find(CONSOLE_BUILDER, applications, source)
        checked_experts = checked(experts, ExpertsAppConfig)
        deployments = DeploymentOverrides.of(
            applications[experts].get("deployments", []),
            f"{source}: applications[{experts}].deployments",
            folder,
            missing,
        )
        if deployments.listed:
            serve["applications"][experts]["deployments"] = deployments.listed
        checked_llm: LLMAppConfig = checked(llm, LLMAppConfig)
        routers = router_scaling(applications[llm], checked_llm, f"{source}: applications[{llm}]")
        return cls(
            experts=checked_experts,
            live=deployments.live,
            num_shards=deployments.num_shards,
            shard_scaling=deployments.scaling,
            llm=checked_llm,
            router_scaling=routers,
            experts_name=applications[experts].get("name", UNNAMED),
            llm_name=applications[llm].get("name", UNNAMED),
            llm_route_prefix=applications[llm].get("route_prefix") or "/",
            serve=serve,
            **({} if console is None else _console(applications[console], checked(console, ConsoleAppConfig))),
        )

    @property
    def names(self) -> list[str]:
        """Names of the applications, each after those that it asks."""
        return [self.experts_name, self.llm_name, *([] if self.console is None else [self.console_name])]

    def disagreements(self) -> Iterator[str]:
        """Contradictions between the applications, one line each."""
        for name in ModelSection.model_fields:
            ours, theirs = getattr(self.experts.model, name), getattr(self.llm.model, name)
            if ours != theirs:
                yield f"model.{name} is {ours!r} for the shards and {theirs!r} for the routers"
        rows = max(each.transport.max_rows_per_dispatch for each in self.llm.each_pool)
        if rows > self.experts.shards.max_rows_per_dispatch:
            yield (
                f"transport.max_rows_per_dispatch is {rows}, more than shards.max_rows_per_dispatch accepts "
                f"({self.experts.shards.max_rows_per_dispatch})"
            )
        if self.llm.experts_app != self.experts_name:
            yield f"experts_app is {self.llm.experts_app!r}, but the application is named {self.experts_name!r}"
        if self.llm_name == self.experts_name:
            yield f"both applications are named {self.llm_name!r}"
        yield from self._console_disagreements()
        yield from scaling_problems(self.live, self.shard_scaling, self.router_scaling.values())
        if self.live.placement.prefer_local_replicas and not self.llm.transport.prefer_local_replicas:
            yield (
                "placement.prefer_local_replicas is true, but transport.prefer_local_replicas is not: the placement "
                "would be planned for routers that prefer local replicas"
            )
        ours, theirs = self.experts.mesh.tls is not None, self.llm.transport.tls is not None
        if ours != theirs:
            missing, there = ("transport.tls", "mesh.tls") if ours else ("mesh.tls", "transport.tls")
            yield f"{there} is set and {missing} is not: set both or neither"
        most_shards = (self.shard_scaling or {}).get("max_replicas") or self.num_shards
        found = (
            line
            for each in self.llm.each_pool
            for line in device_disagreements(self.experts.shards, each.routers, each.transport, most_shards)
        )
        yield from dict.fromkeys(found)
        yield from self._too_many_pairs()

    def _too_many_pairs(self) -> Iterator[str]:
        most, pairs, told = self.experts.shards.max_pairs, 0, []
        for each in self.llm.each_pool:
            routers = each.routers
            scaling = self.router_scaling.get(PREFILL_ROUTER if each.pool == "prefill" else ROUTER, {})
            count = scaling.get("max_replicas") or routers.count or routers.deployment_config.get("num_replicas")
            if isinstance(count, int):
                pairs += count * routers.workers
                told.append(f"{count} routers of {routers.workers} worker(s)")
        if pairs > most:
            yield (
                f"shards.max_pairs is {most}, but up to {' and '.join(told)} have {pairs} pairs with a shard, twice as "
                "many during an upgrade: raise it"
            )

    def _console_disagreements(self) -> Iterator[str]:
        if self.console is None:
            return
        if self.console.experts_app != self.experts_name:
            yield (
                f"the console's experts_app is {self.console.experts_app!r}, but the application is named "
                f"{self.experts_name!r}"
            )
        if self.llm_name not in self.console.llm_apps:
            yield f"the console's llm_apps are {self.console.llm_apps}, expected {self.llm_name!r} among them"
        if self.console_name in (self.experts_name, self.llm_name):
            yield f"two applications are named {self.console_name!r}"
        if self.console_route_prefix == self.llm_route_prefix:
            yield f"the console and the OpenAI API have the same route prefix {self.llm_route_prefix!r}"
        if self.llm.http.asks_for_keys and not self.console.http.asks_for_keys:
            yield "the OpenAI API has API keys and the console has none, so anyone could read the status: set its http"


def _index_of(builder: str, applications: list[Any], source: str) -> int:
    """The position of the one application with import_path `builder`. Raises ConfigError."""
    found = _find(builder, applications, source)
    if found is None:
        raise ConfigError(f"{source}: no application has import_path {builder}")
    return found


def _find(builder: str, applications: list[Any], source: str) -> int | None:
    """The same for an application that may be left out."""
    found = [
        index for index, app in enumerate(applications) if isinstance(app, dict) and app.get("import_path") == builder
    ]
    if len(found) > 1:
        raise ConfigError(f"{source}: applications[{found[1]}]: a second application has import_path {builder}")
    return found[0] if found else None


def _console(app: dict[str, Any], config: ConsoleAppConfig) -> dict[str, Any]:
    """The fields of MeshConfig about the console."""
    return {
        "console": config,
        "console_name": app.get("name", UNNAMED),
        "console_route_prefix": app.get("route_prefix") or "/",
    }
