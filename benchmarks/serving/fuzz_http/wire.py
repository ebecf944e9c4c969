"""One request and what came back, over a connection that stays open; and what an answer may look like."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Request:
    """As it goes over the wire."""

    method: str
    path: str
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)

    def __str__(self) -> str:
        return f"{self.method} {self.path} {dict(self.headers)} {(self.body or b'')[:600]!r}"


@dataclass(frozen=True)
class Answer:
    """Status 0 stands for a connection that was dropped, `body` for why."""

    status: int
    body: bytes
    content_type: str = ""

    def problems(self, request: Request) -> Iterator[str]:
        """What is wrong with this answer, whatever was asked."""
        if self.status == 0:
            yield f"dropped connection: {self.body.decode()}"
        elif self.status >= 500:
            yield f"status {self.status}"
        if self.status >= 400 and request.method != "HEAD":
            yield from _error_problems(self.body)
        if self.content_type.startswith("text/event-stream"):
            for event in self.body.split(b"\n\n"):
                if b'data: {"error"' in event or event.startswith(b"event: error"):
                    yield from _error_problems(event[event.index(b"data: ") + 6 :])


def _error_problems(body: bytes) -> Iterator[str]:
    try:
        error = json.loads(body)["error"]
        sound = set(error) == {"message", "type", "param", "code"} and bool(error["message"])
        sound = sound and isinstance(error["code"], str | None) and isinstance(error["param"], str | None)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        yield f"not OpenAI's error format: {body[:200]!r}"
    elif error["type"] in ("server_error", "overloaded_error"):
        yield f"an error of the server: {error['message']}"


class Connection:
    """Sends one request after the other, each on the same connection while that is kept open."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._netloc = urlsplit(url).netloc
        self._key = () if key is None else (("Authorization", f"Bearer {key}"),)
        self._http = http.client.HTTPConnection(self._netloc, timeout=TIMEOUT_S)

    def send(self, request: Request) -> Answer:
        """The answer, read to its end."""
        for is_last in (False, True):
            had_connection = self._http.sock is not None
            try:
                self._http.putrequest(request.method, request.path, skip_accept_encoding=True)
                for name, value in (*request.headers, *self._key):
                    self._http.putheader(name, value)
                if request.body is not None:
                    self._http.putheader("Content-Length", str(len(request.body)))
                self._http.endheaders(request.body)
                got = self._http.getresponse()
                return Answer(got.status, got.read(), got.getheader("content-type", ""))
            except (http.client.RemoteDisconnected, ConnectionError) as error:
                self._http.close()
                if is_last or not had_connection:  # a kept connection may have been closed while idle
                    return Answer(0, repr(error).encode())
            except (http.client.HTTPException, OSError) as error:
                self._http.close()
                return Answer(0, repr(error).encode())
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._http.close()


@dataclass
class Neighbour:
    """A client that streams the same greedy completion again and again, in a thread of its own."""

    url: str
    model: str
    key: str | None = None
    max_tokens: int = 150
    streams: int = 0
    changed: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0

    def __post_init__(self) -> None:
        self._expected = self._stream()
        self.longest_gap_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Let the running stream end."""
        self._stop.set()
        self._thread.join(TIMEOUT_S)
        if self._thread.is_alive():
            self.changed.append("the last stream does not end")

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                tokens = self._stream()
            except Exception as error:
                self.changed.append(repr(error))
                return
            self.streams += 1
            if tokens != self._expected:
                self.changed.append(f"got {tokens}, alone it was {self._expected}")

    def _stream(self) -> list[int]:
        body: dict[str, Any] = {"model": self.model, "prompt": "def read_lines(path):", "max_tokens": self.max_tokens}
        body |= {"temperature": 0, "stream": True, "ignore_eos": True, "return_token_ids": True}
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        tokens: list[int] = []
        last_s = time.monotonic()
        for line in response:
            if line.startswith(b"data: {"):
                now_s = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
                last_s = now_s
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                tokens += event["choices"][0]["token_ids"] or []
        connection.close()
        return tokens
