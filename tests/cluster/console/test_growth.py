"""What routers counted becomes rates, shares and windows, through routers that come, go and begin anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.autoscaling.pulse import Pulse, TimeCounts
from cluster.console.growth import FIELDS, Growth, Loads, pairs_by_rank, point
from cluster.console.router_events import SAME_S, RouterEvents
from cluster.router.messages import RouterLive
from tests.support.serve.statuses import router_status


def live(name: str, tokens: int = 0, between_s: tuple[float, ...] = (), **changes: Any) -> RouterLive:
    counts = TimeCounts()
    counts.add(between_s)
    pulse = Pulse(True, tokens, 1, 0, 0.5, counts.counts, TimeCounts().counts)
    return RouterLive(
        router_status(name, **{"rows": 0, "fan_out_sum": 0, "shard_pairs": [0, 0], **changes}), pulse, None
    )


def by_field(growth: list[Growth], lives: list[RouterLive]) -> dict[str, float | None]:
    return dict(zip(FIELDS, point(1e9, growth, lives)[1:], strict=True))


def test_growth_is_of_routers_seen_before_each_over_its_own_time() -> None:
    before = {
        "a": (live("a", 100, rows=50, fan_out_sum=90, shard_pairs=[10, 10]), 10.0),
        "b": (live("b", 100), 8.0),
    }
    now = [
        live("a", 300, rows=150, fan_out_sum=390, shard_pairs=[40, 20], between_s=(0.02,)),
        live("b", 500),
        live("new", 10_000, rows=10_000, shard_pairs=[9, 9, 9]),
    ]
    growth = Growth.of(before, now, 12.0)
    assert growth.tokens_per_s == pytest.approx(200 / 2 + 400 / 4)
    shown = by_field([growth], now)
    assert shown["fan_out"] == 3.0
    assert pairs_by_rank([growth, growth]) == [60, 20, 0]
    assert shown["balancedness"] == pytest.approx(20 / 30, abs=1e-4), "of the ranks that had any"
    assert shown["between_p99_ms"] == pytest.approx(20, rel=0.1)
    assert shown["first_p99_ms"] is None, "no first token came"


def test_without_traffic_and_without_statistics_nothing_is_made_up() -> None:
    silent = live("a")
    off = RouterLive(silent.status, Pulse(counted=False), None)
    shown = by_field([Growth.of({"a": (off, 1.0)}, [off], 2.0)], [off])
    assert set(shown.values()) == {None}
    shown = by_field([Growth.of({"a": (silent, 1.0)}, [silent], 2.0)], [silent])
    assert (shown["tokens_per_s"], shown["running"], shown["fan_out"]) == (0.0, 1, None)


def told(since: float, counts: list[int], tokens: int = 1) -> dict[str, Any]:
    packed = np.array(counts, "<i8").tobytes()
    return {"since": since, "tokens": tokens, "layers": [0], "num_experts": len(counts), "counts": packed}


def test_loads_are_what_grew_in_the_window_over_all_routers() -> None:
    loads = Loads(window_s=10.0)
    loads.add({"a": told(1.0, [5, 5], 9)}, 0.0)
    assert loads.view() is None, "how long the first counts took is not known"
    loads.add({"a": told(1.0, [6, 8], 13), "b": told(2.0, [70, 70])}, 5.0)
    view = loads.view()
    assert view is not None
    assert (view["counts"], view["tokens"], view["seconds"]) == ([1, 3], 4, 5.0)
    loads.add({"a": told(1.0, [6, 9], 14), "b": told(2.0, [71, 74], 3)}, 10.0)
    view = loads.view()
    assert view is not None
    assert (view["counts"], view["tokens"], view["seconds"]) == ([2, 8], 7, 10.0)
    loads.add({"a": told(9.0, [3, 3], 3), "b": told(2.0, [71, 74], 3)}, 15.0)  # a began anew: since when, nobody knows
    view = loads.view()
    assert view is not None
    assert (view["counts"], view["seconds"]) == ([1, 5], 10.0), "the first stretch has left the window"


def test_several_routers_that_see_one_loss_are_one_event() -> None:
    events = RouterEvents()
    names = ["a", "b", "c"]
    well = {"connected": [0, 1], "lost": {}, "failovers": 0, "fallback_pairs": 0, "refused_requests": 0}
    events.note([router_status(name, **well) for name in names], 100.0)
    assert events.events == []
    ill = {**well, "connected": [0], "lost": {1: "reset {by peer}"}, "failovers": 2}
    events.note([router_status(name, **ill) for name in names[:2]], 101.0)
    events.note([router_status(name, **{**ill, "failovers": 5}) for name in names], 102.0)
    found = {event.kind: event for event in events.events}
    assert found.keys() == {"lost", "failover"}
    assert (found["lost"].routers, found["lost"].rank) == (("a", "b", "c"), 1)
    assert (found["lost"].at, found["lost"].text) == (101.0, "no link: reset {by peer}")
    assert found["failover"].text == "repeated 15 dispatches on other shards"
    number = events.number
    events.note([router_status(name, **{**ill, "failovers": 5}) for name in names], 103.0)
    assert events.number == number, "nothing new"
    later = 102.0 + 2 * SAME_S
    events.note([router_status(name, **{**well, "failovers": 6}) for name in names], later)
    assert [event.kind for event in events.events[2:]] == ["back", "failover"], "a pause ends an event"


def test_a_router_that_is_new_tells_its_losses_and_no_old_counters() -> None:
    events = RouterEvents()
    events.note([router_status("a", lost={0: "gone"}, failovers=9)], 1.0)
    assert [(event.kind, event.rank) for event in events.events] == [("lost", 0)]
