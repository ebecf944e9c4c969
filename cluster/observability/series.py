"""What a series is: its name, type and labels, and how its samples are read from what a process knows of itself.

Few series: labels are a shard's rank, the stage of a dispatch, the source of a copy, the name of a key; never an expert
or a layer. Ray's metrics agent adds those of Serve (application, deployment, replica) and of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

PREFIX = "expertmesh_"
RAY_PREFIX = "ray_"  # of everything that Ray's metrics agent exports

T = TypeVar("T")
Samples = Mapping[tuple[str, ...], float]  # by the values of the labels


@dataclass(frozen=True)
class Series(Generic[T]):
    """One series, or one for each set of values of `labels`."""

    name: str  # without prefixes; a counter gets _total from Ray's agent
    kind: Literal["counter", "gauge"]
    description: str
    samples: Callable[[T], Samples]
    labels: tuple[str, ...] = ()

    @property
    def exported_name(self) -> str:
        """As Prometheus has it after a scrape."""
        return RAY_PREFIX + PREFIX + self.name + ("_total" if self.kind == "counter" else "")


def counter(name: str, value: Callable[[T], float], description: str) -> Series[T]:
    """A total without labels."""
    return Series(name, "counter", description, lambda facts: {(): value(facts)})


def gauge(name: str, value: Callable[[T], float | None], description: str) -> Series[T]:
    """A value without labels; None: there is none now."""

    def samples(facts: T) -> Samples:
        now = value(facts)
        return {} if now is None else {(): float(now)}

    return Series(name, "gauge", description, samples)
