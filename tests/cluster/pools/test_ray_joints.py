"""The places where pools reach into Ray and Ray Serve LLM: a new version that moves one fails here, by name."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private import router
from ray.serve.handle import DeploymentHandle

from cluster.pools import ray_joints as joints


def test_handles_know_their_replicas() -> None:
    assert isinstance(inspect.getattr_static(DeploymentHandle, "is_initialized"), property)
    assert callable(DeploymentHandle.running_replicas_populated)
    assert "self._router.running_replicas_populated()" in inspect.getsource(DeploymentHandle.running_replicas_populated)
    for kind in (router.SingletonThreadRouter, router.CurrentLoopRouter):
        assert "self._asyncio_router" in inspect.getsource(kind)
    assert "self._active_request_router.curr_replicas" in inspect.getsource(router.AsyncioRouter)


@pytest.mark.parametrize(
    ("initialized", "populated", "replicas", "expected"),
    [(False, False, {}, True), (True, False, {}, True), (True, True, {}, False), (True, True, {"a": 1}, True)],
)
def test_nobody_is_asked_who_is_known_to_be_away(
    initialized: bool, populated: bool, replicas: dict[str, int], expected: bool
) -> None:
    inner = SimpleNamespace(_active_request_router=SimpleNamespace(curr_replicas=replicas))
    handle: Any = SimpleNamespace(
        is_initialized=initialized,
        running_replicas_populated=lambda: populated,
        _router=SimpleNamespace(_asyncio_router=inner),
    )
    assert joints.has_replicas(handle) is expected


def test_headers_reach_a_server() -> None:
    pytest.importorskip("ray.serve.llm", reason="ray.serve.llm needs vllm")
    request = joints.raw_request({"traceparent": "00-1-2-01"}).to_starlette_request()
    assert request.headers["traceparent"] == "00-1-2-01"
