"""The page of all config keys, docs/config.md, from the schema that checks them.

python -m cluster.reference.config_page > docs/config.md
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cluster.config.apps import ConsoleAppConfig, ExpertsAppConfig, LLMAppConfig
from cluster.config.gateway.sections import GatewayAppConfig, GatewayLive
from cluster.config.live_sections import LiveConfig

_HEAD = """# Config reference

Made by `python -m cluster.reference.config_page`; a test keeps it true.

A config is a Ray Serve config file with three applications; `console` may be left out. Start from one in `configs/`. An
unknown key is an error that names it. Relative paths are looked up in the file's folder first. Names end in their unit.

```yaml
applications:
  - name: experts
    import_path: serve_app:build_experts
    args: {...}            # below: experts
    deployments:
      - {name: ExpertShard, num_replicas: 3}      # or autoscaling_config: see autoscaling.md
      - {name: PlacementController, user_config: {...}}   # below: controller
  - name: llm
    route_prefix: /
    import_path: serve_app:build_llm
    args: {...}            # below: llm
  - name: console
    route_prefix: /expertmesh
    import_path: serve_app:build_console
    args: {...}            # below: console
```

Several models behind one address have several of the first two, and a `gateway` ([several models](several-models.md)).

A change of `args` replaces every replica of its application, one by one for routers ([upgrades](upgrades.md)). A change
of `num_replicas` and of `user_config` takes effect while everything serves ([live experts](live-experts.md))."""

_PARTS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("experts", "`args` of the application with `serve_app:build_experts`.", ExpertsAppConfig),
    ("controller", "`user_config` of its deployment `PlacementController`.", LiveConfig),
    ("llm", "`args` of the application with `serve_app:build_llm`.", LLMAppConfig),
    ("console", "`args` of the application with `serve_app:build_console`.", ConsoleAppConfig),
    ("gateway", "`args` of the application with `serve_app:build_gateway`, for several models.", GatewayAppConfig),
    ("models", "`user_config` of its deployment `Gateway` ([several models](several-models.md)).", GatewayLive),
)
_WORDS = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "NoneType": "null"}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "min_length": "length at least"}


def page() -> str:
    """Markdown: a heading an application, a table a section."""
    lines = [_HEAD]
    for title, where, schema in _PARTS:
        lines += [f"\n## {title}\n", where]
        for name, section in _sections(schema, ""):
            if name:
                lines.append(f"\n### {title}: `{name}`\n")
                lines.append(" ".join((section.__doc__ or "").split()))
            rows = list(_rows(section))
            if rows:
                lines += ["\n| key | value | default | |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _sections(schema: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted name, schema) of a section and of those inside it."""
    yield path, schema
    for name, field in schema.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _sections(inner, f"{path}.{name}" if path else name)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The schema of a field that is a section, or may be one."""
    found = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
    return next((each for each in found if issubclass(each, BaseModel)), None)


def _rows(schema: type[BaseModel]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        if _section_of(field.annotation) is not None and get_origin(field.annotation) is None:
            continue  # it has a table of its own, with the same words above it
        about = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{name}` | {_values(field)} | {_default(field)} | {about} |"


def _values(field: FieldInfo) -> str:
    bounds = []
    for each in field.metadata:
        bounds += [f"{word} {getattr(each, key):g}" for key, word in _BOUNDS.items() if hasattr(each, key)]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(each) for each in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    name = getattr(annotation, "__name__", str(annotation))
    return _WORDS.get(name, name)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "null"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(page(), end="")
