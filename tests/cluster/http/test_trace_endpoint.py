"""/expertmesh/trace: what several routers sampled, as one trace; and beginning anew."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from placement.traces.recorder import TraceRecorder
from placement.traces.trace import ActivationTrace
from tests.support.waiting import run_async

ingress = pytest.importorskip("cluster.http.api", reason="ray.serve.llm needs vllm")


def sample(num_tokens: int, expert: int) -> bytes:
    """What a router sends that saw so many tokens, all of them of one expert."""
    recorder = TraceRecorder(2, 8, 1, 100)
    recorder.add(np.full((num_tokens, 2, 1), expert))
    return recorder.snapshot().to_bytes()


class Ingress(ingress.ExpertMeshIngress):
    """The ingress of made-up routers."""

    def __init__(self, samples: dict[str, bytes], trace_tokens: int = 100) -> None:
        self._mesh = SimpleNamespace(
            routers=SimpleNamespace(trace_tokens=trace_tokens),
            deadlines=SimpleNamespace(apply_s=1.0),
            http=SimpleNamespace(retry_after_s=3),
        )
        self.samples = samples

    async def _ask_routers(self, method: str, timeout_s: float) -> list[Any]:
        if method == "mesh_clear_trace":
            self.samples = dict.fromkeys(self.samples, b"")
            return [None] * len(self.samples)
        assert method == "mesh_trace"
        return list(self.samples.items())


def fetch(ingress: Ingress, **query: str) -> Any:
    """The trace, or (status, message)."""
    response = run_async(ingress.mesh_trace(**query))
    if response.status_code != 200:
        return response.status_code, json.loads(response.body)["error"]["message"]
    return ActivationTrace.load_npz(io.BytesIO(response.body))


def test_samples_of_all_routers_are_one_trace() -> None:
    several = Ingress({"a": sample(10, expert=3), "b": sample(30, expert=5), "idle": b""})
    merged = fetch(several)
    np.testing.assert_array_equal(merged.counts[:, [3, 5]], [[10, 30], [10, 30]])
    np.testing.assert_array_equal(np.bincount(merged.topk_ids.ravel(), minlength=8)[[3, 5]], [20, 60])
    np.testing.assert_array_equal(fetch(several, router="a").topk_ids, np.full((10, 2, 1), 3))
    assert fetch(several, router="c") == (404, "no router is named 'c'; there are ['a', 'b', 'idle']")


def test_there_may_be_nothing_to_hand_out() -> None:
    nothing_yet = (404, "no tokens have been recorded yet: send requests first")
    assert fetch(Ingress({"a": b"", "b": sample(3, 0)}), router="a") == nothing_yet
    assert fetch(Ingress({})) == (503, "there is no router yet")
    off = Ingress({"a": b""}, trace_tokens=0)
    assert fetch(off)[0] == run_async(off.mesh_clear_trace()).status_code == 404
    cleared = Ingress({"a": sample(10, 3), "b": sample(30, 5)})
    assert run_async(cleared.mesh_clear_trace()).status_code == 204
    assert fetch(cleared) == nothing_yet
