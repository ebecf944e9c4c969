"""The calls through collective_rpc against the worker's methods, in one process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cluster.router.worker_calls import EngineSilentError, WorkerCalls
from experts.protocol.membership import AppliedMembership, Membership, Preparation, ShardEndpoint
from experts.protocol.secret import MeshSecret
from placement.placement import Placement
from tests.support.serve.statuses import router_status
from tests.support.waiting import run_async

ENDPOINT = ShardEndpoint(0, "a", "127.0.0.1", 1000, "host", 1)
SECRET = MeshSecret.generate()
MEMBERSHIP = Membership(3, Placement.linear(1, 2, 2), (ENDPOINT, None))
PREPARATION = Preparation(3, False, [0], False, "")
APPLIED = AppliedMembership(3, [0], {1: "no shard has this rank yet"}, [])


class Client:
    """A MeshClient that notes what reaches it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.recorder = SimpleNamespace(
            to_bytes=lambda reader: b"npz",
            clear=lambda reader: self.calls.append(("clear",)),
            observation=lambda go_on: b"seen" if go_on is True else b"",
        )

    def prepare(self, told: bytes, connect_s: float | None) -> Preparation:
        self.calls.append(("prepare", told, connect_s))
        return PREPARATION

    def preparation(self) -> Preparation:
        return PREPARATION

    attached = True
    records = True

    def use_secret(self, secret: MeshSecret) -> None:
        self.calls.append(("secret", secret))

    def apply(self, epoch: int) -> AppliedMembership:
        self.calls.append(("apply", epoch))
        return APPLIED

    def status(self) -> Any:
        return router_status(params=0, resident_bytes=0)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> tuple[WorkerCalls, Client]:
    """Calls that go through msgpack, as vLLM's to its engine process do, to the worker's real methods."""
    worker_module = pytest.importorskip("experts.vllm_plugin.worker", reason="the plug-in needs vllm")
    client = Client()
    monkeypatch.setattr(worker_module, "current_client", lambda: client)
    monkeypatch.setattr(worker_module, "verify_model", lambda model: None)
    worker = worker_module.ExpertMeshWorker()
    parameter = SimpleNamespace(numel=lambda: 21)
    worker.model_runner = SimpleNamespace(get_model=lambda: SimpleNamespace(parameters=lambda: [parameter] * 2))

    async def collective_rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
        encoded = msgspec.msgpack.encode(args)
        answer = getattr(worker, method)(*msgspec.msgpack.decode(encoded))
        return [msgspec.msgpack.decode(msgspec.msgpack.encode(answer))]

    return WorkerCalls(collective_rpc, 10.0), client


def run(coroutine: Any) -> Any:
    return run_async(asyncio.wait_for(coroutine, 30))


def test_both_ends_agree_on_what_travels(mesh: tuple[WorkerCalls, Client]) -> None:
    calls, client = mesh
    run(calls.use_secret(SECRET))
    assert run(calls.prepare(MEMBERSHIP.to_bytes(), None)) == PREPARATION
    assert run(calls.preparation()) == PREPARATION
    assert run(calls.apply(3)) == APPLIED
    run(calls.clear_trace())
    assert client.calls == [
        ("secret", SECRET),
        ("prepare", MEMBERSHIP.to_bytes(), None),
        ("apply", 3),
        ("clear",),
    ]
    assert run(calls.trace()) == b"npz"
    assert [run(calls.observation(go_on)) for go_on in (True, False)] == [b"seen", b""]
    status = run(calls.status())
    assert status.resident_bytes > 1 << 20
    assert status == router_status(params=42, resident_bytes=status.resident_bytes)


def test_two_workers_answer_as_one_router() -> None:
    """What the first one records is the router's; all else is what `experts.protocol.merging` makes of both."""
    behind = Preparation(3, False, [1], False, "")
    answers = {
        "expertmesh_prepare_membership": [PREPARATION.to_dict(), behind.to_dict()],
        "expertmesh_apply_membership": [APPLIED.to_dict(), AppliedMembership(3, [], {0: "gone"}, []).to_dict()],
        "expertmesh_status": [router_status(bytes_sent=sent).to_dict() for sent in (1, 2)],
        "expertmesh_trace": [b"npz", b""],
        "expertmesh_observation": [b"seen", b""],
        "expertmesh_clear_trace": [None, None],
    }

    async def collective_rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
        return answers[method]

    calls = WorkerCalls(collective_rpc, 10.0)
    assert run(calls.prepare(b"", None)) == Preparation(3, False, [0, 1], False, "")
    assert run(calls.apply(3)).connected == []
    assert run(calls.status()).bytes_sent == 3
    assert (run(calls.trace()), run(calls.observation(True))) == (b"npz", b"seen")
    run(calls.clear_trace())


def test_calls_that_wait_end_with_the_engine_and_with_their_caller() -> None:
    """One of two callers is cancelled, and stays so."""

    async def both() -> list[Any]:
        asked = asyncio.Semaphore(0)

        async def silent(method: str, args: tuple[Any, ...]) -> list[Any]:
            asked.release()
            await asyncio.Event().wait()
            return []

        calls = WorkerCalls(silent, 60.0)
        waiting = [asyncio.create_task(calls.status()) for _ in range(2)]
        for _ in waiting:
            await asked.acquire()
        waiting[0].cancel()
        calls.engine_ended("EngineCore is dead")
        return await asyncio.gather(*waiting, return_exceptions=True)

    cancelled, ended = run(both())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(ended, EngineSilentError)
    assert str(ended) == "the engine's worker did not answer expertmesh_status: EngineCore is dead"


def test_a_worker_that_does_not_answer_is_not_waited_for() -> None:
    async def silent(method: str, args: tuple[Any, ...]) -> list[Any]:
        await asyncio.Event().wait()
        return []

    calls = WorkerCalls(silent, 0.05)
    with pytest.raises(EngineSilentError, match=r"did not answer expertmesh_preparation in 0\.05 s"):
        run(calls.preparation())
    with pytest.raises(EngineSilentError, match=r"did not answer expertmesh_apply_membership in 0\.05 s"):
        run(calls.apply(3))
