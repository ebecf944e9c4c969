"""The controller's memory of routers, at its edges."""

from __future__ import annotations

from cluster.mesh.known_routers import KnownRouters
from cluster.mesh.messages import RouterView


def test_routers_below_an_epoch_are_behind_while_they_are_heard() -> None:
    routers = KnownRouters()
    routers.note("there", 5, {}, 10.0)
    routers.note("late", 4, {}, 10.0)
    routers.note("silent", 4, {}, 9.0)
    assert routers.behind(5, 14.0, 5.0) == ["late"]
    assert routers.behind(5, 13.9, 5.0) == ["late", "silent"]
    assert routers.behind(4, 10.0, 5.0) == []
    routers.note("late", 5, {}, 14.0)
    assert routers.behind(5, 14.0, 5.0) == []


def test_only_the_last_poll_counts_and_silent_routers_are_forgotten() -> None:
    routers = KnownRouters()
    routers.note("a", 1, {2: "x"}, 0.0)
    routers.note("a", 3, {}, 1.0)
    routers.note("b", 2, {0: "y"}, 2.0)
    assert routers.views(4.0) == {"a": RouterView(3, {}, 3.0), "b": RouterView(2, {0: "y"}, 2.0)}
    routers.forget_silent(51.0, 50.0)
    assert list(routers.views(51.0)) == ["b"]
    routers.forget("b")
    routers.forget("b")
    assert routers.views(51.0) == {}


def test_the_lowest_epoch_is_of_those_that_are_heard() -> None:
    routers = KnownRouters()
    assert routers.lowest_epoch(0.0, 5.0) == float("inf"), "nobody has to move on"
    routers.note("new", -1, {}, 10.0)
    routers.note("late", 4, {}, 14.0)
    routers.note("there", 7, {}, 14.0)
    assert routers.lowest_epoch(14.9, 5.0) == -1
    assert routers.lowest_epoch(15.0, 5.0) == 4
    routers.forget("late")
    assert routers.lowest_epoch(15.0, 5.0) == 7
    assert routers.lowest_epoch(19.0, 5.0) == float("inf")
