"""Records a trace of a running server: clear what its routers recorded, send prompts, fetch what they sampled."""

from __future__ import annotations

import contextlib
import io
import json
import os
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from placement.traces.trace import ActivationTrace, TraceError, merge_traces

TRACE_PATH = "/expertmesh/trace"
KEY_VARIABLE = "EXPERTMESH_API_KEY"
_HINTS = {401: f"; give a key that the server accepts: --api-key, or the environment variable {KEY_VARIABLE}"}


class ServerError(ValueError):
    """The server did not answer as expected. The message is one line for a person."""


class NoServerError(ServerError):
    """Nothing answers at the URL."""


@dataclass(frozen=True)
class Prompt:
    """One request: an OpenAI chat, or a text to continue; and the domain of text it stands for."""

    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    domain: str = ""

    def request(self) -> tuple[str, dict[str, Any]]:
        """Path and body, without the model."""
        if self.messages:
            return "/v1/chat/completions", {"messages": list(self.messages)}
        return "/v1/completions", {"prompt": self.text}


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts in a file. Raises ValueError, naming the line, if there are none or one is malformed.

    Each line of a text file is a chat of one message. Lines of a .jsonl file hold `messages` (an OpenAI chat) or
    `prompt` (a text to continue), and either all or none of them `domain`.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(Prompt(({"role": "user", "content": line},)))
            continue
        try:
            prompts.append(_prompt_of(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if bool(prompts[-1].domain) != bool(prompts[0].domain):
            raise ValueError(f"{path}:{number}: some prompts have a domain and some have none")
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def _prompt_of(entry: Any) -> Prompt:
    if not isinstance(entry, dict):
        raise ValueError("expected an object with prompt or messages")
    domain = entry.get("domain", "")
    if not isinstance(domain, str):
        raise ValueError(f"domain is {domain!r}, expected a name")
    messages, text = entry.get("messages"), entry.get("prompt")
    if isinstance(messages, list) and messages:
        return Prompt(tuple(messages), domain=domain)
    if isinstance(text, str) and text:
        return Prompt(text=text, domain=domain)
    raise ValueError("expected an object with prompt or messages")


class Server:
    """HTTP client of a running server. Every call raises ServerError, naming the URL and the reason.

    `api_key` None: the environment variable EXPERTMESH_API_KEY, if set.
    """

    def __init__(self, url: str, timeout_s: float = 120.0, api_key: str | None = None) -> None:
        self.base = url.rstrip("/")
        try:
            parts = urllib.parse.urlsplit(self.base)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is not a number, an unclosed bracket
            usable = False
        if not usable:
            raise ServerError(f"{url}: expected a URL like http://127.0.0.1:8000")
        if not timeout_s > 0:
            raise ServerError(f"timeout_s is {timeout_s}, expected more than 0")
        self._timeout_s = timeout_s
        self._key = os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """Send a request, with JSON if `body` is given; returns the body of the answer."""
        url = self.base + path
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            request = urllib.request.Request(url, data=data, headers=headers, method=method)
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            hint = _HINTS.get(error.code, "")
            raise ServerError(f"{method} {url}: status {error.code}: {_reason(error.read(4000))}{hint}") from None
        except TimeoutError:
            raise ServerError(f"{method} {url}: no answer within {self._timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            raise NoServerError(f"{method} {url}: {getattr(error, 'reason', error)}; is the server up?") from None

    def model(self) -> str:
        """The first model the server lists."""
        try:
            return str(json.loads(self.call("GET", "/v1/models"))["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError(f"{self.base}/v1/models: lists no model: {error!r}") from None

    def trace(self, reader: str = "") -> ActivationTrace:
        """What all routers have sampled for a reader so far, as one trace."""
        data = self.call("GET", _of_reader(reader))
        try:
            return ActivationTrace.load_npz(io.BytesIO(data))
        except TraceError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise ServerError(f"{self.base}{TRACE_PATH}: not a trace: {error}") from None

    def clear_trace(self, reader: str = "") -> None:
        """Make the routers forget what they sampled for a reader."""
        self.call("DELETE", _of_reader(reader))

    def end_trace(self, reader: str) -> None:
        """The reader is done. A server that does not hear it drops the sample later."""
        with contextlib.suppress(ServerError):
            self.call("DELETE", _of_reader(reader) + "&end=true")


def _of_reader(reader: str) -> str:
    return f"{TRACE_PATH}?reader={reader}" if reader else TRACE_PATH


def _reason(body: bytes) -> str:
    """The message of an error in OpenAI's format, or else the start of the body, in one line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300]


def profile_server(
    url: str,
    prompts: list[Prompt],
    model: str | None = None,
    max_tokens: int = 64,
    concurrency: int = 8,
    timeout_s: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
    api_key: str | None = None,
    keep: bool = False,
) -> ActivationTrace:
    """Send every prompt, and return the trace of the tokens the server's routers routed.

    The routers keep a sample for this call alone, unless `keep`: then it is the one that they have kept all along,
    which fades. Prompts with domains are sent domain by domain, and the trace gives the domain of each token. Other
    clients' requests in the meantime are recorded too. Raises ServerError at the first request that fails, after
    waiting up to `timeout_s` for those in flight, and ValueError for bad arguments.
    """
    if concurrency < 1 or max_tokens < 1:
        raise ValueError(f"concurrency is {concurrency}, max_tokens {max_tokens}: each must be at least 1")
    domains = list(dict.fromkeys(prompt.domain for prompt in prompts))
    if keep and domains != [""]:
        raise ValueError("prompts with domains need a recording for each domain, so keep is not possible")
    server = Server(url, timeout_s, api_key)
    model = model or server.model()
    reader = "" if keep else f"profile-{uuid.uuid4().hex[:12]}"
    parts: list[ActivationTrace] = []
    done = 0
    try:
        for domain in domains:
            if reader:
                server.clear_trace(reader)
            of_domain = [prompt for prompt in prompts if prompt.domain == domain]
            for _ in _answers(server, of_domain, model, max_tokens, concurrency):
                done += 1
                if progress is not None:
                    progress(done, len(prompts))
            part = server.trace(reader)
            if domain:
                part = replace(part, domain=np.zeros(part.num_tokens, np.int8), domains=(domain,))
            parts.append(part)
    finally:
        if reader:
            server.end_trace(reader)
    return merge_traces(parts)


def _answers(server: Server, prompts: list[Prompt], model: str, max_tokens: int, concurrency: int) -> Iterator[None]:
    """Yields once for each prompt, as answers come in."""

    def ask(prompt: Prompt) -> None:
        path, body = prompt.request()
        server.call("POST", path, {**body, "model": model, "max_tokens": max_tokens, "temperature": 0})

    with ThreadPoolExecutor(concurrency) as pool:
        asked = [pool.submit(ask, prompt) for prompt in prompts]
        try:
            for future in as_completed(asked):
                future.result()
                yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
