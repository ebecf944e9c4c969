"""Options of Serve deployments and Ray actors, judged by Serve's own schemas, with lines that name the user's key.

Serve's schemas ignore keys that they do not know; here such a key is refused. Ray is imported inside functions, since
the command sets Ray's environment first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from experts.vllm_plugin.engine_options import did_you_mean

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
BUNDLE_KEYS = ("bundle_per_worker", "bundles", "strategy")
_OWN = {
    "name": "the project names its deployments",
    "version": "Serve computes it",
    "route_prefix": "set it in the file",
}


def deployment_problems(options: dict[str, Any], where: str) -> Iterator[str]:
    """One line for each key of a deployment's options that Serve does not know, and each value it does not take."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import DeploymentSchema

    taken = {name for name in inspect.signature(serve.deployment).parameters if not name.startswith("_")}
    known = (taken | set(DeploymentSchema.model_fields)) - set(_OWN)
    for key in options:
        if key in _OWN:
            yield f"{where}.{key} cannot be set: {_OWN[key]}"
        elif key not in known:
            yield f"{where}.{key} is no option of a Serve deployment{did_you_mean(key, sorted(known))}"
    actor = options.get("ray_actor_options")
    if actor is not None:
        yield from actor_problems(actor, f"{where}.ray_actor_options")
    scaling = options.get("autoscaling_config")
    if isinstance(scaling, dict):
        yield from schema_problems(AutoscalingConfig, scaling, f"{where}.autoscaling_config")
    judged = DeploymentSchema.model_fields.keys() & options.keys() - {"name", "ray_actor_options", "autoscaling_config"}
    yield from schema_problems(DeploymentSchema, {key: options[key] for key in judged}, where, {"name": "deployment"})


def actor_problems(options: Any, where: str) -> Iterator[str]:
    """One line for each key of an actor's options that Serve does not know, and each request that makes no sense."""
    from ray.serve.schema import RayActorOptionsSchema

    if not isinstance(options, dict):
        yield f"{where} is {options!r}, expected a mapping"
        return
    yield from schema_problems(RayActorOptionsSchema, options, where)
    gpus = options.get("num_gpus")
    if isinstance(gpus, float | int) and gpus > 1 and gpus != int(gpus):
        yield f"{where}.num_gpus is {gpus}, expected a fraction of one GPU or a whole number"
    yield from _resource_problems(
        options.get("resources"), f"{where}.resources", {"CPU": "num_cpus", "GPU": "num_gpus"}
    )
    runtime_env = options.get("runtime_env")
    yield from _runtime_env_problems(runtime_env, f"{where}.runtime_env")


def placement_group_problems(group: dict[str, Any], where: str) -> Iterator[str]:
    """One line for each thing that Ray Serve LLM would not take as bundles for an engine's workers."""
    for key in group:
        if key not in BUNDLE_KEYS:
            yield f"{where}.{key} is no option of a placement group{did_you_mean(key, BUNDLE_KEYS)}"
    if group.get("strategy", "PACK") not in STRATEGIES:
        yield f"{where}.strategy is {group['strategy']!r}, expected one of {', '.join(STRATEGIES)}"
    given = [key for key in BUNDLE_KEYS[:2] if group.get(key) is not None]
    if len(given) != 1:
        yield f"{where} has {' and '.join(given) or 'no bundles'}, expected either bundle_per_worker or bundles"
    for key in given:
        value = group[key]
        if key == "bundles" and (not isinstance(value, list) or not value):
            yield f"{where}.bundles is {value!r}, expected a list of bundles such as {{CPU: 2, GPU: 1}}"
            continue
        for index, bundle in enumerate(value if key == "bundles" else [value]):
            place = f"{where}.{key}[{index}]" if key == "bundles" else f"{where}.{key}"
            yield from _resource_problems(bundle, place, {"num_cpus": "CPU", "num_gpus": "GPU"})


def bundles_of(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The bundles that a placement_group_config asks for, as far as they are mappings."""
    bundles = group.get("bundles")
    found = [group.get("bundle_per_worker"), *(bundles if isinstance(bundles, list) else [])]
    return [bundle for bundle in found if isinstance(bundle, dict)]


def accelerator_types() -> list[str]:
    """The names that Ray Serve LLM takes as accelerator_type."""
    from ray.util.accelerators import accelerators

    return ["A10", *(value for value in vars(accelerators).values() if isinstance(value, str) and value[0] != "_")]


def _resource_problems(resources: Any, where: str, elsewhere: dict[str, str]) -> Iterator[str]:
    if resources is None:
        return
    if not isinstance(resources, dict):
        yield f"{where} is {resources!r}, expected resources with their amounts"
        return
    for name, amount in resources.items():
        if name in elsewhere:
            yield f"{where}.{name} is not read there; use {elsewhere[name]} instead"
        elif not isinstance(amount, int | float) or isinstance(amount, bool) or amount < 0:
            yield f"{where}.{name} is {amount!r}, expected an amount of 0 or more"


def _runtime_env_problems(runtime_env: Any, where: str) -> Iterator[str]:
    from ray.runtime_env import RuntimeEnv

    if not isinstance(runtime_env, dict):
        return  # absent, or refused by the schema
    for key in runtime_env:
        if key not in RuntimeEnv.known_fields:
            yield f"{where}.{key} is no field of a runtime_env{did_you_mean(key, sorted(RuntimeEnv.known_fields))}"
    for name, value in (runtime_env.get("env_vars") or {}).items():
        if not isinstance(value, str):
            yield f"{where}.env_vars.{name} is {value!r}, expected a string: put it in quotes"


def schema_problems(
    schema: type[BaseModel], values: dict[str, Any], where: str, needed: dict[str, Any] | None = None
) -> Iterator[str]:
    """What a schema of Serve says of values. Schemas that ignore unknown keys have them refused here."""
    for key in values:
        if key not in schema.model_fields:
            yield f"{where}.{key} is unknown to Serve{did_you_mean(key, schema.model_fields)}"
    try:
        schema.model_validate({**(needed or {}), **values})
    except ValidationError as error:
        for item in error.errors():
            if item["type"] != "extra_forbidden":
                place = ".".join(map(str, (where, *item["loc"])))
                text = item["msg"].removeprefix("Value error, ").replace("Input should be ", "expected ")
                shown = "" if item["type"] == "value_error" else f" is {item['input']!r}"
                yield f"{place}{shown}: {' '.join(text.split())}"
