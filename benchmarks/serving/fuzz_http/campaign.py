"""Many requests against one service, with a neighbour that streams meanwhile."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from benchmarks.serving.fuzz_http.generate import from_bodies, from_schema, good_bodies, run
from benchmarks.serving.fuzz_http.wire import Connection, Neighbour, Request

SCHEMA_SHARE = 5  # one request in so many: schemathesis takes twenty times as long to think of one
MAX_EXAMPLES = 20  # of failures in a report


class Campaign:
    """Requests sent to the service at `url`, and what came of them."""

    def __init__(self, url: str, key: str | None = None, show_progress: bool = False) -> None:
        self._url, self._key, self._show_progress = url, key, show_progress
        self._connection = Connection(url, key)
        self.document = json.loads(self._get("/openapi.json"))
        self.model = json.loads(self._get("/v1/models"))["data"][0]["id"]
        self.statuses: Counter[int] = Counter()
        self.failures: list[str] = []
        self.waited_s = 0.0  # for answers
        self._slowest: list[tuple[float, str]] = []
        self.neighbour: Neighbour | None = None

    @property
    def went_wrong(self) -> bool:
        """Whether there was a problem with any answer, or the neighbour noticed something."""
        return bool(self.failures) or self.neighbour is None or bool(self.neighbour.changed)

    def run(self, count: int, seed: int) -> None:
        """Send `count` requests of both kinds, and then one of each path that has to work."""
        self.neighbour = Neighbour(self._url, self.model, self._key)
        from_document = count // SCHEMA_SHARE
        run(from_schema(self.document, self.model), from_document, seed, self.send)
        run(from_bodies(self.document, self.model), count - from_document, seed, self.send)
        for path, body in good_bodies(self.model).items():
            answer = self._connection.send(Request("POST", path, json.dumps(body).encode()))
            if answer.status != 200:
                self.failures.append(f"afterwards {path} answers {answer.status}: {answer.body[:300]!r}")
        self.neighbour.finish()
        self._connection.close()

    def send(self, request: Request) -> None:
        """Send one request and note what is wrong with the answer."""
        start_s = time.monotonic()
        answer = self._connection.send(request)
        took_s = time.monotonic() - start_s
        self.waited_s += took_s
        self._slowest = sorted([*self._slowest, (round(took_s, 2), str(request)[:300])])[-5:]
        self.statuses[answer.status] += 1
        if self._show_progress and self.statuses.total() % 200 == 0:
            print(f"{self.statuses.total()} requests: {dict(self.statuses)}, {len(self.failures)} failures", flush=True)
        for problem in answer.problems(request):
            self.failures.append(f"{problem}\n  {request}\n  {answer.body[:300]!r}")

    def report(self) -> dict[str, Any]:
        """Figures, and the first failures."""
        neighbour = self.neighbour
        return {
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "waited_s": round(self.waited_s, 1),
            "slowest": self._slowest[::-1],
            "failures": len(self.failures),
            "examples": self.failures[:MAX_EXAMPLES],
            "neighbour_streams": 0 if neighbour is None else neighbour.streams,
            "neighbour_changed": [] if neighbour is None else neighbour.changed[:MAX_EXAMPLES],
            "neighbour_longest_gap_s": 0.0 if neighbour is None else round(neighbour.longest_gap_s, 3),
        }

    def _get(self, path: str) -> bytes:
        answer = self._connection.send(Request("GET", path, headers=()))
        assert answer.status == 200, f"GET {path}: {answer.status} {answer.body[:300]!r}"
        return answer.body
