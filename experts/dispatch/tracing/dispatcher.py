"""A dispatcher that notes times of chosen layers of chosen steps. Without a step to trace it does what its base does.

Legend: T tokens, K top-k, R ranks, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.pending import Pending
from experts.dispatch.tracing.times import (
    T_BEGIN,
    T_COMBINED,
    T_POSTED,
    T_WAIT,
    T_WAITED,
    TIMES,
    ExchangeTimes,
    LayerTimes,
    StepTimes,
    choose_layers,
)
from experts.protocol.errors import MissingSlotError, ShardError
from experts.protocol.wire import H_COMPUTE_NS, header_of


class TracedDispatcher(Dispatcher):
    """`start_step` before the first layer of a step that is traced, `end_step` after its last."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step: StepTimes | None = None
        self._layer: LayerTimes | None = None  # between its begin and its finish
        self._exchange: ExchangeTimes | None = None
        self._traced = 0

    def start_step(self, traces: Mapping[str, Mapping[str, str]], layers_per_step: int) -> None:
        """Note the next step, which holds the requests `traces` ({id: W3C headers})."""
        wanted = choose_layers(self.shape.last_of_step + 1, layers_per_step, self._traced)
        self._traced += 1
        epoch = -1 if self.membership is None else self.membership.epoch
        self._step = StepTimes(traces, self.stats.steps, wanted, epoch)

    def end_step(self) -> StepTimes | None:
        """What was noted of the step; None if none was started."""
        step, self._step, self._layer, self._exchange = self._step, None, None, None
        if step is not None:
            step.end_ns = time.perf_counter_ns()
            if self.membership is not None:
                self.mover.time_into(None)
        return step

    def begin(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> Pending:
        """See `Dispatcher.begin`."""
        step = self._step
        if step is not None and self.membership is not None:
            step.num_tokens = len(topk_ids_TK)
            if layer in step.layers_wanted:
                self._layer = LayerTimes(layer, time.perf_counter_ns())
                step.layers.append(self._layer)
                step.transports |= {rank: link.transport for rank, link in self.links.items()}
        return super().begin(layer, x_TD, topk_weights_TK, topk_ids_TK)

    def finish(self, pending: Pending) -> torch.Tensor:
        """See `Dispatcher.finish`."""
        y_TD = super().finish(pending)
        if self._layer is not None:
            self._layer.end_ns = time.perf_counter_ns()
            self._layer = self._exchange = None
            self.mover.time_into(None)
        return y_TD

    def _post(self, pending: Pending) -> None:
        if self._layer is None:
            super()._post(pending)
            return
        words = np.zeros(TIMES + 2 * self.stats.num_ranks, np.int64)
        self.mover.time_into(words)
        start_ns = time.perf_counter_ns()
        lost = set(self.lost)
        super()._post(pending)
        if not words[T_POSTED]:
            words[T_BEGIN], words[T_POSTED] = start_ns, time.perf_counter_ns()
        plan = pending.plan
        self._exchange = ExchangeTimes(words, plan.rows_R.copy(), plan.pairs_R.copy())
        self._exchange.failed |= {rank: self.lost[rank] for rank in self.lost.keys() - lost}
        self._layer.exchanges.append(self._exchange)

    def _collect(self, pending: Pending, start_ns: int) -> None:
        super()._collect(pending, start_ns)
        exchange = self._exchange
        if exchange is not None and not exchange.words[T_COMBINED]:
            words = exchange.words
            words[T_WAIT], words[T_COMBINED] = start_ns, time.perf_counter_ns()
            words[T_WAITED] = max(start_ns, int(exchange.arrived_R.max(initial=0)))

    def _receive(self, rank: int, num_rows: int, deadline_s: float) -> int:
        exchange = self._exchange
        if exchange is None:
            return super()._receive(rank, num_rows, deadline_s)
        try:
            nbytes = super()._receive(rank, num_rows, deadline_s)
        except (ShardError, MissingSlotError) as error:
            exchange.failed[rank] = error.reason
            exchange.arrived_R[rank] = time.perf_counter_ns()
            raise
        exchange.arrived_R[rank] = time.perf_counter_ns()
        exchange.compute_R[rank] = header_of(self.links[rank].recv_buffer)[H_COMPUTE_NS]
        return nbytes

    def _compute_here(self, pending: Pending) -> None:
        start_ns = time.perf_counter_ns()
        super()._compute_here(pending)
        if self._layer is not None:
            self._layer.fallback_ns += time.perf_counter_ns() - start_ns
