"""Which router of an application gets a request."""

from __future__ import annotations

import contextlib

from cluster.gateway.pool import ASIDE_S, RouterPool

RUNNING = {name: ("127.0.0.1", 1000 + index) for index, name in enumerate("abc")}


def test_the_one_with_the_fewest_requests_is_chosen() -> None:
    pool = RouterPool(lambda: RUNNING)
    with contextlib.ExitStack() as requests:
        chosen = []
        for _ in range(6):
            endpoint = pool.pick()
            assert endpoint is not None
            chosen.append(endpoint.router_id)
            requests.enter_context(pool.request(endpoint))
        assert sorted(chosen) == ["a", "a", "b", "b", "c", "c"]
    assert pool.pick(without=("a", "b")) == pool.pick(without="ab")
    assert pool.pick(without="abc") is None


def test_one_that_gave_no_answer_is_asked_last_for_a_moment() -> None:
    now_s = 10.0
    running = dict(RUNNING)
    pool = RouterPool(lambda: running, clock=lambda: now_s)
    first = pool.pick()
    assert first is not None
    pool.set_aside(first)
    others = {each.router_id for each in (pool.pick(), pool.pick(without="b")) if each is not None}
    assert others == {"b", "c"}
    assert pool.pick(without="bc") == first, "rather than nobody"
    now_s += ASIDE_S
    assert pool.pick() == first


def test_routers_come_and_go() -> None:
    running = {"a": ("127.0.0.1", 1)}
    pool = RouterPool(lambda: running)
    endpoint = pool.pick()
    assert endpoint is not None
    with pool.request(endpoint):
        running.clear()
        assert pool.pick() is None
        running["b"] = ("10.0.0.1", 2)
        found = pool.pick()
        assert found is not None
        assert (found.router_id, found.host, found.port) == ("b", "10.0.0.1", 2)
