"""Jobs of `engine_zygote` that ask vLLM's own classes what they take; they report and assert nothing."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

PROBES: dict[str, Any] = {
    "zero": 0,
    "one": 1,
    "minus": -7,
    "half": 0.5,
    "three halves": 1.5,
    "true": True,
    "none": None,
    "text": "no such word",
    "auto": "auto",
    "empty": "",
    "list": ["a"],
    "dict": {"a": 1},
    "empty dict": {},
}


def options(emit: Any) -> None:
    """Names of all engine and front-end options, and which PROBES each takes, as do the keys of config classes."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    def takes(adapter: Any, value: Any, key: str | None = None) -> bool:
        try:
            adapter.validate_python(value if key is None else {key: value})
        except ValidationError as error:
            return key is not None and not any(item["loc"][:1] == (key,) for item in error.errors())
        except KeyError:  # what vLLM raises for a word that is no member of an enum
            return False
        except Exception:  # a validator that the class runs after the fields
            return True
        return True

    local = {"QuantizationConfigArgs": dict[str, Any]}  # imported for type checkers only
    hints = typing.get_type_hints(AsyncEngineArgs, localns=local, include_extras=True)
    engine, nested, front_end = {}, {}, {}
    anything = ConfigDict(arbitrary_types_allowed=True)
    for field in dataclasses.fields(AsyncEngineArgs):
        kind = hints[field.name]
        adapter = TypeAdapter(kind) if dataclasses.is_dataclass(kind) else TypeAdapter(kind, config=anything)
        engine[field.name] = [name for name, value in PROBES.items() if takes(adapter, value)]
        for kind in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind):
                config = TypeAdapter(kind)
                nested[field.name] = {
                    part.name: [name for name, value in PROBES.items() if takes(config, value, part.name)]
                    for part in dataclasses.fields(kind)
                    if part.init
                }
    config = TypeAdapter(FrontendArgs)
    for field in dataclasses.fields(FrontendArgs):
        front_end[field.name] = [name for name, value in PROBES.items() if takes(config, value, field.name)]
    emit(engine=engine, nested=nested, front_end=front_end)


def engine_configs(emit: Any, model: str, cases: dict[str, dict[str, Any]]) -> None:
    """What vLLM says when it makes a config of engine arguments: {case: message}, None where it takes them."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    answers: dict[str, str | None] = {}
    for case, arguments in cases.items():
        folder = str(Path(model) / arguments.pop("folder")) if "folder" in arguments else model
        try:
            kwargs = {"model": folder, "dtype": "float32", "skip_tokenizer_init": True, **arguments}
            AsyncEngineArgs(**kwargs).create_engine_config()
            answers[case] = None
        except Exception as error:
            answers[case] = f"{type(error).__name__}: {error}"
    emit(answers=answers)
