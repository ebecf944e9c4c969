"""Log lines as JSON (`--log-format json`): what Serve is told, and what the command and its `--verbose` print."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

from experts.protocol.log_lines import json_formatter

LogFormat = Literal["text", "json"]
SERVE_JSON = {"encoding": "JSON"}


def with_json_logs(serve_config: dict[str, Any]) -> dict[str, Any]:
    """A Serve config whose components log JSON; replicas of the project then do so too."""
    return {**serve_config, "logging_config": {**(serve_config.get("logging_config") or {}), **SERVE_JSON}}


def json_line(message: str, level: str = "INFO", **fields: Any) -> str:
    """A line of the command's own."""
    now_s = time.time()
    asctime = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now_s))},{int(now_s % 1 * 1000):03d}"
    return json.dumps({"asctime": asctime, "levelname": level, "message": message, **fields})


def say(line: str, out: TextIO) -> None:
    """Print a line in one piece: those that several threads print must not run into one another."""
    out.write(f"{line}\n")
    out.flush()


def print_json_lines() -> None:
    """Print what the cluster's processes write: JSON as it is, any other line inside an object. Once Ray is connected.

    What Ray and Serve log in this process becomes JSON, too.
    """
    from ray import serve  # noqa: F401  its logger; and ray, whose environment the command sets before it is imported

    from cluster.ray_joints import take_worker_lines

    take_worker_lines(_print_json)
    for name in ("ray", "ray.serve"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(json_formatter())


def _print_json(told: dict[str, Any]) -> None:
    if told["lines"]:  # a worker that ends may have none left
        say("\n".join(_as_json(told)), sys.stdout)


def _as_json(told: dict[str, Any]) -> list[str]:
    named = {"process": "pid", "ip": "ip", "actor_name": "actor_name"}
    source = {name: told[key] for name, key in named.items() if told.get(key)}
    return [line if _is_object(line) else json_line(line, **source) for line in told["lines"]]


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
