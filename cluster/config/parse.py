"""From the data in a file to checked sections, with errors that name the key, the value and what was expected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.sources.opening import is_remote_name, open_source

PROJECT_FOLDER = Path(__file__).resolve().parents[2]

# Keys that hold a path, by section.
PATHS = {"model": ("path",), "placement": ("file", "trace"), "lora_config": ("dynamic_lora_loading_path",)}
# Those among them that may name something on a server instead.
NAMES = {"model.path", "lora_config.dynamic_lora_loading_path"}

# Keys of earlier versions, and what replaces them.
RENAMED = {
    "http.deployment_config": "routers.deployment_config",
    "placement.near_replicas_first": "prefer_local_replicas",
    "routers.fallback_cache_bytes": "fallback.cache_bytes",
    "transport.near_replicas_first": "prefer_local_replicas",
}

# Sections and keys that moved out of the arguments of `experts`, and the line to write instead.
_LIVE = "deployments: [{{name: PlacementController, user_config: {{{0}: {{...}}}}}}] beside args"
MOVED = {
    "shards.count": "deployments: [{name: ExpertShard, num_replicas: N}] beside args",
    "placement": _LIVE.format("placement"),
    "membership": _LIVE.format("membership") + "; join_timeout_s is shards.join_timeout_s, ray_actor_options is "
    "controller.ray_actor_options",
    "membership.join_timeout_s": "shards.join_timeout_s among the args",
    "membership.ray_actor_options": "controller.ray_actor_options among the args",
}

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class MissingPath:
    """A path of a config that is not on this machine. `reason` begins with `place` and says where it was looked for."""

    place: str
    value: str
    reason: str


class ConfigError(ValueError):
    """A config that cannot be served. The message names the place in the file, the value and what was expected."""


def parse(
    schema: type[M],
    data: Any,
    where: str = "args",
    folder: Path | None = None,
    missing: list[MissingPath] | None = None,
) -> M:
    """Check `data` against `schema`, with the paths in it made absolute.

    `folder` is where relative paths are looked up first. Raises ConfigError; each line of it starts with `where`. With
    a list `missing`, paths that do not exist are put there and stay as they are.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}")
    try:
        config = schema.model_validate(_with_absolute_paths(data, where, folder, missing))
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, where))) from None
    return config


def portable(data: dict[str, Any], config: BaseModel) -> dict[str, Any]:
    """Arguments as written if they mean the same without the file's folder, else with absolute paths.

    Serve compares arguments to tell whether an application changed, and `serve deploy` sends them as written.
    """
    try:
        if parse(type(config), data) == config:
            return data
    except ConfigError:
        pass
    return config.model_dump(exclude_unset=True)


def find_path(value: str, where: str, folder: Path | None) -> Path:
    """The absolute path of an existing file or folder. Raises ConfigError that starts with `where`."""
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


def find_model(value: str, where: str, folder: Path | None) -> str:
    """The absolute path of an existing folder, or else the hub id or URL as it is. Raises ConfigError as `find_path`.

    Whether the hub or the store has it is asked when the application is built.
    """
    try:
        return str(find_path(value, where, folder))
    except ConfigError:
        if not is_remote_name(value):
            raise
    try:
        return str(open_source(value))
    except CheckpointError as error:
        raise ConfigError(f"{where}: {error}") from None


def _with_absolute_paths(
    data: dict[str, Any], where: str, folder: Path | None, missing: list[MissingPath] | None
) -> dict[str, Any]:
    """A copy of an application's arguments in which the values of PATHS are absolute and exist."""
    data = dict(data)
    for section, keys in PATHS.items():
        if not isinstance(data.get(section), dict):
            continue
        data[section] = dict(data[section])
        for key in keys:
            value = data[section].get(key)
            if isinstance(value, str) and value:
                find = find_model if f"{section}.{key}" in NAMES else find_path
                place = f"{where}.{section}.{key}"
                try:
                    data[section][key] = str(find(value, place, folder))
                except ConfigError as error:
                    if missing is None:
                        raise
                    missing.append(MissingPath(place, value, str(error)))
    return data


def _lines(error: ValidationError, where: str) -> Iterator[str]:
    """One line for each mistake."""
    for item in error.errors():
        place = where
        for part in item["loc"]:
            place += f"[{part}]" if isinstance(part, int) else f".{part}"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            key = ".".join(map(str, item["loc"]))
            message = "unknown key"
            if key in RENAMED:
                message = f"unknown key; use {RENAMED[key]} instead"
            elif key in MOVED:
                message = f"moved; write {MOVED[key]}"
        elif item["type"] == "missing":
            message = "missing"
        elif item["type"] != "value_error":
            message = f"{message}, got {item['input']!r}"
        yield f"{place}: {message}"
