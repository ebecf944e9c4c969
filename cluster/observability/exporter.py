"""Hands the series of this process to Ray's metrics agent, the one exporter: Serve's and vLLM's come from there too."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from ray.serve import metrics as serve_metrics

from cluster.observability.series import PREFIX, Series
from cluster.ray_joints import begin_at_zero

T = TypeVar("T")

EXPORT_S = 1.0  # between calls of `export`

logger = logging.getLogger("ray.serve")


class Exporter(Generic[T]):
    """The series of one Serve replica, whose tags Serve adds. Ray is told of one once it has a sample."""

    def __init__(self, series: Iterable[Series[T]]) -> None:
        self._series = tuple(series)
        self._metrics: dict[str, Any] = {}  # by name
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}  # told so far, by name and values of the labels

    def export(self, facts: T) -> None:
        """Hand over what `facts` say. Call it every EXPORT_S: the agent forgets a gauge that was not set for 20 s.

        What goes wrong is logged and harms nothing else.
        """
        try:
            self._export(facts)
        except Exception:
            logger.exception("series are missing from Ray's metrics agent")

    def _export(self, facts: T) -> None:
        for series in self._series:
            samples = series.samples(facts)
            if not samples and series.name not in self._metrics:
                continue
            if series.name not in self._metrics:
                kind = serve_metrics.Counter if series.kind == "counter" else serve_metrics.Gauge
                self._metrics[series.name] = kind(PREFIX + series.name, series.description, series.labels)
            for labels, value in samples.items():
                tags = dict(zip(series.labels, labels, strict=True))
                if series.kind == "gauge":
                    self._metrics[series.name].set(value, tags=tags)
                else:
                    self._grow((series.name, labels), value, tags)

    def _grow(self, place: tuple[str, tuple[str, ...]], total: float, tags: dict[str, str]) -> None:
        counter = self._metrics[place[0]]
        if place not in self._totals:
            begin_at_zero(counter, tags)  # so that rates see the first event
            self._totals[place] = 0.0
        # Ray's counters take growth, and none below zero: rows of a failed message are uncounted.
        if (growth := total - self._totals[place]) > 0:
            counter.inc(growth, tags=tags)
            self._totals[place] = total
