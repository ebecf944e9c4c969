"""What a traced step notes: plain times, of which `spans` makes spans later.

Legend: R ranks. All times are in ns on time.perf_counter_ns().
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

# Words of one exchange, as native/router.h writes them: these, then for each rank when its answer came and how long its
# shard computed.
T_BEGIN, T_POSTED, T_WAIT, T_WAITED, T_COMBINED, TIMES = range(6)


@dataclass
class ExchangeTimes:
    """One message to each of some ranks, and their answers. A layer has more than one where it is large or repeats."""

    words: np.ndarray
    """int64 [TIMES + 2 R]; 0 for what did not happen."""
    rows_R: np.ndarray
    pairs_R: np.ndarray
    """Rows and pairs of each message."""
    failed: dict[int, str] = field(default_factory=dict)
    """Why a rank did not answer as it should."""

    @property
    def arrived_R(self) -> np.ndarray:
        """When each rank's answer was there; 0 if it never was."""
        return self.words[TIMES : TIMES + len(self.rows_R)]

    @property
    def compute_R(self) -> np.ndarray:
        """How long each shard says it computed, in ns; 0 if it does not say."""
        return self.words[TIMES + len(self.rows_R) :]


@dataclass
class LayerTimes:
    """One MoE layer from the router's side."""

    layer: int
    begin_ns: int
    end_ns: int = 0
    exchanges: list[ExchangeTimes] = field(default_factory=list)
    fallback_ns: int = 0
    """Time in which the router computed what no shard could."""


@dataclass
class StepTimes:
    """One step of the engine that holds requests whose trace is sampled."""

    traces: Mapping[str, Mapping[str, str]]
    """The W3C headers of those requests, by vLLM's id of each."""
    number: int
    """Of the step, counted by the router."""
    layers_wanted: frozenset[int]
    epoch: int
    num_tokens: int = 0
    layers: list[LayerTimes] = field(default_factory=list)
    transports: dict[int, str] = field(default_factory=dict)
    begin_ns: int = field(default_factory=time.perf_counter_ns)
    end_ns: int = 0
    clock_ns: int = field(default_factory=lambda: time.time_ns() - time.perf_counter_ns())
    """What to add to a time to get ns since 1970."""


def choose_layers(num_layers: int, wanted: int, turn: int) -> frozenset[int]:
    """`wanted` layers, evenly apart; which ones goes around with `turn`, so that every layer is seen in the end.

    >>> sorted(choose_layers(8, 2, 0)), sorted(choose_layers(8, 2, 1))
    ([0, 4], [1, 5])
    """
    if wanted >= num_layers:
        return frozenset(range(num_layers))
    return frozenset((turn + index * num_layers // max(wanted, 1)) % num_layers for index in range(wanted))
