"""Endless greedy streams against an OpenAI API: what failed, what changed, and how long a stream paused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

REQUEST_TIMEOUT_S = 300.0
PAUSE_AFTER_FAILURE_S = 0.1


@dataclass
class Window:
    """What happened to the streams between two instants of time.monotonic()."""

    requests: int = 0
    failed: list[str] = field(default_factory=list)
    changed: int = 0
    largest_gap_s: float = 0.0
    largest_first_token_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)

    @property
    def chunks(self) -> int:
        """Chunks after the first of each request."""
        return len(self.gaps_s)


class Streams:
    """One request after another on each stream; a thread of its own runs them.

    A stream's expected text is the one that its first request returned.
    """

    def __init__(
        self, url: str, model: str, prompts: Sequence[list[int] | str], max_tokens: int, api_key: str | None = None
    ) -> None:
        self._url = f"{url}/v1/completions"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key is not None else {}
        self._bodies = [
            {
                **{"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0},
                **{"stream": True, "ignore_eos": True},
            }
            for prompt in prompts
        ]
        self._stop = threading.Event()
        self._expected: dict[int, str] = {}
        self._ends: list[tuple[float, str | None, bool]] = []  # (when, why it failed, whether the text differs)
        self._gaps: list[tuple[float, float]] = []
        self._first_tokens: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[Streams]:
        """Start the streams; on the way out, let each finish its request."""
        thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="streams")
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join(REQUEST_TIMEOUT_S + 10)

    def warm(self) -> bool:
        """Whether every stream has had its first text."""
        return len(self._expected) == len(self._bodies)

    def window(self, start_s: float, end_s: float) -> Window:
        """What happened in between."""
        ends = [end for end in self._ends if start_s <= end[0] < end_s]
        return Window(
            requests=len(ends),
            failed=[why for _, why, _ in ends if why is not None],
            changed=sum(differs for _, _, differs in ends),
            largest_gap_s=max((gap for when, gap in self._gaps if start_s <= when < end_s), default=0.0),
            largest_first_token_s=max((t for when, t in self._first_tokens if start_s <= when < end_s), default=0.0),
            gaps_s=[gap for when, gap in self._gaps if start_s <= when < end_s],
        )

    def wait_until_warm(self, timeout_s: float) -> None:
        """Wait for the first text of every stream. RuntimeError after `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        while not self.warm():
            if time.monotonic() > end_s:
                raise RuntimeError(f"no text on some stream after {timeout_s} s: {self.window(0, end_s).failed[:3]}")
            time.sleep(0.5)

    async def _run(self) -> None:
        limits = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=limits, connector=connector) as session:
            await asyncio.gather(*(self._stream(session, index) for index in range(len(self._bodies))))

    async def _stream(self, session: aiohttp.ClientSession, index: int) -> None:
        while not self._stop.is_set():
            try:
                text = await self._request(session, self._bodies[index])
            except (aiohttp.ClientError, TimeoutError, RuntimeError, ValueError) as error:
                self._ends.append((time.monotonic(), f"{type(error).__name__}: {error}", False))
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)
            else:
                self._ends.append((time.monotonic(), None, text != self._expected.setdefault(index, text)))

    async def _request(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
        """The text of one completion. Raises RuntimeError for an error status, an error in the stream, or no end."""
        text, begun_s = "", time.monotonic()
        last_s: float | None = None
        async with session.post(self._url, json=body, headers=self._headers) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                now_s, data = time.monotonic(), line[5:].strip()
                if data == b"[DONE]":
                    return text
                chunk = json.loads(data)
                if "choices" not in chunk:
                    raise RuntimeError(f"an error in the stream: {data[:200]!r}")
                text += chunk["choices"][0]["text"]
                if last_s is None:
                    self._first_tokens.append((now_s, now_s - begun_s))
                else:
                    self._gaps.append((now_s, now_s - last_s))
                last_s = now_s
        raise RuntimeError("the stream ended without [DONE]")
