"""What Ray's metrics agent is given of keys: growth by key, and nothing before one was used."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.keys.messages import Totals
from cluster.observability import key_metrics
from cluster.observability.key_metrics import KeyMetrics


class Agent:
    """Takes the place of ray.util.metrics; adds up and keeps what it is given by (name, tags)."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def Counter(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        return Series(self.values, name, tag_keys)

    Gauge = Counter


class Series:
    def __init__(self, values: dict[tuple[str, ...], float], name: str, tag_keys: tuple[str, ...]) -> None:
        self._values, self._name, self._tag_keys = values, name, tag_keys

    def inc(self, growth: float, tags: dict[str, str]) -> None:
        assert growth > 0, "Ray refuses anything else"
        place = self._place(tags)
        self._values[place] = self._values.get(place, 0) + growth

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._values[self._place(tags)] = value

    def _place(self, tags: dict[str, str]) -> tuple[str, ...]:
        assert set(tags) == set(self._tag_keys)
        return (self._name, *(tags[key] for key in self._tag_keys))


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    agent = Agent()
    monkeypatch.setattr(key_metrics, "ray_metrics", agent)
    return agent


def test_counters_grow_by_what_was_used_since_the_last_export(agent: Agent) -> None:
    metrics = KeyMetrics("mesh_", "r1")
    metrics.export({"team": Totals(2, 20, 8)}, True)
    metrics.export({"team": Totals(2, 20, 8)}, True)
    metrics.export({"team": Totals(5, 50, 9, refused=2), "new": Totals(1)}, False)
    assert agent.values == {
        ("mesh_key_requests", "r1", "team"): 5,
        ("mesh_key_prompt_tokens", "r1", "team"): 50,
        ("mesh_key_completion_tokens", "r1", "team"): 9,
        ("mesh_key_refused", "r1", "team"): 2,
        ("mesh_key_requests", "r1", "new"): 1,
        ("mesh_keys_current", "r1"): 0,
    }


def test_nothing_is_registered_where_no_key_is_used(agent: Agent) -> None:
    KeyMetrics("mesh_", "r1").export({}, True)
    assert agent.values == {}
