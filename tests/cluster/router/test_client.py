"""Asking every router: slow, dying and missing ones hide no other's answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.http.health import GenerationHealth
from cluster.router.client import RouterClient, RouterLostError
from cluster.router.messages import TraceSample
from tests.support.router_handle import RouterHandle
from tests.support.serve.statuses import router_status
from tests.support.waiting import run_async

NO_ROUTER = DeploymentUnavailableError(DeploymentID("Router", "llm"))
A, B = router_status("a"), router_status("b")


def failed(cause: Exception) -> Exception:
    return RayTaskError("mesh_status", "a long\ntraceback", cause).as_instanceof_cause()


def run(coroutine: Any) -> Any:
    return run_async(asyncio.wait_for(coroutine, 30))


@pytest.mark.parametrize(
    ("replicas", "found", "errors"),
    [
        ([A, B], [A, B], []),
        ([], [], []),
        ([A, None], [A], ["a router did not answer mesh_status in 0.2 s"]),
        ([failed(KeyError("x")), B], [B], ["a router failed at mesh_status: KeyError: 'x'"]),
        ([failed(TimeoutError()), B], [B], ["a router did not answer mesh_status in 0.2 s"]),
        ([RuntimeError("one\ntwo")], [], ["a router failed at mesh_status: RuntimeError: one"]),
        (NO_ROUTER, [], ["no router is available"]),
        (TimeoutError(), [], ["no router is available"]),
    ],
)
def test_each_router_gives_an_answer_or_a_line(replicas: Any, found: list[Any], errors: list[str]) -> None:
    handle = RouterHandle(replicas)
    assert run(RouterClient(handle).statuses(timeout_s=0.2)) == (found, errors)  # type: ignore[arg-type]
    assert handle.asked == ["mesh_status"]


def test_the_prefill_pool_is_asked_while_others_say_that_there_are_pools() -> None:
    decode, prefill = RouterHandle([replace(A, pool="decode")]), RouterHandle([replace(B, pool="prefill")])
    client = RouterClient(decode, prefill)  # type: ignore[arg-type]
    found, errors = run(client.statuses(timeout_s=5))
    assert [(status.router_id, status.pool) for status in found] == [("a", "decode"), ("b", "prefill")]
    assert errors == []
    assert len(run(client.traces(timeout_s=5))) == 2
    assert len(run(client.keys(timeout_s=5))[0]) == 1, "prefill routers have no clients"
    assert prefill.asked == ["mesh_status", "mesh_trace"]
    plain, nobody = RouterHandle([A]), RouterHandle([B])
    assert run(RouterClient(plain, nobody).statuses(timeout_s=5)) == ([A], [])  # type: ignore[arg-type]
    assert len(run(RouterClient(plain, nobody).traces(timeout_s=5))) == 1  # type: ignore[arg-type]
    assert nobody.asked == []


def test_what_needs_every_router_raises_without_one() -> None:
    whole, broken = RouterHandle([TraceSample("a", b"1"), TraceSample("b", b"")]), RouterHandle([None, None])
    assert run(RouterClient(whole).traces(timeout_s=5)) == [TraceSample("a", b"1"), TraceSample("b", b"")]  # type: ignore[arg-type]
    with pytest.raises(RouterLostError, match=r"did not answer mesh_trace in 0\.1 s; a router did not"):
        run(RouterClient(broken).traces(timeout_s=0.1))  # type: ignore[arg-type]
    with pytest.raises(RouterLostError, match=r"did not answer mesh_clear_trace in 0\.1 s"):
        run(RouterClient(broken).clear_traces(timeout_s=0.1))  # type: ignore[arg-type]
    assert whole.asked + broken.asked == ["mesh_trace", "mesh_trace", "mesh_clear_trace"]


def test_health_is_asked_for_by_its_name() -> None:
    health = GenerationHealth(True, "a", "", "probe")
    handle = RouterHandle([health])
    assert run(RouterClient(handle).generation_health(timeout_s=5)) == ([health], [])  # type: ignore[arg-type]
    assert handle.asked == ["generation_health"]
