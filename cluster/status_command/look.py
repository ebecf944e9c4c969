"""One look at a running service: its health route and the console's status."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from placement.command.ending import CommandError, Ending

_KEY = "give an admin key: --api-key, or the variable EXPERTMESH_API_KEY"


@dataclass(frozen=True)
class Answer:
    """`code` 0: nothing answered, and `body` says why."""

    code: int
    body: Any


@dataclass(frozen=True)
class Look:
    """What the service said. `status` is None without a console that tells, and `lacking` says why."""

    at_s: float  # time.monotonic()
    health: Answer
    status: dict[str, Any] | None
    lacking: str = ""


def look(url: str, console: str, api_key: str | None, timeout_s: float) -> Look:
    """Ask once. CommandError (UNREACHABLE) if nothing answers at `url`."""
    base = url.rstrip("/").removesuffix("/v1")
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(get, f"{base}{console}/status", api_key, timeout_s)
        health = get(f"{base}/health", None, timeout_s)
        told = asked.result()
    if not told.code and not health.code:
        raise CommandError(f"nothing answers at {url}: {told.body}", ending=Ending.UNREACHABLE)
    if told.code == 200 and isinstance(told.body, dict) and "routers" in told.body:
        return Look(time.monotonic(), health, told.body)
    return Look(time.monotonic(), health, None, f"{base}{console}/status: {_why(told)}")


def get(url: str, api_key: str | None, timeout_s: float) -> Answer:
    """The answer to a GET request."""
    request = urllib.request.Request(url, headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return Answer(response.status, _json(response.read()))
    except urllib.error.HTTPError as error:
        return Answer(error.code, _json(error.read()))
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(0, str(getattr(error, "reason", "")) or str(error) or type(error).__name__)


def _why(answer: Answer) -> str:
    if not answer.code:
        return str(answer.body)
    error = answer.body.get("error") if isinstance(answer.body, dict) else None
    said = error.get("message") if isinstance(error, dict) else None
    hint = f"; {_KEY}" if answer.code in (401, 403) else "; --console-path says where the console is"
    return f"status {answer.code}{f', {said}' if said else ''}{hint}"


def _json(body: bytes) -> Any:
    text = body.decode(errors="replace").strip()
    try:
        return json.loads(text)
    except ValueError:
        return text
