"""What Ray's metrics agent is given: growth of counters, values of gauges, Serve's tags left to Serve."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.keys.messages import Totals
from cluster.observability import exporter
from cluster.observability.exporter import Exporter
from cluster.observability.key_series import KEY_SERIES, KeysView
from cluster.observability.router_series import ROUTER_SERIES
from cluster.observability.series import PREFIX, Series, gauge
from tests.support.serve.statuses import router_status


class RayMetric:
    """Takes the place of one of Serve's metrics; keeps what it was given, by the values of the tags."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.description, self.tag_keys = name, description, tag_keys
        self.given: dict[tuple[str, ...], list[float]] = {}

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses others"
        self._record(value, tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._record(value, tags)

    def _record(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys
        self.given.setdefault(tuple(tags.values()), []).append(value)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dict[str, RayMetric]:
    """Every metric made, by name without the prefix."""
    made: dict[str, RayMetric] = {}

    def make(*args: Any) -> RayMetric:
        metric = RayMetric(*args)
        name = metric.name.removeprefix(PREFIX)
        assert name not in made
        made[name] = metric
        return metric

    monkeypatch.setattr(exporter, "serve_metrics", SimpleNamespace(Counter=make, Gauge=make))
    return made


def test_counters_begin_at_zero_and_grow_and_gauges_are_set_each_time(agent: dict[str, RayMetric]) -> None:
    routers = Exporter(ROUTER_SERIES)
    first = router_status(pool="decode", prompts_handed_over=8)
    routers.export(first)
    routers.export(first)
    wait = first.stage_us.wait
    more = replace(wait, sum=wait.sum + 2e6, buckets=[*wait.buckets[:-1], wait.buckets[-1] + 5])
    routers.export(replace(first, steps=13, shard_rows=[30, 54], epoch=6, stage_us=replace(first.stage_us, wait=more)))
    assert agent.keys() == {series.name for series in ROUTER_SERIES}
    assert agent["steps"].given == {(): [0, 10, 3]}
    assert agent["sent_rows"].given == {("0",): [0, 30], ("1",): [0, 50, 4]}
    assert agent["prompts"].given == {("prefill",): [0, 8], ("decode",): [0]}
    assert agent["epoch"].given == {(): [4, 4, 6]}
    assert agent["dispatch_stage_seconds"].given["wait",] == [0, pytest.approx(10.000035), pytest.approx(2)]
    assert agent["dispatch_stages_within"].given["wait", "+Inf"] == [0, 4, 5]
    assert agent["dispatch_stages_within"].given["wait", "1e-05"] == [0, 1]
    assert all(metric.description for metric in agent.values())


def test_a_count_that_fell_is_not_told_again_until_it_exceeds_what_was(agent: dict[str, RayMetric]) -> None:
    """Rows of a failed message are uncounted, which a counter of Ray's cannot be told."""
    routers = Exporter(ROUTER_SERIES)
    for rows in ([30, 50], [30, 45], [30, 52]):
        routers.export(router_status(shard_rows=rows))
    assert agent["sent_rows"].given["1",] == [0, 50, 2]


def test_a_key_that_comes_later_begins_at_zero_too(agent: dict[str, RayMetric]) -> None:
    keys = Exporter(KEY_SERIES)
    keys.export(KeysView({"team": Totals(2, 20, 8)}, True))
    keys.export(KeysView({"team": Totals(5, 50, 8), "new": Totals(1)}, False))
    assert agent["key_requests"].given == {("team",): [0, 2, 3], ("new",): [0, 1]}
    assert agent["key_completion_tokens"].given == {("team",): [0, 8], ("new",): [0]}
    assert agent["keys_current"].given == {(): [1, 0]}


def test_what_has_no_sample_is_not_registered(agent: dict[str, RayMetric]) -> None:
    Exporter(KEY_SERIES[:-1]).export(KeysView({}, True))
    assert agent == {}


def test_a_value_that_is_no_more_is_not_set_again(agent: dict[str, RayMetric]) -> None:
    """The agent forgets it."""
    values = Exporter([gauge("drift", lambda value: value, "d")])
    for value in (0.5, None, 0.25):
        values.export(value)
    assert agent["drift"].given == {(): [0.5, 0.25]}


def test_what_goes_wrong_is_logged_and_harms_nothing_else(
    agent: dict[str, RayMetric], caplog: pytest.LogCaptureFixture
) -> None:
    broken: Series[int] = gauge("broken", lambda value: 1 / value, "d")
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        Exporter([broken]).export(0)
    assert "series are missing" in caplog.text
