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

With an application `gateway` (`serve_app:build_gateway`) there may be several of each of the others: one `llm` for each
model or version, which names the application with its experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field

from cluster.config.apps import ConsoleAppConfig, ExpertsAppConfig, LLMAppConfig
from cluster.config.deployments import DeploymentOverrides
from cluster.config.devices import device_disagreements
from cluster.config.gateway.agreement import gateway_disagreements
from cluster.config.gateway.sections import GATEWAY, GatewayAppConfig, GatewayLive
from cluster.config.http_sections import ledger_disagreements
from cluster.config.live_sections import LiveConfig
from cluster.config.model_section import ModelSection
from cluster.config.parse import ConfigError, MissingPath, parse, portable
from cluster.config.replicas import router_scaling, scaling_problems, wanted_pairs
from experts.protocol.settings import StrictModel

EXPERTS_BUILDER = "serve_app:build_experts"
LLM_BUILDER = "serve_app:build_llm"
CONSOLE_BUILDER = "serve_app:build_console"
GATEWAY_BUILDER = "serve_app:build_gateway"
UNNAMED = "default"  # what Serve calls an application without a name


class MeshConfig(StrictModel):
    """The applications of one file, checked against each other: one pool of experts and its routers.

    A file with a gateway has several of these: the first holds the gateway and the others.
    """

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
    others: list[MeshConfig] = Field(default=[], description="With a gateway: the other routers and their experts.")
    gateway: GatewayAppConfig | None = Field(default=None, description="Arguments of the gateway, if there is one.")
    models: GatewayLive = Field(default=GatewayLive(), description="The gateway's models.")
    gateway_name: str = Field(default="gateway", description="Name of the application that is the gateway.")
    gateway_route_prefix: str = Field(default="/", description="Route prefix of the gateway.")
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
        applications = data["applications"]
        read = _Applications(data, source, folder, missing)
        gateway = _find(GATEWAY_BUILDER, applications, source)
        if gateway is None:
            experts, llm = (_index_of(builder, applications, source) for builder in (EXPERTS_BUILDER, LLM_BUILDER))
            return cls(**read.pair(experts, llm, _find(CONSOLE_BUILDER, applications, source)))
        first, *others = read.pairs()
        return cls(**first, **read.gateway(gateway), others=[cls(**each) for each in others])

    @property
    def names(self) -> list[str]:
        """Names of the applications, each after those that it asks."""
        meshes = self.meshes
        names = [*(each.experts_name for each in meshes), *(each.llm_name for each in meshes)]
        names += [each.console_name for each in meshes if each.console is not None]
        return list(dict.fromkeys([*names, *([] if self.gateway is None else [self.gateway_name])]))

    @property
    def meshes(self) -> list[MeshConfig]:
        """This one and the others: one for each application of routers."""
        return [self, *self.others]

    @property
    def pools(self) -> list[MeshConfig]:
        """The first of those that share their experts, for each application of shards."""
        return list({each.experts_name: each for each in reversed(self.meshes)}.values())[::-1]

    @property
    def api_route_prefix(self) -> str:
        """Where the OpenAI API is for clients."""
        return self.llm_route_prefix if self.gateway is None else self.gateway_route_prefix

    def disagreements(self) -> Iterator[str]:
        """Contradictions between the applications, one line each."""
        if self.gateway is None:
            yield from self.own_disagreements()
        else:
            yield from gateway_disagreements(self)

    def own_disagreements(self, several: bool = False) -> Iterator[str]:
        """Those between these experts and these routers. `several`: routers of other models may share the experts."""
        for name in ModelSection.model_fields:
            if several and name == "id":  # clients of the gateway may know the same experts by several names
                continue
            ours, theirs = getattr(self.experts.model, name), getattr(self.llm.model, name)
            if ours != theirs:
                yield f"model.{name} is {ours!r} for the shards and {theirs!r} for the routers"
        rows = max(each.transport.max_rows_per_dispatch for each in self.llm.each_pool)
        if rows > self.experts.shards.max_rows_per_dispatch:
            yield (
                f"transport.max_rows_per_dispatch is {rows}, more than shards.max_rows_per_dispatch accepts "
                f"({self.experts.shards.max_rows_per_dispatch})"
            )
        yield from ledger_disagreements(self.llm.http, None if self.console is None else self.console.http, several)
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
        most, (pairs, told) = self.experts.shards.max_pairs, wanted_pairs(self.llm, self.router_scaling)
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


@dataclass
class _Applications:
    """Reads the applications of one file into the fields of MeshConfig. `serve` becomes what Serve gets."""

    data: dict[str, Any]
    source: str
    folder: Path | None
    missing: list[MissingPath] | None
    serve: dict[str, Any] = field(init=False)
    _checked: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.serve = {**self.data, "applications": list(self.data["applications"])}

    def pair(self, experts: int, llm: int, console: int | None) -> dict[str, Any]:
        """What is said of the shards and the routers at these positions, and of the console."""
        checked_experts = self._args(experts, ExpertsAppConfig)
        checked_llm: LLMAppConfig = self._args(llm, LLMAppConfig)
        live = self._deployments(experts)
        return {
            "experts": checked_experts,
            "live": live.live,
            "num_shards": live.num_shards,
            "shard_scaling": live.scaling,
            "llm": checked_llm,
            "router_scaling": router_scaling(
                self.data["applications"][llm], checked_llm, f"{self.source}: applications[{llm}]"
            ),
            "experts_name": self._name(experts),
            "llm_name": self._name(llm),
            "llm_route_prefix": self._prefix(llm),
            "serve": self.serve,
            **({} if console is None else self._console(console)),
        }

    def pairs(self) -> list[dict[str, Any]]:
        """For each application of routers, what is said of it and of its shards. Raises ConfigError without any."""
        pools = {self._name(index): index for index in self._all(EXPERTS_BUILDER)}
        consoles: dict[str, int] = {}
        for index in self._all(CONSOLE_BUILDER):
            named = self._args(index, ConsoleAppConfig).experts_app
            if named not in pools:
                self._no_such_pool(index, named, pools)
            consoles.setdefault(named, index)
        found = []
        for index in self._all(LLM_BUILDER):
            named = self._args(index, LLMAppConfig).experts_app
            if named not in pools:
                self._no_such_pool(index, named, pools)
            found.append(self.pair(pools[named], index, consoles.get(named)))
        if not found:
            raise ConfigError(f"{self.source}: no application has import_path {LLM_BUILDER}")
        return found

    def gateway(self, index: int) -> dict[str, Any]:
        """What is said of the gateway."""
        app, live = self.data["applications"][index], GatewayLive()
        where = f"{self.source}: applications[{index}].deployments"
        listed = app.get("deployments", [])
        if not isinstance(listed, list) or any(not isinstance(e, dict) or e.get("name") != GATEWAY for e in listed):
            raise ConfigError(f"{where}: expected a list with one deployment, whose name is {GATEWAY}")
        for number, each in enumerate(listed):
            live = parse(GatewayLive, each.get("user_config") or {}, f"{where}[{number}].user_config")
        return {
            "gateway": self._args(index, GatewayAppConfig),
            "models": live,
            "gateway_name": self._name(index),
            "gateway_route_prefix": self._prefix(index),
        }

    def _args(self, index: int, schema: type[BaseModel]) -> Any:
        if index not in self._checked:
            app = self.data["applications"][index]
            args = app.get("args", {})
            where = f"{self.source}: applications[{index}].args"
            config = parse(schema, args, where, self.folder, self.missing)
            self.serve["applications"][index] = {**app, "args": portable(args, config)}
            self._checked[index] = config
        return self._checked[index]

    def _deployments(self, index: int) -> DeploymentOverrides:
        listed = self.data["applications"][index].get("deployments", [])
        where = f"{self.source}: applications[{index}].deployments"
        deployments = DeploymentOverrides.of(listed, where, self.folder, self.missing)
        if deployments.listed:
            self.serve["applications"][index]["deployments"] = deployments.listed
        return deployments

    def _console(self, index: int) -> dict[str, Any]:
        return {
            "console": self._args(index, ConsoleAppConfig),
            "console_name": self._name(index),
            "console_route_prefix": self._prefix(index),
        }

    def _no_such_pool(self, index: int, named: str, pools: dict[str, int]) -> None:
        there = ", ".join(pools) or "none"
        raise ConfigError(
            f"{self.source}: applications[{index}].args.experts_app is {named!r}, expected an application of shards: "
            f"{there}"
        )

    def _all(self, builder: str) -> list[int]:
        return _positions(builder, self.data["applications"])

    def _name(self, index: int) -> str:
        return str(self.data["applications"][index].get("name", UNNAMED))

    def _prefix(self, index: int) -> str:
        return self.data["applications"][index].get("route_prefix") or "/"


def _index_of(builder: str, applications: list[Any], source: str) -> int:
    """The position of the one application with import_path `builder`. Raises ConfigError."""
    found = _find(builder, applications, source)
    if found is None:
        raise ConfigError(f"{source}: no application has import_path {builder}")
    return found


def _find(builder: str, applications: list[Any], source: str) -> int | None:
    """The same for an application that may be left out."""
    found = _positions(builder, applications)
    if len(found) > 1:
        hint = "" if builder == GATEWAY_BUILDER else f"; several need a gateway ({GATEWAY_BUILDER})"
        raise ConfigError(f"{source}: applications[{found[1]}]: a second application has import_path {builder}{hint}")
    return found[0] if found else None


def _positions(builder: str, applications: list[Any]) -> list[int]:
    return [
        each for each, app in enumerate(applications) if isinstance(app, dict) and app.get("import_path") == builder
    ]
