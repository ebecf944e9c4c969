"""The spans made of a step's times: parents, links, times and attributes."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import StatusCode

from experts.dispatch.tracing import spans
from experts.dispatch.tracing.spans import MOST_WAITING, SpanThread, make_spans
from experts.dispatch.tracing.times import TIMES, ExchangeTimes, LayerTimes, StepTimes

ROOT = Path(__file__).parents[4]
TRACE_1, TRACE_2 = "0af7651916cd43dd8448eb211c80319c", "1bf7651916cd43dd8448eb211c80319d"
SPAN_1, SPAN_2 = "b7ad6b7169203331", "c7ad6b7169203332"


def headers(trace_id: str, span_id: str, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{span_id}-{flags}"}


def step_of(traces: dict[str, dict[str, str]]) -> StepTimes:
    """Layer 1 of two: one exchange, in which shard 2 was asked nothing and shard 1 failed; times are clock + small."""
    words = np.zeros(TIMES + 6, np.int64)
    words[:TIMES] = 110, 120, 130, 170, 180
    words[TIMES : TIMES + 2] = 160, 170
    words[TIMES + 3] = 25
    exchange = ExchangeTimes(words, np.array([3, 4, 0]), np.array([5, 6, 0]), {1: "it left"})
    layer = LayerTimes(1, 105, 190, [exchange], fallback_ns=7000)
    return StepTimes(traces, 9, frozenset({1}), 4, 12, [layer], {0: "shm", 1: "tcp"}, 100, 200, clock_ns=1_000_000)


def spans_of(step: StepTimes, sampler: object = None, worker: int | None = None) -> list[ReadableSpan]:
    memory = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler)  # type: ignore[arg-type]
    provider.add_span_processor(SimpleSpanProcessor(memory))
    make_spans(provider.get_tracer("test"), step, "router-1", [0, 3], worker)
    return list(memory.get_finished_spans())


def test_one_request() -> None:
    made = {span.name: span for span in spans_of(step_of({"a": headers(TRACE_1, SPAN_1)}))}
    assert set(made) == {"step", "moe layer 3", "shard 0", "shard 1"}
    step, layer, first, second = (made[name] for name in ("step", "moe layer 3", "shard 0", "shard 1"))
    assert all(f"{span.context.trace_id:032x}" == TRACE_1 for span in made.values())
    assert f"{step.parent.span_id:016x}" == SPAN_1
    assert layer.parent.span_id == step.context.span_id
    assert {first.parent.span_id, second.parent.span_id} == {layer.context.span_id}
    assert [(span.start_time - 1_000_000, span.end_time - 1_000_000) for span in (step, layer, first, second)] == [
        (100, 200),
        (105, 190),
        (120, 160),
        (120, 170),
    ]
    assert step.attributes == {
        "gen_ai.request.id": "a",
        "expertmesh.router": "router-1",
        "expertmesh.step": 9,
        "expertmesh.epoch": 4,
        "expertmesh.tokens": 12,
        "expertmesh.sampled_requests": 1,
    }
    assert layer.attributes == {
        "expertmesh.layer": 3,
        "expertmesh.exchanges": 1,
        "expertmesh.plan_pack_us": 0.01,
        "expertmesh.wait_us": 0.04,
        "expertmesh.combine_us": 0.01,
        "expertmesh.fallback_us": 7.0,
    }
    assert first.attributes == {
        "expertmesh.rank": 0,
        "expertmesh.rows": 3,
        "expertmesh.pairs": 5,
        "expertmesh.exchange": 0,
        "expertmesh.transport": "shm",
        "expertmesh.compute_us": 0.025,
    }
    assert (first.status.status_code, second.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)
    assert second.status.description == "it left"


def test_the_steps_of_an_engines_workers_are_told_apart() -> None:
    """A step's span of an engine of one worker has no number: see above."""
    for worker in (0, 1):
        [step] = [s for s in spans_of(step_of({"a": headers(TRACE_1, SPAN_1)}), worker=worker) if s.name == "step"]
        assert step.attributes["expertmesh.worker"] == worker


def test_several_requests_are_linked_and_layers_are_made_once() -> None:
    made = spans_of(step_of({"a": headers(TRACE_1, SPAN_1), "b": headers(TRACE_2, SPAN_2)}))
    first, second = sorted((span for span in made if span.name == "step"), key=lambda span: span.context.trace_id)
    assert sum(span.name.startswith("moe layer") for span in made) == 1
    assert f"{first.context.trace_id:032x}" == TRACE_1
    assert f"{second.context.trace_id:032x}" == TRACE_2
    assert f"{second.parent.span_id:016x}" == SPAN_2
    [there], [back] = first.links, second.links
    assert (f"{there.context.trace_id:032x}", f"{there.context.span_id:016x}") == (TRACE_2, SPAN_2)
    assert back.context.span_id == first.context.span_id
    assert (first.start_time, first.end_time) == (second.start_time, second.end_time)


def test_a_parent_that_is_not_sampled_has_no_spans() -> None:
    assert spans_of(step_of({"a": headers(TRACE_1, SPAN_1, "00")}), ParentBased(TraceIdRatioBased(1.0))) == []


def test_a_step_that_broke_off_ends_with_the_step() -> None:
    step = step_of({"a": headers(TRACE_1, SPAN_1)})
    step.layers[0].end_ns = 0
    step.layers[0].exchanges[0].words[2:] = 0  # nothing was awaited
    made = {span.name: span for span in spans_of(step)}
    assert made["moe layer 3"].end_time == made["shard 0"].end_time == 1_000_200
    assert "expertmesh.wait_us" not in made["moe layer 3"].attributes


def test_ids_do_not_follow_the_seed_that_all_engines_share(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider()
    monkeypatch.setattr(spans.trace, "get_tracer", lambda name: provider.get_tracer(name))
    made = set()
    for _ in range(3):
        random.seed(0)
        context = spans.tracer_of_steps().start_span("step").get_span_context()
        made |= {context.span_id, context.trace_id}
    assert len(made) == 6


def test_handing_over_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that come faster than spans are made are dropped and counted; a failure ends nothing."""
    go_on, made = threading.Event(), []

    def slow(_tracer: object, step: StepTimes, *_: object) -> None:
        go_on.wait(60)
        made.append(step.number)
        if len(made) == 1:
            raise ValueError("a bad step")

    monkeypatch.setattr(spans, "make_spans", slow)
    thread = SpanThread("router-1", [0])
    step = step_of({})
    for _ in range(2 * MOST_WAITING):
        thread.hand_over(step)
    assert thread.dropped >= MOST_WAITING - 1
    go_on.set()
    thread.close(60)
    assert len(made) + thread.dropped == 2 * MOST_WAITING


def test_a_router_that_does_not_trace_imports_nothing_of_this() -> None:
    """Neither OpenTelemetry nor what notes times; vLLM itself imports OpenTelemetry where it is installed."""
    code = (
        "import sys\n"
        "import experts.dispatch.mesh_client, experts.shard.server, experts.dispatch.epoch_preparer\n"
        "print([m for m in sys.modules if m.startswith(('opentelemetry', 'experts.dispatch.tracing'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
