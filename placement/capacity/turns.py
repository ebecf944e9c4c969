"""How long routers wait for each other at the shards: the data plane's own rule, played through.

I routers, L layers, R ranks.

Routers are not in lockstep. A shard takes the requests that wait for one layer, that of the next router in turn, and
computes them in one call, so experts that several of them want are read once. The rest waits. Whether requests meet
depends on when routers come, so it is simulated: every router goes through its layers, again and again.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from placement.capacity.hardware import Constants, ModelShape

MAX_MERGED_ROWS = 256  # as shards have it (experts/shard/compiled.py)


class Visit(NamedTuple):
    """What a router sends a rank in a layer; `experts` has a bit for each expert that it wants there.

    `copy_s`: what the call waits for experts that are not in the shard's memory.
    """

    rank: int
    rows: int
    pairs: int
    experts: int
    copy_s: float = 0.0


@dataclass(frozen=True)
class Turn:
    """A router's layer: seconds before its requests arrive, its visits, and seconds after the last answer leaves."""

    before_s: float
    visits: tuple[Visit, ...]
    after_s: float


def call_seconds(
    rows: int, pairs: int, activated: int, model: ModelShape, constants: Constants, speed: float = 1.0
) -> float:
    """Seconds of one call on a shard."""
    weights_s = activated * (model.expert_bytes / constants.memory_bytes_per_s)
    flops_s = pairs * (model.pair_flops / constants.flops_per_s)
    hidden_s = constants.overlap * min(weights_s, flops_s)
    return (weights_s + flops_s - hidden_s) / speed + constants.call_s + constants.row_s * rows


def layer_seconds(
    turns_IL: Sequence[Sequence[Turn]],
    model: ModelShape,
    constants: Constants,
    speed_R: np.ndarray,
    *,
    max_merged_rows: int = MAX_MERGED_ROWS,
    rounds: int = 2,
    seed: int = 0,
) -> np.ndarray:
    """float64 [I, L]: seconds of each layer of each router, averaged over `rounds` after one round that is not counted.

    Routers start at random layers and go on until all have done their rounds. The rows of a call are at most
    `max_merged_rows`, or those of one request.
    """
    play = _Play(turns_IL, model, constants, speed_R.tolist(), max_merged_rows, rounds, seed)
    return play.run()


@dataclass
class _Shard:
    speed: float
    waiting: dict[int, Visit] = field(default_factory=dict)  # by router
    next_router: int = 0
    busy: bool = False


class _Play:
    """Events in order of time: requests of a router arrive, a call ends, a router has all of its answers."""

    def __init__(
        self,
        turns_IL: Sequence[Sequence[Turn]],
        model: ModelShape,
        constants: Constants,
        speeds: list[float],
        max_merged_rows: int,
        rounds: int,
        seed: int,
    ) -> None:
        self._turns_IL, self._model, self._constants = turns_IL, model, constants
        self._max_merged_rows, self._rounds = max_merged_rows, rounds
        self._num_routers, self._num_layers = len(turns_IL), len(turns_IL[0])
        self._shards = [_Shard(speed) for speed in speeds]
        self._layer_I = np.random.default_rng(seed).integers(self._num_layers, size=self._num_routers).tolist()
        self._done_I, self._begun_I = [0] * self._num_routers, [0.0] * self._num_routers
        self._missing_I = [0] * self._num_routers
        self._spent_IL, self._times_IL = np.zeros((2, self._num_routers, self._num_layers))
        self._events: list[tuple[float, int, Callable[..., None], tuple[int, ...]]] = []
        self._order = itertools.count()  # events of one time happen in the order in which they were made

    def run(self) -> np.ndarray:
        """See `layer_seconds`."""
        for router in range(self._num_routers):
            self._begin(router, 0.0)
        while self._events:
            now_s, _, happens, about = heapq.heappop(self._events)
            happens(now_s, *about)
        return self._spent_IL / self._times_IL

    def _at(self, when_s: float, happens: Callable[..., None], *about: int) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), happens, about))

    def _turn(self, router: int) -> Turn:
        return self._turns_IL[router][self._layer_I[router]]

    def _begin(self, router: int, now_s: float) -> None:
        turn = self._turn(router)
        self._begun_I[router], self._missing_I[router] = now_s, len(turn.visits)
        if turn.visits:
            self._at(now_s + turn.before_s, self._arrive, router)
        else:
            self._at(now_s + turn.before_s + turn.after_s, self._end, router)

    def _arrive(self, now_s: float, router: int) -> None:
        for visit in self._turn(router).visits:
            self._shards[visit.rank].waiting[router] = visit
        for visit in self._turn(router).visits:
            self._serve(now_s, visit.rank)

    def _serve(self, now_s: float, rank: int) -> None:
        """Begin a call, if the shard is idle: the next router's request, and all others for the same layer."""
        shard = self._shards[rank]
        if shard.busy or not shard.waiting:
            return
        in_turn = sorted(shard.waiting, key=lambda router: (router - shard.next_router) % self._num_routers)
        layer, rows, pairs, experts, copy_s = self._layer_I[in_turn[0]], 0, 0, 0, 0.0
        taken: list[int] = []
        for router in in_turn:
            visit = shard.waiting[router]
            if self._layer_I[router] != layer or (taken and rows + visit.rows > self._max_merged_rows):
                continue
            rows, pairs, experts = rows + visit.rows, pairs + visit.pairs, experts | visit.experts
            copy_s += visit.copy_s
            taken.append(router)
            del shard.waiting[router]
        shard.next_router, shard.busy = (taken[0] + 1) % self._num_routers, True
        call_s = copy_s
        call_s += call_seconds(rows, pairs, experts.bit_count(), self._model, self._constants, shard.speed)
        self._at(now_s + call_s, self._answer, rank, *taken)

    def _answer(self, now_s: float, rank: int, *routers: int) -> None:
        self._shards[rank].busy = False
        for router in routers:
            self._missing_I[router] -= 1
            if not self._missing_I[router]:
                self._at(now_s + self._turn(router).after_s, self._end, router)
        self._serve(now_s, rank)

    def _end(self, now_s: float, router: int) -> None:
        layer, goal = self._layer_I[router], self._num_layers * (1 + self._rounds)
        if min(self._done_I) >= goal:  # the rest is quicker than a step among others
            return
        if self._done_I[router] >= self._num_layers:
            self._spent_IL[router, layer] += now_s - self._begun_I[router]
            self._times_IL[router, layer] += 1
        self._done_I[router] += 1
        self._layer_I[router] = (layer + 1) % self._num_layers
        if min(self._done_I) < goal:
            self._begin(router, now_s)
