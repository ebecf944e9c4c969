"""One YAML file, two Serve applications: reading it, checking it, saying what is wrong and where.

The file is a Serve config, so that `serve run` and `serve deploy` take it as it is. Its two applications hold the
sections of `cluster.config.model_section` as the arguments of the builders in `serve_app`:

    applications:
      - {name: experts, import_path: "serve_app:build_experts", args: {model: &model {...}, shards: ...}}
      - {name: llm, import_path: "serve_app:build_llm", args: {model: *model, routers: ...}}
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field

from cluster.config.apps import ExpertsAppConfig, LLMAppConfig
from cluster.config.model_section import ModelSection
from cluster.config.parse import ConfigError, parse
from experts.protocol.settings import StrictModel

EXPERTS_BUILDER = "serve_app:build_experts"
LLM_BUILDER = "serve_app:build_llm"
UNNAMED = "default"  # what Serve calls an application that has no name


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
        if self.experts.placement.prefer_local_replicas and not self.llm.transport.prefer_local_replicas:
            yield (
                "placement.prefer_local_replicas is true, so the plan is for routers that prefer local replicas, and "
                "transport.prefer_local_replicas is not"
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
