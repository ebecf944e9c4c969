"""A load generator for streamed completions that leaves the cores to the servers: libcurl, and a clock read a chunk.

python -m benchmarks.serving.streams URL MODEL --streams 16 --requests 64 --new-tokens 100
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pycurl

from benchmarks.common import percentile

EVENT = b"data: {"
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
TIMEOUT_S = 300
# Prompts must differ, so that their experts do, and have about the same length.
PROMPT = "import os\n\n\ndef run_{index}(path, count={index}):\n    "


@dataclass
class Stream:
    """One streamed request: when each chunk with tokens arrived, on time.perf_counter()."""

    body: bytes
    start_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    tail: bytes = b""  # what may be the begin of an event
    received: list[bytes] = field(default_factory=list)
    status: int = 0
    error: str = ""

    def on_data(self, data: bytes) -> None:
        now_s = time.perf_counter()
        joined = self.tail + data
        events = EVENT in joined
        self.tail = joined[-(len(EVENT) - 1) :]
        self.received.append(data)
        if events:
            self.arrivals_s.append(now_s)

    @property
    def text(self) -> str:
        """The completion; empty for an error."""
        events = [line[6:] for line in b"".join(self.received).split(b"\n") if line.startswith(EVENT)]
        return "".join(choice["text"] for event in events for choice in json.loads(event).get("choices", []))

    @property
    def num_tokens(self) -> int:
        """Tokens of the completion; a chunk may hold several."""
        usage = USAGE.findall(b"".join(self.received))
        return int(usage[-1]) if usage else 0

    @property
    def failure(self) -> str:
        """Why the request failed, empty if it did not."""
        if self.error or self.status != 200:
            return self.error or f"status {self.status}: {b''.join(self.received)[:200]!r}"
        body = b"".join(self.received)
        return "" if b"data: [DONE]" in body and b'"error"' not in body else f"no end: {body[-200:]!r}"


@dataclass(frozen=True)
class Load:
    """What a run of streams measured."""

    streams: int
    requests: int
    failed: int
    tokens_per_s: float
    first_token_p50_ms: float
    gap_p50_ms: float  # between chunks of one stream
    gap_p99_ms: float
    gap_max_ms: float
    chunk_tokens: float  # mean tokens that arrived together


def requests(model: str, count: int, new_tokens: int) -> list[Stream]:
    """`count` greedy completions of different prompts."""
    return [
        Stream(
            json.dumps(
                {
                    "model": model,
                    "prompt": PROMPT.format(index=index),
                    "max_tokens": new_tokens,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "ignore_eos": True,
                }
            ).encode()
        )
        for index in range(count)
    ]


def run(url: str, todo: list[Stream], concurrency: int, headers: tuple[str, ...] = ()) -> Load:
    """Send all, `concurrency` at a time over kept connections."""
    multi = pycurl.CurlMulti()  # it keeps the connections
    waiting: Iterator[Stream] = iter(todo)
    of_handle: dict[Any, Stream] = {}
    start_s = time.perf_counter()
    while True:
        while len(of_handle) < concurrency and (stream := next(waiting, None)) is not None:
            handle = pycurl.Curl()
            handle.setopt(pycurl.URL, f"{url}/v1/completions")
            handle.setopt(pycurl.HTTPHEADER, ["Content-Type: application/json", "Expect:", *headers])
            handle.setopt(pycurl.POSTFIELDS, stream.body)
            handle.setopt(pycurl.WRITEFUNCTION, stream.on_data)
            handle.setopt(pycurl.TCP_NODELAY, 1)
            handle.setopt(pycurl.NOSIGNAL, 1)
            handle.setopt(pycurl.TIMEOUT, TIMEOUT_S)
            stream.start_s = time.perf_counter()
            of_handle[handle] = stream
            multi.add_handle(handle)
        if not of_handle:
            break
        multi.perform()
        _, done, failed = multi.info_read()
        for handle, error in [
            *((handle, "") for handle in done),
            *((handle, f"curl {code}: {text}") for handle, code, text in failed),
        ]:
            stream = of_handle.pop(handle)
            stream.status, stream.error = handle.getinfo(pycurl.RESPONSE_CODE), error
            multi.remove_handle(handle)
            handle.close()
        if not done and not failed:
            multi.select(1.0)
    return _load(todo, concurrency, time.perf_counter() - start_s)


def _load(streams: list[Stream], concurrency: int, seconds: float) -> Load:
    gaps = [after - before for s in streams for before, after in itertools.pairwise(s.arrivals_s)]
    first = [s.arrivals_s[0] - s.start_s for s in streams if s.arrivals_s]
    tokens, chunks = sum(s.num_tokens for s in streams), sum(len(s.arrivals_s) for s in streams)
    return Load(
        streams=concurrency,
        requests=len(streams),
        failed=sum(bool(s.failure) for s in streams),
        tokens_per_s=tokens / seconds,
        first_token_p50_ms=1000 * percentile(first, 0.5),
        gap_p50_ms=1000 * percentile(gaps, 0.5),
        gap_p99_ms=1000 * percentile(gaps, 0.99),
        gap_max_ms=1000 * max(gaps, default=float("nan")),
        chunk_tokens=tokens / max(chunks, 1),
    )


def main() -> None:
    """Measure one server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=100)
    args = parser.parse_args()
    print(run(args.url, requests(args.model, args.requests, args.new_tokens), args.streams))


if __name__ == "__main__":
    main()
