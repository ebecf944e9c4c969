"""Spans of traced steps, made in a thread of their own so that no step waits for them.

    POST /v1/completions                (the router's HTTP side; the parent that the request's headers name)
      llm_request                       (vLLM)
      step                              one span for each sampled request that the step holds
        moe layer 3                     under the first request's alone: the others' are linked to it
          shard 0, shard 1, ...         from the message to the answer

The provider (exporter, sampler, resource) is the process's own, which vLLM sets up. Legend: R ranks.
"""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import threading
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.sdk.trace import IdGenerator
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from experts.dispatch.tracing.times import (
    T_BEGIN,
    T_COMBINED,
    T_POSTED,
    T_WAIT,
    T_WAITED,
    ExchangeTimes,
    LayerTimes,
    StepTimes,
)

logger = logging.getLogger(__name__)

MOST_WAITING = 64  # steps; more are dropped, and counted


class SpanThread:
    """Takes the times of steps, makes spans of them in the background, and never holds up who hands them over."""

    def __init__(self, router_id: str, layer_ids: Sequence[int], worker: int | None = None) -> None:
        """`layer_ids`: the model's own numbers of its MoE layers; `worker`: which of several workers this one is."""
        self._router_id, self._layer_ids, self._worker = router_id, tuple(layer_ids), worker
        self._waiting: queue.Queue[StepTimes | None] = queue.Queue(MOST_WAITING)
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def hand_over(self, step: StepTimes) -> None:
        """Make spans of a step, soon. Dropped if too many wait already."""
        try:
            self._waiting.put_nowait(step)
        except queue.Full:
            self.dropped += 1
            if self.dropped & (self.dropped - 1) == 0:
                logger.warning("%d traced steps were dropped so far: spans are not made fast enough", self.dropped)

    def close(self, timeout_s: float = 5.0) -> None:
        """Finish what waits."""
        self._waiting.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        tracer = tracer_of_steps()
        while (step := self._waiting.get()) is not None:
            try:
                make_spans(tracer, step, self._router_id, self._layer_ids, self._worker)
            except Exception:  # traces are for people; serving goes on
                logger.exception("no spans of step %d", step.number)


class SystemIds(IdGenerator):
    """Ids that do not follow `random`, which vLLM seeds alike in every engine: two routers would make the same ones."""

    def generate_span_id(self) -> int:
        """64 bits, not all zero."""
        return secrets.randbits(64) or 1

    def generate_trace_id(self) -> int:
        """128 bits, not all zero."""
        return secrets.randbits(128) or 1


def tracer_of_steps() -> trace.Tracer:
    """A tracer of the process's provider, with ids of its own."""
    tracer = trace.get_tracer("expertmesh")
    if isinstance(tracer, SdkTracer):
        tracer.id_generator = SystemIds()
    return tracer


def make_spans(
    tracer: trace.Tracer, step: StepTimes, router_id: str, layer_ids: Sequence[int], worker: int | None = None
) -> None:
    """All spans of a step, begun and ended. Each worker of several makes its own, which its number tells apart."""
    parents = {request: TraceContextTextMapPropagator().extract(headers) for request, headers in step.traces.items()}
    contexts = {request: trace.get_current_span(context).get_span_context() for request, context in parents.items()}
    detailed: SpanContext | None = None
    for request, context in parents.items():
        if detailed is None:
            others = [Link(other) for name, other in contexts.items() if name != request and other.is_valid]
        else:
            others = [Link(detailed)]
        span = tracer.start_span(
            "step",
            context,
            kind=SpanKind.INTERNAL,
            links=others,
            start_time=step.begin_ns + step.clock_ns,
            attributes={
                "gen_ai.request.id": request,
                "expertmesh.router": router_id,
                **({} if worker is None else {"expertmesh.worker": worker}),
                "expertmesh.step": step.number,
                "expertmesh.epoch": step.epoch,
                "expertmesh.tokens": step.num_tokens,
                "expertmesh.sampled_requests": len(step.traces),
            },
        )
        if detailed is None:
            detailed = span.get_span_context()
            for layer in step.layers:
                _layer_span(tracer, span, step, layer, layer_ids)
        span.end(step.end_ns + step.clock_ns)


def _layer_span(
    tracer: trace.Tracer, parent: Span, step: StepTimes, layer: LayerTimes, layer_ids: Sequence[int]
) -> None:
    model_layer = layer_ids[layer.layer] if layer.layer < len(layer_ids) else layer.layer
    first = layer.exchanges[:1]
    attributes: dict[str, str | int | float] = {
        "expertmesh.layer": model_layer,
        "expertmesh.exchanges": len(layer.exchanges),
    }
    for name, start, stop in (
        ("plan_pack", T_BEGIN, T_POSTED),
        ("wait", T_WAIT, T_WAITED),
        ("combine", T_WAITED, T_COMBINED),
    ):
        if all(exchange.words[stop] for exchange in first):
            spent_ns = sum(int(exchange.words[stop] - exchange.words[start]) for exchange in layer.exchanges)
            attributes[f"expertmesh.{name}_us"] = max(spent_ns, 0) / 1000
    if layer.fallback_ns:
        attributes["expertmesh.fallback_us"] = layer.fallback_ns / 1000
    span = tracer.start_span(
        f"moe layer {model_layer}",
        trace.set_span_in_context(parent),
        start_time=layer.begin_ns + step.clock_ns,
        attributes=attributes,
    )
    for number, exchange in enumerate(layer.exchanges):
        _shard_spans(tracer, span, step, exchange, number)
    span.end((layer.end_ns or step.end_ns) + step.clock_ns)


def _shard_spans(tracer: trace.Tracer, parent: Span, step: StepTimes, exchange: ExchangeTimes, number: int) -> None:
    """A span for each rank that was sent something, from then until its answer was seen."""
    arrived_R, compute_R = exchange.arrived_R.tolist(), exchange.compute_R.tolist()
    posted_ns = int(exchange.words[T_POSTED])
    for rank, rows, pairs in zip(itertools.count(), exchange.rows_R.tolist(), exchange.pairs_R.tolist(), strict=False):
        if rows == 0:
            continue
        attributes: dict[str, str | int | float] = {
            "expertmesh.rank": rank,
            "expertmesh.rows": rows,
            "expertmesh.pairs": pairs,
            "expertmesh.exchange": number,
        }
        if rank in step.transports:
            attributes["expertmesh.transport"] = step.transports[rank]
        if compute_R[rank]:
            attributes["expertmesh.compute_us"] = compute_R[rank] / 1000
        span = tracer.start_span(
            f"shard {rank}",
            trace.set_span_in_context(parent),
            kind=SpanKind.CLIENT,
            start_time=posted_ns + step.clock_ns,
            attributes=attributes,
        )
        if rank in exchange.failed:
            span.set_status(Status(StatusCode.ERROR, exchange.failed[rank]))
        end_ns = arrived_R[rank] or int(exchange.words[T_WAITED]) or step.end_ns
        span.end(max(end_ns, posted_ns) + step.clock_ns)
