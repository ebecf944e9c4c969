"""The applications of one Serve config, each by its sections, all against each other, and by Serve's own schemas."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.check_command.findings import Findings, Kind
from cluster.check_command.model import check_models
from cluster.check_command.serve_configs import ServeConfig
from cluster.config.apps import ConsoleAppConfig, ExpertsAppConfig, LLMAppConfig
from cluster.config.deployments import DeploymentOverrides
from cluster.config.gateway.sections import GatewayAppConfig
from cluster.config.http_sections import KeysSection
from cluster.config.parse import ConfigError, MissingPath, parse
from cluster.config.replicas import router_scaling
from cluster.config.serve_file import CONSOLE_BUILDER, EXPERTS_BUILDER, GATEWAY_BUILDER, LLM_BUILDER, MeshConfig
from cluster.refusals.applications import key_problems, llm_warnings, secret_problems
from cluster.refusals.serve_options import deployment_problems, schema_problems
from experts.vllm_plugin.engine_options import refused_by_vllm

SCHEMAS: dict[str, type[BaseModel]] = {
    EXPERTS_BUILDER: ExpertsAppConfig,
    LLM_BUILDER: LLMAppConfig,
    CONSOLE_BUILDER: ConsoleAppConfig,
    GATEWAY_BUILDER: GatewayAppConfig,
}


def check_config(config: ServeConfig, findings: Findings) -> None:
    """Add everything that can be told of a Serve config here."""
    data, place = config.data, config.place
    findings.refuse(_serve_problems(data, place))
    missing: list[MissingPath] = []
    parsed: dict[str, Any] = {}  # arguments by where they stand
    broken = False
    for index, app in enumerate(data["applications"]):
        where = f"{place}: applications[{index}]"
        if not isinstance(app, dict):
            continue  # Serve's schema has said so
        builder = app.get("import_path")
        if builder not in SCHEMAS:
            findings.add(Kind.not_checked, f"{where}: import_path is {builder!r}, which is none of this project's")
            continue
        try:
            args = parse(SCHEMAS[builder], app.get("args", {}), f"{where}.args", config.folder, missing)
        except ConfigError as error:
            findings.refuse(error)
            findings.refuse(f"{where}.args.{line}" for line in _engine_problems(app.get("args")))
            broken, args = True, None
        else:
            parsed[f"{where}.args"] = args
            _check_environment(args, f"{where}.args", findings)
        broken |= not _check_deployments(app, builder, args, where, config.folder, findings, missing)
    _tell_missing(missing, findings)
    mesh = None if broken else _check_together(config, findings)
    check_models(parsed, mesh, findings)


def _serve_problems(data: dict[str, Any], place: str) -> Iterator[str]:
    """What Serve's schemas say of the file and of each application, without arguments and deployments."""
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema, gRPCOptionsSchema

    applications = data["applications"]
    names = [
        {key: app[key] for key in ("name", "route_prefix", "import_path") if key in app}
        if isinstance(app, dict)
        else app
        for app in applications
    ]
    yield from schema_problems(ServeDeploySchema, {**data, "applications": names}, f"{place}: config")
    # Serve ignores keys that it does not know there.
    for key, schema in (("http_options", HTTPOptionsSchema), ("grpc_options", gRPCOptionsSchema)):
        if isinstance(data.get(key), dict):
            yield from schema_problems(schema, data[key], f"{place}: {key}")
    for index, app in enumerate(applications):
        where = f"{place}: applications[{index}]"
        if not isinstance(app, dict):
            yield f"{where} is {app!r}, expected a mapping"
            continue
        own = {key: value for key, value in app.items() if key not in ("args", "deployments")}
        yield from schema_problems(ServeApplicationSchema, own, where)
        deployments = app.get("deployments", [])
        for number, each in enumerate(deployments if isinstance(deployments, list) else []):
            if isinstance(each, dict):
                options = {key: value for key, value in each.items() if key != "name"}
                yield from deployment_problems(options, f"{where}.deployments[{number}]")


def _check_deployments(
    app: dict[str, Any],
    builder: str,
    args: Any,
    where: str,
    folder: Path,
    findings: Findings,
    missing: list[MissingPath],
) -> bool:
    """Whether `deployments` beside the arguments is well-formed: for each entry alone, then for all."""
    try:
        if builder == EXPERTS_BUILDER:
            _check_overrides(app.get("deployments", []), f"{where}.deployments", folder, missing)
        elif builder == LLM_BUILDER and args is not None:
            router_scaling(app, args, where)
    except ConfigError as error:
        findings.refuse(error)
        return False
    return True


def _engine_problems(args: Any) -> Iterator[str]:
    """What vLLM refuses of the engine's options, in arguments that are refused for something else."""
    routers = args.get("routers") if isinstance(args, dict) else None
    options = routers.get("engine_kwargs") if isinstance(routers, dict) else None
    if isinstance(options, dict):
        yield from (f"routers.engine_kwargs.{line}" for line in refused_by_vllm(options))


def _check_overrides(data: Any, where: str, folder: Path, missing: list[MissingPath]) -> None:
    entries = data if isinstance(data, list) else []
    told = []
    for index, each in enumerate(entries):
        try:
            DeploymentOverrides.of([each], where, folder, missing)
        except ConfigError as error:
            told.append(str(error).replace(f"{where}[0]", f"{where}[{index}]"))
    if told:
        raise ConfigError("\n".join(told))
    DeploymentOverrides.of(data, where, folder, [])


def _check_together(config: ServeConfig, findings: Findings) -> MeshConfig | None:
    """The applications against each other; None where the file lacks one."""
    try:
        mesh = MeshConfig.assembled(config.data, config.place, config.folder, [])
    except ConfigError as error:
        findings.refuse(error)
        return None
    findings.refuse(f"{config.place}: {line}" for line in mesh.disagreements())
    return mesh


def _check_environment(args: Any, where: str, findings: Findings) -> None:
    """Keys, secrets and certificates, which may be on other machines alone; console options; warnings."""
    if isinstance(args, ConsoleAppConfig | GatewayAppConfig):
        findings.refuse(f"{where}.{line}" for line in deployment_problems(args.deployment_config, "deployment_config"))
    if isinstance(args, LLMAppConfig):
        findings.add(Kind.warning, *(f"{where}.{line}" for line in llm_warnings(args)))
    if isinstance(args, LLMAppConfig | ConsoleAppConfig | GatewayAppConfig):
        absent = list(_absent_keys(args.http))
        findings.add(Kind.not_checked, *(f"{where}.{line}" for line in absent))
        if not absent:
            findings.refuse(f"{where}.{line}" for line in key_problems(args.http))
    if isinstance(args, ExpertsAppConfig):
        name = args.mesh.secret_env
        if name is not None and name not in os.environ:
            findings.add(Kind.not_checked, f"{where}.mesh.secret_env: {name} is not set on this machine")
        else:
            findings.refuse(f"{where}.{line}" for line in secret_problems(args))
    section = "mesh" if isinstance(args, ExpertsAppConfig) else "transport"
    tls = getattr(getattr(args, section, None), "tls", None)
    for key, file in (tls.model_dump() if tls is not None else {}).items():
        if not Path(file).exists():
            findings.add(Kind.not_checked, f"{where}.{section}.tls.{key}: {file} is not on this machine")


def _absent_keys(http: KeysSection) -> Iterator[str]:
    if http.keys_file is not None and not Path(http.keys_file).exists():
        yield f"http.keys_file: {http.keys_file} is not on this machine"
    for key in ("keys_env", "api_keys_env", "admin_keys_env"):
        name = getattr(http, key, None)
        if name is not None and name not in os.environ:
            yield f"http.{key}: {name} is not set on this machine"


def _tell_missing(missing: list[MissingPath], findings: Findings) -> None:
    """An absolute path may exist where the service will run; a relative one is looked up beside the file."""
    for each in missing:
        if each.place.endswith(".model.path") and Path(each.value).is_absolute():
            continue  # `check_models` tells what that means
        if Path(each.value).is_absolute():
            findings.add(Kind.not_checked, f"{each.place}: {each.value} is not on this machine")
        else:
            findings.refuse([each.reason])
