"""/expertmesh/trace: what several routers sampled, as one trace; and starting over."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

from cluster.config.apps import ConsoleAppConfig
from cluster.console.endpoints import Console
from cluster.router.messages import TraceSample
from placement.traces.recorder import TraceRecorder
from placement.traces.trace import ActivationTrace
from tests.support.waiting import run_async


def sample(num_tokens: int, expert: int) -> bytes:
    """What a router sends that saw so many tokens, all of them of one expert."""
    recorder = TraceRecorder(2, 8, 1, 100)
    recorder.add(np.full((num_tokens, 2, 1), expert))
    return recorder.snapshot().to_bytes()


class Routers:
    """Routers of one application with these samples."""

    def __init__(self, samples: dict[str, bytes | None]) -> None:
        self.samples = samples

    async def traces(self, reader: str, *, timeout_s: float) -> list[TraceSample]:
        return [TraceSample(name, npz) for name, npz in self.samples.items()]

    async def clear_traces(self, reader: str, end: bool, *, timeout_s: float) -> list[bool]:
        recording = [npz is not None for npz in self.samples.values()]
        self.samples = {name: None if npz is None else b"" for name, npz in self.samples.items()}
        return recording


def console(*applications: dict[str, bytes | None]) -> Console:
    routers: Any = [Routers(samples) for samples in applications]
    controller: Any = None
    return Console(ConsoleAppConfig(), controller, routers)


def fetch(console: Console, **query: str) -> Any:
    """The trace, or (status, message)."""
    response = run_async(console.trace(**query))
    if response.status_code != 200:
        return response.status_code, json.loads(response.body)["error"]["message"]
    return ActivationTrace.load_npz(io.BytesIO(bytes(response.body)))


def test_samples_of_all_routers_are_one_trace() -> None:
    several = console({"a": sample(10, expert=3), "idle": b"", "off": None}, {"b": sample(30, expert=5)})
    merged = fetch(several)
    np.testing.assert_array_equal(merged.counts[:, [3, 5]], [[10, 30], [10, 30]])
    np.testing.assert_array_equal(np.bincount(merged.topk_ids.ravel(), minlength=8)[[3, 5]], [20, 60])
    np.testing.assert_array_equal(fetch(several, router="a").topk_ids, np.full((10, 2, 1), 3))
    assert fetch(several, router="c") == (404, "no router is named 'c'; there are ['a', 'b', 'idle', 'off']")


def test_there_may_be_nothing_to_hand_out() -> None:
    nothing_yet = (404, "no tokens have been recorded yet: send requests first")
    assert fetch(console({"a": b"", "b": sample(3, 0)}), router="a") == nothing_yet
    assert fetch(console({})) == (503, "there is no router yet")
    assert run_async(console({}).clear_trace()).status_code == 503
    off = console({"a": None})
    assert fetch(off)[0] == run_async(off.clear_trace()).status_code == 404
    cleared = console({"a": sample(10, 3), "b": sample(30, 5)})
    assert run_async(cleared.clear_trace()).status_code == 204
    assert fetch(cleared) == nothing_yet
