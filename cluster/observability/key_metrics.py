"""What keys have used, as Prometheus series by key: through Ray's metrics agent and as plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from ray.util import metrics as ray_metrics

from cluster.keys.messages import Totals

KEYS_CURRENT = "keys_current", "1 if the keys in use are those of http.keys_file as it is now"


@dataclass(frozen=True)
class KeySeries:
    """One counter for each key."""

    name: str  # without prefix; a counter gets _total
    value: Callable[[Totals], int]
    description: str


KEY_COUNTERS = (
    KeySeries("key_requests", lambda t: t.requests, "Requests of the key that were let in"),
    KeySeries("key_refused", lambda t: t.refused, "Requests of the key over a limit, or for a model it may not use"),
    KeySeries("key_prompt_tokens", lambda t: t.prompt_tokens, "Prompt tokens of the key's requests"),
    KeySeries("key_completion_tokens", lambda t: t.completion_tokens, "Tokens generated for the key"),
)


@dataclass(frozen=True)
class KeysView:
    """What a scrape shows of keys."""

    usage: Mapping[str, Totals]  # by key, of all routers
    current: Mapping[str, bool]  # by router: whether the keys in use are those of the file


def key_families(prefix: str, view: KeysView) -> Iterator[Any]:
    """All series of keys."""
    for series in KEY_COUNTERS:
        family = CounterMetricFamily(prefix + series.name, series.description, labels=["key"])
        for name, totals in sorted(view.usage.items()):
            family.add_metric([name], series.value(totals))
        yield family
    current = GaugeMetricFamily(prefix + KEYS_CURRENT[0], KEYS_CURRENT[1], labels=["router"])
    for router, is_current in view.current.items():
        current.add_metric([router], float(is_current))
    yield current


class KeyMetrics:
    """The same for clusters whose Prometheus scrapes Ray. Nothing is registered before a key was used."""

    def __init__(self, prefix: str, router_id: str) -> None:
        self._prefix, self._tags = prefix, {"router": router_id}
        self._exported: dict[str, Totals] = {}
        self._counters: list[tuple[KeySeries, Any]] = []
        self._current: Any = None

    def export(self, usage: Mapping[str, Totals], current: bool) -> None:
        """Hand over what was counted since the last call: Ray's counters take growth, not totals."""
        if not usage:
            return
        if not self._counters:
            self._register()
        for name, totals in usage.items():
            before = self._exported.get(name, Totals())
            for series, counter in self._counters:
                if (growth := series.value(totals) - series.value(before)) > 0:
                    counter.inc(growth, tags={**self._tags, "key": name})
            self._exported[name] = totals
        self._current.set(float(current), tags=self._tags)

    def _register(self) -> None:
        tags = ("router", "key")
        self._counters = [
            (series, ray_metrics.Counter(self._prefix + series.name, series.description, tag_keys=tags))
            for series in KEY_COUNTERS
        ]
        name, description = KEYS_CURRENT
        self._current = ray_metrics.Gauge(self._prefix + name, description, tag_keys=("router",))
