"""From data to a checked section, with errors that name the key, the value and what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

PROJECT_FOLDER = Path(__file__).resolve().parents[2]


M = TypeVar("M", bound=BaseModel)


class ConfigError(ValueError):
    """A config that cannot be served; the message names the place in the YAML file, the value and what was expected."""


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
    """A copy in which model.path, placement.file and placement.traces.trace are absolute paths of things that exist."""
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
