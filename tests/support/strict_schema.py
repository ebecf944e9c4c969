"""Kubernetes resources against the OpenAPI schema of their definition, with unknown keys refused.

The API server drops keys that a schema does not name, without a word; here each is an error.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml


def version_schema(file: Path, version: str) -> dict[str, Any]:
    """The openAPIV3Schema of one version of a CustomResourceDefinition, from a .yaml.gz."""
    definition = yaml.load(gzip.decompress(file.read_bytes()), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [found] = [each for each in definition["spec"]["versions"] if each["name"] == version]
    return found["schema"]["openAPIV3Schema"]


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema of the same meaning that refuses keys it does not name, but for those under metadata at the top."""
    closed = _closed(schema)
    closed["properties"]["metadata"] = {"type": "object"}
    return closed


def problems(resource: Any, schema: dict[str, Any]) -> list[str]:
    """One line for everything in `resource` that a strict schema refuses."""
    validator = jsonschema.Draft202012Validator(schema)
    return sorted(f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(resource)) + list(
        _repeated(resource, schema, "$")
    )


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    told = dict(schema)
    for key in ("items", "additionalProperties"):
        if key in told:
            told[key] = _closed(told[key])
    if "properties" in told:
        told["properties"] = {name: _closed(each) for name, each in told["properties"].items()}
    if told.get("x-kubernetes-int-or-string"):
        told["type"] = ["integer", "string"]
        told.pop("anyOf", None)
    if told.get("type") == "object" and not told.get("x-kubernetes-preserve-unknown-fields"):
        told.setdefault("additionalProperties", False)
    return told


def _repeated(value: Any, schema: Any, path: str) -> Iterator[str]:
    """Items of a list that the schema treats as a map, with the keys of an earlier one."""
    if isinstance(value, dict) and isinstance(schema, dict):
        for key, each in value.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            yield from _repeated(each, below, f"{path}.{key}")
    if isinstance(value, list) and isinstance(schema, dict):
        defaults = {name: each.get("default") for name, each in schema.get("items", {}).get("properties", {}).items()}
        seen = set()
        for index, each in enumerate(value):
            yield from _repeated(each, schema.get("items"), f"{path}[{index}]")
            if keys := schema.get("x-kubernetes-list-map-keys"):
                identity = tuple(str(each.get(key, defaults.get(key))) for key in keys)
                if identity in seen:
                    yield f"{path}[{index}]: a second item with {dict(zip(keys, identity, strict=True))}"
                seen.add(identity)
