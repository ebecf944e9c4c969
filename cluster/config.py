"""One YAML file, two Serve applications: reading it, checking it, saying what is wrong and where.

The file is a Serve config, so that `serve run` and `serve deploy` take it as it is. Its two applications hold the
sections of `cluster.sections` as the arguments of the builders in `serve_app`:

    applications:
      - {name: experts, import_path: "serve_app:build_experts", args: {model: &model {...}, shards: ...}}
      - {name: llm, import_path: "serve_app:build_llm", args: {model: *model, routers: ...}}
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from cluster.sections import (
    DeadlinesSection,
    HttpSection,
    MembershipSection,
    ModelSection,
    PlacementSection,
    RoutersSection,
    ShardsSection,
    TransportSection,
)
from experts.engine_kwargs import router_engine_kwargs
from experts.settings import RouterSettings, ShardSettings, StrictModel

PROJECT_FOLDER = Path(__file__).resolve().parent.parent
EXPERTS_BUILDER = "serve_app:build_experts"
LLM_BUILDER = "serve_app:build_llm"
UNNAMED = "default"  # what Serve calls an application that has no name

M = TypeVar("M", bound=BaseModel)


class ConfigError(ValueError):
    """A config that cannot be served; the message names the place in the YAML file, the value and what was expected."""


class ExpertsAppConfig(StrictModel):
    """Arguments of `serve_app:build_experts`: the shards and their controller."""

    model: ModelSection = Field(description="Which model; the same in both applications.")
    shards: ShardsSection = Field(description="The expert shards.")
    placement: PlacementSection = Field(default=PlacementSection(), description="Which expert stands where.")
    membership: MembershipSection = Field(default=MembershipSection(), description="How shards are followed.")

    def shard_settings(self, bind_host: str) -> ShardSettings:
        """What one shard of this application is told; `bind_host` is the address that routers reach it at."""
        return ShardSettings(
            model_path=self.model.path,
            dtype=self.model.dtype,
            device=self.shards.device,
            kernel=self.shards.kernel,
            num_threads=self.shards.num_threads,
            bind_host=bind_host,
            max_rows_per_dispatch=self.shards.max_rows_per_dispatch,
            slots_per_rank=self.shards.slots_per_rank,
            spin_us=self.shards.spin_us,
            connect_deadline_s=self.shards.connect_s,
        )


class LLMAppConfig(StrictModel):
    """Arguments of `serve_app:build_llm`: the routers and the HTTP side."""

    model: ModelSection = Field(description="Which model; the same in both applications.")
    routers: RoutersSection = Field(default=RoutersSection(), description="The vLLM engines.")
    transport: TransportSection = Field(default=TransportSection(), description="How rows travel.")
    deadlines: DeadlinesSection = Field(default=DeadlinesSection(), description="Bounds on waits.")
    http: HttpSection = Field(default=HttpSection(), description="API keys, queue limit, health.")
    experts_app: str = Field(
        default="experts", min_length=1, description="Name of the application that holds the shards."
    )

    def router_settings(self) -> RouterSettings:
        """What one router's vLLM worker is told."""
        return RouterSettings(
            model_path=self.model.path,
            transport=self.transport.name,
            dispatch_deadline_ms=self.deadlines.dispatch_ms,
            connect_deadline_s=self.deadlines.connect_s,
            max_rows_per_dispatch=self.transport.max_rows_per_dispatch,
            spin_us=self.transport.spin_us,
            near_replicas_first=self.transport.near_replicas_first,
            trace_tokens=self.routers.trace_tokens,
            fallback_cache_bytes=self.routers.fallback_cache_bytes,
            membership_by_rpc=True,
        )

    def engine_kwargs(self) -> dict[str, Any]:
        """The user's engine options with the project's own: dtype, worker extension, settings."""
        device = "cuda" if self.routers.accelerator == "gpu" else "cpu"
        return router_engine_kwargs(
            self.router_settings(), {**self.routers.engine_kwargs, "dtype": self.model.dtype}, device
        )


class MeshConfig(StrictModel):
    """Both applications of one file, checked against each other."""

    experts: ExpertsAppConfig = Field(description="Arguments of the application of shards.")
    llm: LLMAppConfig = Field(description="Arguments of the application of routers.")
    experts_name: str = Field(default="experts", description="Name of the application of shards.")
    llm_name: str = Field(default="llm", description="Name of the application of routers.")
    llm_route_prefix: str = Field(default="/", description="Route prefix of the OpenAI API.")
    serve: dict[str, Any] = Field(
        description="The whole Serve config, with paths absolute that need the file's folder."
    )

    @classmethod
    def from_file(cls, path: str | Path) -> MeshConfig:
        """Read and check a file. Raises ConfigError naming file, place, value and what was expected."""
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
        """Check a Serve config that was read already; `folder` is where relative paths are looked up first."""
        if not isinstance(data, dict) or not isinstance(data.get("applications"), list):
            raise ConfigError(f"{source}: expected a Serve config with a list of applications")
        found: dict[str, tuple[int, dict[str, Any]]] = {}
        for index, app in enumerate(data["applications"]):
            import_path = app.get("import_path") if isinstance(app, dict) else None
            if import_path in (EXPERTS_BUILDER, LLM_BUILDER):
                if import_path in found:
                    raise ConfigError(f"{source}: applications[{index}]: a second application of {import_path}")
                found[import_path] = (index, app)
        for builder in (EXPERTS_BUILDER, LLM_BUILDER):
            if builder not in found:
                raise ConfigError(f"{source}: no application has import_path {builder}")
        apps: dict[str, Any] = {}
        serve = {**data, "applications": list(data["applications"])}
        for builder, schema in ((EXPERTS_BUILDER, ExpertsAppConfig), (LLM_BUILDER, LLMAppConfig)):
            index, app = found[builder]
            config = parse(schema, app.get("args", {}), f"{source}: applications[{index}].args", folder)
            serve["applications"][index] = {**app, "args": _portable(app.get("args", {}), config)}
            apps[builder] = config
        (_, experts_app), (_, llm_app) = found[EXPERTS_BUILDER], found[LLM_BUILDER]
        mesh = cls(
            experts=apps[EXPERTS_BUILDER],
            llm=apps[LLM_BUILDER],
            experts_name=experts_app.get("name", UNNAMED),
            llm_name=llm_app.get("name", UNNAMED),
            llm_route_prefix=llm_app.get("route_prefix") or "/",
            serve=serve,
        )
        for problem in mesh.disagreements():
            raise ConfigError(f"{source}: {problem}")
        return mesh

    def disagreements(self) -> Iterable[str]:
        """What the two applications say differently and must not."""
        for name in ModelSection.model_fields:
            ours, theirs = getattr(self.experts.model, name), getattr(self.llm.model, name)
            if ours != theirs:
                yield f"model.{name} is {ours!r} for the shards and {theirs!r} for the routers"
        if self.llm.transport.max_rows_per_dispatch > self.experts.shards.max_rows_per_dispatch:
            yield (
                f"transport.max_rows_per_dispatch is {self.llm.transport.max_rows_per_dispatch}, more than "
                f"shards.max_rows_per_dispatch accepts ({self.experts.shards.max_rows_per_dispatch})"
            )
        if self.llm.experts_app != self.experts_name:
            yield f"experts_app is {self.llm.experts_app!r}, the application of shards is named {self.experts_name!r}"
        if self.llm_name == self.experts_name:
            yield f"both applications are named {self.llm_name!r}"
        if self.experts.placement.near_replicas_first and not self.llm.transport.near_replicas_first:
            yield (
                "placement.near_replicas_first is true, so the plan is for routers that take near replicas first, and "
                "transport.near_replicas_first is not"
            )
        if self.llm.transport.name == "nccl" and self.experts.shards.device != "cuda":
            yield f"transport.name is nccl and shards.device {self.experts.shards.device!r}, expected cuda"


def _portable(args: dict[str, Any], config: BaseModel) -> dict[str, Any]:
    """The arguments as they were written if they mean the same without the file's folder, else with absolute paths.

    Serve tells one version of an application from the next by its arguments: those of `serve deploy` come as written.
    """
    try:
        if parse(type(config), args) == config:
            return args
    except ConfigError:
        pass
    return config.model_dump(exclude_unset=True)


def parse(schema: type[M], data: Any, where: str = "args", folder: Path | None = None) -> M:
    """`data` as a config of class `schema`, paths in it absolute. Raises ConfigError whose lines start with `where`."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}")
    try:
        config = schema.model_validate(_with_absolute_paths(data, where, folder))
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, where))) from None
    return config


def _lines(error: ValidationError, where: str) -> Iterable[str]:
    for item in error.errors():
        place = where
        for part in item["loc"]:
            place += f"[{part}]" if isinstance(part, int) else f".{part}"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        elif item["type"] == "missing":
            message = "missing"
        elif item["type"] != "value_error":
            message = f"{message}, got {item['input']!r}"
        yield f"{place}: {message}"


def _with_absolute_paths(data: dict[str, Any], where: str, folder: Path | None) -> dict[str, Any]:
    """A copy in which model.path, placement.file and placement.trace are absolute paths of things that exist."""
    data = dict(data)
    for section, keys in (("model", ("path",)), ("placement", ("file", "trace"))):
        if not isinstance(data.get(section), dict):
            continue
        data[section] = dict(data[section])
        for key in keys:
            value = data[section].get(key)
            if isinstance(value, str) and value:
                data[section][key] = str(_find(value, f"{where}.{section}.{key}", folder))
    return data


def _find(value: str, where: str, folder: Path | None) -> Path:
    path = Path(value).expanduser()
    if path.is_absolute():
        candidates = [path]
    else:
        folders = [folder, Path.cwd(), PROJECT_FOLDER]
        candidates = list(dict.fromkeys((base / path).resolve() for base in folders if base is not None))
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ConfigError(f"{where}: {value!r} does not exist; looked at {', '.join(map(str, candidates))}")
