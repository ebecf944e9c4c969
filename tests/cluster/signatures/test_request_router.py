"""Serve's end of the request router: what Serve tells it, and what it asks routers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.request_router import RequestRouter

from cluster.signatures.request_router import SignatureRouter
from tests.support.signature_scene import report_of, text_of_kind
from tests.support.waiting import asynchronous

DEPLOYMENT = DeploymentID("Router", "llm")


class Replica:
    """What a request router sees of a replica."""

    def __init__(self, name: str, stats: dict[str, Any] | None = None, length: int | None = 0) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.routing_stats = stats or {}
        self.length = length  # None: it does not answer
        self.asked = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.asked += 1
        if self.length is None:
            raise RuntimeError("gone")
        return self.length


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> SignatureRouter:
    """Without Serve's own bookkeeping of replicas, which wants a cluster."""
    made = SignatureRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    made.initialize_state(max_lead=2)

    def update(self: Any, replicas: list[Replica]) -> None:
        self._replicas = {replica.replica_id: replica for replica in replicas}

    monkeypatch.setattr(RequestRouter, "update_replicas", update)
    return made


def asking(body: dict[str, Any]) -> Any:
    return SimpleNamespace(args=[SimpleNamespace(**body)])


async def chosen(router: SignatureRouter, replicas: list[Replica], request: Any) -> str:
    [[replica]] = await router.choose_replicas(replicas, request)
    return str(replica.replica_id.unique_id)


@asynchronous
async def test_prompts_go_where_reports_say_and_by_load_where_that_is_too_uneven(
    router: SignatureRouter,
) -> None:
    router.initialize_state(max_lead=8)  # more than what may be on its way to one of them
    router._ask_every_s = 0.0  # the constant is not the class's own: Serve pickles it by value, with its globals
    stats = [report_of(1, [0, 1] * 20).to_stats(), report_of(1, [2, 3] * 20, seed=100).to_stats()]
    replicas = [Replica("a", stats[0]), Replica("b", stats[1])]
    router.update_replicas(replicas)
    for kind, home in ((0, "a"), (1, "a"), (2, "b"), (3, "b")):
        for body in ({"prompt": text_of_kind(kind, 70)}, {"messages": [{"content": text_of_kind(kind, 71)}]}):
            assert await chosen(router, replicas, asking(body)) == home
            await asyncio.gather(*router._asking)
    replicas[0].length = 50
    await chosen(router, replicas, None)
    await asyncio.gather(*router._asking)
    assert router._chooser.loads.of("a") >= 50
    assert await chosen(router, replicas, asking({"prompt": text_of_kind(0, 72)})) == "b"


@asynchronous
async def test_routers_are_asked_beside_the_choice_and_not_each_time(router: SignatureRouter) -> None:
    replicas = [Replica("a", length=3), Replica("b", length=None)]
    router.update_replicas(replicas)
    for _ in range(5):
        await chosen(router, replicas, None)
    await asyncio.gather(*router._asking)
    assert [replica.asked for replica in replicas] == [1, 1]
    loads = [router._chooser.loads.of(name) for name in "ab"]
    assert sum(loads) == 3 + 5, "what was sent just before may be on its way"
    assert abs(loads[0] - 3 - loads[1]) <= 1, "they were even as far as was known"


@asynchronous
async def test_a_lost_replica_is_forgotten_and_nobody_is_chosen_from_none(router: SignatureRouter) -> None:
    replicas = [Replica("a"), Replica("b")]
    router.update_replicas(replicas)
    router.on_replica_actor_died(replicas[0].replica_id)
    assert router._chooser._routers == ["b"]
    assert await router.choose_replicas([], None) == []
    for arg in (object(), {"prompt": "x"}, SimpleNamespace(prompt=[1, 2])):  # Serve's own proxy hands on HTTP requests
        assert await chosen(router, replicas[1:], SimpleNamespace(args=[arg])) == "b"
