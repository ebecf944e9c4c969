"""Recording of a trace from a running server: send prompts, then fetch what its routers sampled."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from placement.trace import ActivationTrace, TraceError

TRACE_PATH = "/expertmesh/trace"


class ServerError(ValueError):
    """The server did not answer as it should; the message is one line for a person."""


def read_prompts(path: str | Path) -> list[list[dict[str, str]]]:
    """Chats of a file: a prompt a line, or JSON lines with `prompt` or OpenAI `messages`. ValueError if none."""
    chats: list[list[dict[str, str]]] = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        if Path(path).suffix != ".jsonl":
            chats.append([{"role": "user", "content": line}])
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
            chats.append(entry["messages"])
        elif isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
            chats.append([{"role": "user", "content": entry["prompt"]}])
        else:
            raise ValueError(f"{path}:{number}: expected an object with prompt or messages")
    if not chats:
        raise ValueError(f"{path}: no prompts")
    return chats


def fetch(url: str, timeout_s: float, body: dict[str, Any] | None = None) -> bytes:
    """The answer to a GET, or to a POST of JSON. Raises ServerError naming the URL and the reason."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        detail = error.read(300).decode(errors="replace").replace("\n", " ")
        raise ServerError(f"{url}: status {error.code}: {detail}") from None
    except (OSError, ValueError) as error:
        raise ServerError(f"{url}: {getattr(error, 'reason', error)}") from None


def fetch_trace(url: str, timeout_s: float) -> ActivationTrace:
    """What the server's routers have sampled so far."""
    try:
        return ActivationTrace.load_npz(io.BytesIO(fetch(url.rstrip("/") + TRACE_PATH, timeout_s)))
    except (TraceError, ServerError):
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ServerError(f"{url}{TRACE_PATH}: not a trace: {error}") from None


def profile_server(
    url: str,
    chats: list[list[dict[str, str]]],
    model: str | None = None,
    max_tokens: int = 64,
    concurrency: int = 8,
    timeout_s: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
) -> ActivationTrace:
    """Send every chat to `/v1/chat/completions` and return the server's trace.

    Raises ServerError on the first request that fails; those in flight are waited for, `timeout_s` at most.
    """
    base = url.rstrip("/")
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}, expected at least 1")
    if model is None:
        try:
            model = json.loads(fetch(f"{base}/v1/models", timeout_s))["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError(f"{base}/v1/models: lists no model: {error}") from None

    def ask(messages: list[dict[str, str]]) -> None:
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        fetch(f"{base}/v1/chat/completions", timeout_s, body)

    with ThreadPoolExecutor(concurrency) as pool:
        asked = [pool.submit(ask, chat) for chat in chats]
        try:
            for done, future in enumerate(as_completed(asked), 1):
                future.result()
                if progress is not None:
                    progress(done, len(asked))
        except ServerError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return fetch_trace(base, timeout_s)
