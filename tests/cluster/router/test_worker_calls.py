"""The calls through collective_rpc against the worker's methods, in one process."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.router.worker_calls import EngineSilentError, WorkerCalls
from experts.protocol.membership import AppliedMembership, Membership, ShardEndpoint
from placement.placement import Placement
from tests.support.serve.statuses import router_status
from tests.support.waiting import run_async

ENDPOINT = ShardEndpoint(0, "a", "127.0.0.1", 1000, "host", 1)
MEMBERSHIP = Membership(3, Placement.linear(1, 2, 2), (ENDPOINT, None))
APPLIED = AppliedMembership(3, [0], {1: "no shard has this rank yet"}, [])


class Client:
    """A MeshClient that notes what reaches it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.recorder = SimpleNamespace(to_bytes=lambda: b"npz", clear=lambda: self.calls.append(("clear",)))

    def connect_ahead(self, endpoints: Any) -> list[int]:
        self.calls.append(("connect_ahead", tuple(endpoints)))
        return [0]

    def apply_membership(self, membership: Membership, wait_s: float | None) -> AppliedMembership:
        self.calls.append(("apply_membership", membership, wait_s))
        return APPLIED

    def status(self) -> Any:
        return router_status(params=0, resident_bytes=0)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> tuple[WorkerCalls, Client]:
    """Calls that go through JSON, which is no kinder to data than what vLLM uses, to the worker's real methods."""
    worker_module = pytest.importorskip("experts.vllm_plugin.worker", reason="the plug-in needs vllm")
    client = Client()
    monkeypatch.setattr(worker_module, "current_client", lambda: client)
    monkeypatch.setattr(worker_module, "verify_model", lambda model: None)
    worker = worker_module.ExpertMeshWorker()
    parameter = SimpleNamespace(numel=lambda: 21)
    worker.model_runner = SimpleNamespace(get_model=lambda: SimpleNamespace(parameters=lambda: [parameter] * 2))

    async def collective_rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
        answer = getattr(worker, method)(*json.loads(json.dumps(args)))
        return [answer if isinstance(answer, bytes) else json.loads(json.dumps(answer))]

    return WorkerCalls(collective_rpc, 10.0), client


def run(coroutine: Any) -> Any:
    return run_async(asyncio.wait_for(coroutine, 30))


def test_both_ends_agree_on_what_travels(mesh: tuple[WorkerCalls, Client]) -> None:
    calls, client = mesh
    assert run(calls.connect_ahead(MEMBERSHIP.endpoints)) == [0]
    assert run(calls.apply_membership(MEMBERSHIP, 0.0, 0.0)) == APPLIED
    assert run(calls.apply_membership(MEMBERSHIP, None, 5.0)) == APPLIED
    run(calls.clear_trace())
    assert client.calls == [
        ("connect_ahead", (ENDPOINT, None)),
        ("apply_membership", MEMBERSHIP, 0.0),
        ("apply_membership", MEMBERSHIP, None),
        ("clear",),
    ]
    assert run(calls.trace()) == b"npz"
    status = run(calls.status())
    assert status.resident_bytes > 1 << 20
    assert status == router_status(params=42, resident_bytes=status.resident_bytes)


def test_a_worker_that_does_not_answer_is_not_waited_for() -> None:
    async def silent(method: str, args: tuple[Any, ...]) -> list[Any]:
        await asyncio.Event().wait()
        return []

    calls = WorkerCalls(silent, 0.05)
    with pytest.raises(EngineSilentError, match=r"did not answer expertmesh_connect_ahead in 0\.05 s"):
        run(calls.connect_ahead([None]))
    with pytest.raises(EngineSilentError, match=r"did not answer expertmesh_apply_membership in 0\.25 s"):
        run(calls.apply_membership(MEMBERSHIP, None, connect_s=0.2))
