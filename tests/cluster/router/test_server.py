"""A router's start and what it answers, over an engine that is made up."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from cluster.keys.command import line_of
from cluster.keys.keyring import Keyring
from cluster.keys.leases import Leases, RouterKeys
from cluster.keys.messages import Totals
from cluster.keys.sources import LOOK_EVERY_S, KeySource
from cluster.mesh.messages import MembershipAnswer
from cluster.router.messages import TraceSample
from cluster.router.worker_calls import EngineSilentError
from experts.protocol.membership import AppliedMembership, Membership, Preparation, ShardEndpoint
from experts.protocol.secret import MeshSecret
from placement.placement import Placement
from tests.support.serve.statuses import router_status
from tests.support.waiting import run_async

router = pytest.importorskip("cluster.router.server", reason="ray.serve.llm needs vllm")

MEMBERSHIP = Membership(
    3,
    Placement.linear(1, 3, 3),
    (*(ShardEndpoint(rank, f"i{rank}", "127.0.0.1", 1000, "host", 1) for rank in range(2)), None),
)
REFUSAL = "router r1 has dtype float32, this shard has bfloat16"


class Controller:
    """Has one membership to give, then nothing more."""

    def __init__(self) -> None:
        self.deregistered: list[str] = []
        self.polls = 0

    async def await_membership(self, request: Any, timeout_s: float) -> MembershipAnswer:
        self.polls += 1
        if self.polls > 1:
            await asyncio.Event().wait()
        return MembershipAnswer("t", MEMBERSHIP, [])

    async def mesh_secret(self, held: MeshSecret | None, *, timeout_s: float) -> MeshSecret:
        return held or MeshSecret.generate()

    async def deregister_router(self, router_id: str, timeout_s: float) -> None:
        self.deregistered.append(router_id)


class Server(router.ExpertMeshLLMServer):
    """A router whose worker gives the answers of `answers`, and none to anything else."""

    def __init__(self, answers: dict[str, Any], apply_s: float = 10.0, trace_tokens: int = 9) -> None:
        deadlines = SimpleNamespace(apply_s=apply_s, connect_s=0.0, membership_s=10.0, probe_s=10.0)
        mesh: Any = SimpleNamespace(
            deadlines=deadlines,
            http=SimpleNamespace(healthy_within_s=10.0),
            model=SimpleNamespace(id="m"),
            routers=SimpleNamespace(trace_tokens=trace_tokens, tracing=None, expert_signatures=None),
            lora_config=None,
        )
        self.controller: Any = Controller()
        self._set_up(mesh, "r1", self.controller)
        self._metrics = SimpleNamespace(export=lambda _: None)
        self.answers = {"expertmesh_use_secret": None, **answers}
        self.calls: list[tuple[Any, ...]] = []

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = (), kwargs: Any = None):
        self.calls.append((method, *args))
        if method not in self.answers:
            await asyncio.Event().wait()  # as vLLM's engines: a timeout is not theirs to keep
        return [self.answers[method]]

    def __del__(self) -> None:
        """There is no engine to end."""


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_: Any) -> None:
        return None

    monkeypatch.setattr(router.LLMServer, "start", nothing)
    monkeypatch.setattr(router.LLMServer, "check_health", nothing)
    monkeypatch.setattr(router, "unfinished_requests", lambda server: 5)
    monkeypatch.setattr(router, "follow_engine", lambda server, measure: True)


def run(coroutine: Any) -> Any:
    return run_async(coroutine)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda server: server.mesh_status(), r"expertmesh_status in 0\.05 s"),
        (lambda server: server.mesh_trace(), "expertmesh_trace"),
        (lambda server: server.mesh_clear_trace(), "expertmesh_clear_trace"),
        (lambda server: server.start(), "expertmesh_prepare_membership"),
    ],
)
def test_a_worker_that_does_not_answer_is_not_waited_for(call: Callable[[Server], Awaitable[Any]], named: str) -> None:
    with pytest.raises(EngineSilentError, match=named):
        run(call(Server({}, apply_s=0.05)))


def test_the_status_is_the_workers_and_what_the_replica_knows() -> None:
    worker = router_status("r1", term="", pid=0, unfinished_requests=0).to_dict()
    server = Server({"expertmesh_status": worker})
    server._epochs.term = "life"
    expected = router_status("r1", term="life", pid=os.getpid(), unfinished_requests=5)
    assert run(server.mesh_status()) == expected


def test_a_router_tells_what_keys_have_used_and_whether_their_list_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, now_s, used = tmp_path / "keys.yaml", [100.0], Totals(1, 2, 3)
    file.write_text(line_of("sk-team", name="team"))

    def front_door(app: FastAPI, *, leases: Leases, **_: Any) -> FastAPI:
        app.state.expertmesh_keys = KeySource(Keyring(), file, clock=lambda: now_s[0])
        leases.count("team", used)
        return app

    async def vllms_app(_: Any) -> FastAPI:
        return FastAPI()

    monkeypatch.setattr(router.LLMServer, "__serve_build_asgi_app__", vllms_app)
    monkeypatch.setattr(router, "front_door", front_door)
    server = Server({})
    assert run(server.mesh_keys()) == RouterKeys("r1", {}, "nothing", ""), "no HTTP side yet"
    run(server.__serve_build_asgi_app__())
    assert run(server.mesh_keys()) == RouterKeys("r1", {"team": used}, "nothing", "")
    file.unlink()
    now_s[0] += LOOK_EVERY_S
    problem = run(server.mesh_keys()).problem
    assert problem.startswith(f"http.keys_file {file} cannot be read")


def test_a_trace_bears_the_routers_name_and_clearing_reaches_the_worker() -> None:
    server = Server({"expertmesh_trace": b"npz", "expertmesh_clear_trace": None})
    assert run(server.mesh_trace()) == TraceSample("r1", b"npz")
    assert run(server.mesh_clear_trace("mine")) is True
    assert server.calls == [("expertmesh_trace", ""), ("expertmesh_clear_trace", "mine")]


def test_a_router_that_records_nothing_says_so() -> None:
    server = Server({}, trace_tokens=0)
    assert run(server.mesh_trace()) == TraceSample("r1", None)
    assert run(server.mesh_clear_trace()) is False
    assert server.calls == []


@pytest.mark.parametrize(
    ("connected", "refused", "starts"),
    [
        ([], [0, 1], False),  # rank 2 is away
        ([], [0], False),  # rank 1 did not answer
        ([], [], True),
        ([0], [1], True),
    ],
)
def test_a_router_that_no_shard_takes_does_not_start(connected: list[int], refused: list[int], starts: bool) -> None:
    applied = AppliedMembership(3, connected, dict.fromkeys(range(3), REFUSAL), refused)
    server = Server(
        {
            "expertmesh_prepare_membership": Preparation(MEMBERSHIP.epoch, True, [], False, "").to_dict(),
            "expertmesh_apply_membership": applied.to_dict(),
            "expertmesh_status": router_status().to_dict(),
        }
    )

    async def start() -> None:
        await server.start()
        await server.check_health()
        assert [task.get_name() for task in server._loops] == ["follow", "watch", "scaling", "observe"]
        assert server.calls[0][0] == "expertmesh_use_secret"
        assert server.calls[1:3] == [
            ("expertmesh_prepare_membership", MEMBERSHIP.to_bytes(), None),
            ("expertmesh_apply_membership", MEMBERSHIP.epoch),
        ]
        for task in server._loops:
            task.cancel()

    if starts:
        run(start())
    else:
        with pytest.raises(RuntimeError, match="no shard takes this router: router r1 has dtype float32, this shard"):
            run(server.start())


def test_a_router_whose_loop_ended_is_unhealthy() -> None:
    async def check() -> None:
        server = Server({})

        async def fails() -> None:
            raise KeyError("epoch")

        server._loops = [asyncio.create_task(fails(), name="follow")]
        await asyncio.wait(server._loops)
        with pytest.raises(RuntimeError, match=r"follow of this router ended: KeyError\('epoch'\)"):
            await server.check_health()

    run(check())


def test_a_router_that_closes_ends_its_loops_and_tells_the_controller_and_the_engine() -> None:
    async def check() -> None:
        server = Server({})
        ended: list[str] = []

        async def shutdown() -> None:
            ended.append("engine")

        server.engine = SimpleNamespace(shutdown=shutdown)
        server._loops = [asyncio.create_task(asyncio.sleep(60))]
        await server.close()
        await asyncio.wait(server._loops)
        assert server._loops[0].cancelled()
        assert (server.controller.deregistered, ended) == (["r1"], ["engine"])

    run(check())
