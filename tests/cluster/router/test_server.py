"""A router's own deadlines and its start, over an engine that is made up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.waiting import run_async, within

router = pytest.importorskip("cluster.router.server", reason="ray.serve.llm needs vllm")

ENDPOINT = {"incarnation": "i"}


class Server(router.ExpertMeshLLMServer):
    """A router whose worker gives the answers of `answers`, and none to anything else."""

    def __init__(self, answers: dict[str, Any], apply_s: float = 10.0) -> None:
        self._mesh = SimpleNamespace(deadlines=SimpleNamespace(apply_s=apply_s, connect_s=0.0, membership_s=10.0))
        self._identity = SimpleNamespace(replica_id="r1")
        self._metrics = SimpleNamespace(export=lambda _: None)
        self._status: dict[str, Any] = {}
        self._reading = None
        self._term = "t"
        self._missed_readings = 0
        self._loops = []
        self.answers = answers
        self.calls = 0
        self.asked: Callable[[int], Any] = lambda count: None
        self.membership = {"epoch": 3, "endpoints": [ENDPOINT, ENDPOINT, None]}

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = (), kwargs: Any = None):
        self.calls += 1
        self.asked(self.calls)
        if method not in self.answers:
            await asyncio.Event().wait()  # as vLLM's engines: a timeout is not theirs to keep
        return [self.answers[method]]

    async def _first_membership(self, timeout_s: float) -> dict[str, Any]:
        return {"term": "t", "membership": self.membership}

    async def _follow(self) -> None:
        await asyncio.Event().wait()

    def __del__(self) -> None:
        """There is no engine to end."""


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_: Any) -> None:
        return None

    monkeypatch.setattr(router.LLMServer, "start", nothing)
    monkeypatch.setattr(router.LLMServer, "check_health", nothing)


def run(coroutine: Any) -> Any:
    return run_async(coroutine)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda server: server.mesh_status(), "expertmesh_status in 0.05 s"),
        (lambda server: server.mesh_trace(), "expertmesh_trace"),
        (lambda server: server.mesh_clear_trace(), "expertmesh_clear_trace"),
        (lambda server: server.start(), "expertmesh_apply_membership"),
        (lambda server: server._connect_ahead(server.membership), "expertmesh_connect_ahead"),
    ],
)
def test_a_worker_that_does_not_answer_is_not_waited_for(call: Any, named: str) -> None:
    with pytest.raises(router.EngineSilentError, match=named):
        run(call(Server({}, apply_s=0.05)))


def test_any_number_of_callers_at_one_time_cost_the_engine_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """/metrics and the status are asked for without limit, and each reading comes between two steps."""
    monkeypatch.setattr(router, "unfinished_requests", lambda server: 0)
    server = Server({"expertmesh_status": {"epoch": 3}})

    async def ask() -> None:
        answers = await asyncio.gather(*(server.mesh_status() for _ in range(50)))
        assert [answer["epoch"] for answer in answers] == [3] * 50
        assert server.calls == 1
        server.answers = {"expertmesh_status": {"epoch": 4}}
        assert (await server.mesh_status())["epoch"] == 4, "an answer is not kept for later"

    run(ask())


def test_a_router_whose_engine_stays_silent_is_unhealthy_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "WATCH_S", 0.01)

    async def check() -> None:
        server = Server({}, apply_s=0.02)
        answered, asked_again = asyncio.Event(), asyncio.Event()
        server._metrics = SimpleNamespace(export=lambda _: answered.set())
        server.asked = lambda count: count > router.MAX_MISSED_READINGS and asked_again.set()
        await server.check_health()
        watch = asyncio.create_task(server._watch())
        try:
            await within(asked_again.wait(), "one reading more than may be missed")
            with pytest.raises(router.EngineSilentError, match="answered none of"):
                await server.check_health()
            server.answers["expertmesh_status"] = {"lost": {}}
            await within(answered.wait(), "the counters to be exported")
            await server.check_health()
        finally:
            watch.cancel()

    run(check())


@pytest.mark.parametrize(
    ("connected", "refused", "starts"),
    [
        ([], [0, 1], False),  # rank 2 is away
        ([], [0], True),  # rank 1 did not answer
        ([], [], True),
        ([0], [1], True),
    ],
)
def test_a_router_that_all_shards_refuse_does_not_start(connected: list[int], refused: list[int], starts: bool) -> None:
    lost = {str(rank): "router r1 has dtype float32, this shard has bfloat16" for rank in range(3)}
    applied = {"connected": connected, "lost": lost, "refused": refused}
    server = Server({"expertmesh_apply_membership": applied, "expertmesh_status": {}})
    if starts:
        run(server.start())
    else:
        with pytest.raises(RuntimeError, match="no shard takes this router: router r1 has dtype float32, this shard"):
            run(server.start())
