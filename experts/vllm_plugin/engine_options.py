"""Engine options that vLLM or the project refuses, told from their names and values alone, without importing vllm.

Ray Serve LLM hands an option to vLLM's engine arguments or, where its name is there, to those of vLLM's HTTP front end.
"""

from __future__ import annotations

import ast
import difflib
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from experts.checkpoint.adapters import touches_routed_experts
from experts.vllm_plugin.source.vllm_source import VllmSource

FRONT_END = ("vllm.entrypoints.launchers.cli_args", "FrontendArgs")
ENGINE = ("vllm.engine.arg_utils", "AsyncEngineArgs")
# Classes that an engine argument without a default of its own goes to, under the same name.
CONFIGS = ("ModelConfig", "CacheConfig", "ParallelConfig", "SchedulerConfig")

DEFAULT_MAX_LORA_RANK = 16  # vLLM's; a test compares them

OWNED = {
    "worker_extension_cls": "it names the plug-in that replaces the routed experts",
    "scheduler_cls": "it names the scheduler that ends requests whose experts are nowhere",
    "load_format": "the loader leaves the experts' tensors out",
    "model": "use model.path instead",
    "served_model_name": "use model.id instead",
    "dtype": "use model.dtype instead, which the shards use too",
    "lora_modules": "use lora_config instead",
    "default_mm_loras": "use lora_config instead",
    "distributed_executor_backend": "Ray Serve LLM chooses it by routers.accelerator",
}
ONE = (
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "nnodes",
)
OFF = {
    "enable_expert_parallel": "the shards hold the experts",
    "enable_eplb": "the shards hold the experts, and the planner balances them",
    "enable_elastic_ep": "the shards hold the experts",
    "enable_dbo": "a step's dispatch is not split; let two routers share a GPU instead",
    "enable_moe_shared_loras": "adapters leave the routed experts alone",
    "enable_mixed_moe_lora_format": "adapters leave the routed experts alone",
}

MTP = "model.mtp is false, so no shard holds the experts of the MTP layer: set it to true for shards and routers"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a line that refuses a name: the known one that looks most like it, or nothing."""
    found = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {found[0]}?" if found else ""


def refused_by_project(options: dict[str, Any], device: str) -> Iterator[str]:
    """One line for each option that the project sets itself or cannot serve with. `device` is "cpu" or "cuda"."""
    for key, why in OWNED.items():
        if key in options:
            yield f"{key} is set by the project: {why}"
    extra = options.get("additional_config")
    if isinstance(extra, dict) and "expertmesh" in extra:
        yield "additional_config.expertmesh is set by the project: use transport and deadlines instead"
    for key in ONE:
        if options.get(key, 1) != 1:
            yield f"{key} is {options[key]!r}, expected 1: run more routers instead (routers.count)"
    workers = options.get("tensor_parallel_size", 1)
    if type(workers) is not int or workers < 1:
        yield f"tensor_parallel_size is {workers!r}, expected a whole number of 1 or more"
    for key, why in OFF.items():
        if options.get(key):
            yield f"{key} is {options[key]!r}, expected false: {why}"
    targets = options.get("lora_target_modules")
    yield from refused_lora_targets(targets if isinstance(targets, list) else ())
    compilation = options.get("compilation_config")
    mode = str(compilation.get("cudagraph_mode", "")) if isinstance(compilation, dict) else ""
    if device == "cuda" and not options.get("enforce_eager") and "FULL" in mode.upper():
        yield f"compilation_config.cudagraph_mode is {mode!r}, expected PIECEWISE or NONE: FULL captures the dispatch"


def refused_without_mtp(options: dict[str, Any]) -> Iterator[str]:
    """One line if these options guess tokens by MTP, for a model whose shards leave the MTP layer out."""
    speculative = options.get("speculative_config")
    method = str(speculative.get("method", "")) if isinstance(speculative, dict) else ""
    if method == "mtp" or method.endswith("_mtp"):  # the longer names are vLLM's old ones
        yield f"speculative_config.method is {method!r}, but {MTP}"


def refused_lora_targets(targets: Iterable[Any]) -> Iterator[str]:
    """One line if the engine option lora_target_modules names routed experts."""
    for target in targets:
        if touches_routed_experts(str(target)):
            yield f"lora_target_modules has {target!r}, but the shards hold the experts: leave it out"


def refused_by_vllm(options: dict[str, Any], source: VllmSource | None = None) -> Iterator[str]:
    """One line for each unknown option and each value that vLLM's argument classes do not take.

    Nothing is refused where vllm is not installed. Values of types that are not in vLLM's source are not looked at.
    """
    source = source or VllmSource.installed()
    if source is None:
        return
    front_end, engine = source.fields(*FRONT_END), source.fields(*ENGINE)
    for name, value in options.items():
        if name in front_end:
            yield from _wrong_value(name, value, source.type_of(*FRONT_END, name))
        elif name in engine:
            yield from next(filter(None, map(list, _judged(source, name, value))), [])
        else:
            yield f"{name} is no engine option of the installed vllm{did_you_mean(name, [*engine, *front_end])}"


def _judged(source: VllmSource, name: str, value: Any) -> Iterator[Iterator[str]]:
    """What vLLM's engine arguments say of a value, and then what the config says that it goes to."""
    yield _wrong_value(name, value, source.type_of(*ENGINE, name))
    module, node = source.fields(*ENGINE)[name]
    goes_to = source.same_field(module, node)
    if isinstance(node.value, ast.Constant) and node.value.value is None:
        # vLLM compares these with defaults of its own before a config class makes a number of a string.
        yield _quoted_number(name, value, source.type_of(*ENGINE, name))
        named = ((ENGINE[0], owner, name) for owner in CONFIGS if name in source.fields(ENGINE[0], owner))
        goes_to = next(named, None)
    if goes_to is not None and value is not None:
        yield _wrong_value(name, value, source.type_of(*goes_to))


def _wrong_value(name: str, value: Any, kind: Any) -> Iterator[str]:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        yield from _lines(name, value, error, kind)


def _quoted_number(name: str, value: Any, kind: Any) -> Iterator[str]:
    if isinstance(value, str) and isinstance(TypeAdapter(kind).validate_python(value), int | float):
        yield f"{name} is the string {value!r}: expected {value}, without quotes"


def _lines(name: str, value: Any, error: ValidationError, kind: Any) -> Iterator[str]:
    """One line for each place in a value that is wrong. A place has several errors where its type has alternatives."""
    places: dict[tuple[Any, ...], list[Any]] = {}
    for item in error.errors():
        whole = item["loc"] and not isinstance(value, dict | list)  # pydantic names the alternative
        places.setdefault(() if whole else item["loc"], []).append(item)
    for loc, items in places.items():
        place = ".".join(map(str, (name, *loc)))
        if items[0]["type"] == "extra_forbidden":
            yield f"{place} is no option of the installed vllm{did_you_mean(str(loc[-1]), _keys_at(kind, loc[:-1]))}"
        else:
            texts = dict.fromkeys(item["msg"].removeprefix("Value error, ") for item in items)
            expected = " or ".join(texts).replace("Input should be ", "expected ")
            yield f"{place} is {items[0]['input']!r}: {expected}"


def _keys_at(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    """Keys of the config class that `loc` leads to."""
    for part in (*loc, None):
        models = [k for k in (kind, *typing.get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
        if not models:
            return []
        kind = models[0]
        if part is not None and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
    return list(kind.model_fields)
