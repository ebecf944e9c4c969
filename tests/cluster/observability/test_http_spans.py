"""The span of a request: parents from W3C headers, what vLLM is told, what the client is told, and how it ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import SpanKind, StatusCode

from cluster.observability.http_spans import HttpSpans, span_processors

PATH = "/v1/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """A provider that samples nothing by itself."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(0.0))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    yield exporter
    provider.shutdown()


class App:
    """What stands behind the middleware."""

    def __init__(self, status: int = 200, fails: bool = False) -> None:
        self.status, self.fails = status, fails
        self.scope: dict[str, Any] = {}
        self.current = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        self.current = f"{trace.get_current_span().get_span_context().span_id:016x}"
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"x-other", b"1")]})
        for body in (b"one", b"two"):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if self.fails:
            raise ConnectionError("broken")
        await send({"type": "http.response.body", "body": b""})


def call(app: App, headers: dict[str, str], path: str = PATH) -> dict[str, str]:
    """The headers of the answer."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "client": ("192.0.2.7", 1234),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }

    async def receive() -> Any:
        raise AssertionError("nobody asks for the body")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(HttpSpans(app, {PATH})(scope, receive, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * 3]
    return {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def only(memory: InMemorySpanExporter) -> ReadableSpan:
    [span] = memory.get_finished_spans()
    return span


def test_a_clients_span_is_the_parent_and_vllm_sees_ours(memory: InMemorySpanExporter) -> None:
    app = App()
    told = call(app, {"Traceparent": SENT, "tracestate": "a=b", "x-request-id": "mine", "host": "api", "other": "kept"})
    span = only(memory)
    ours = f"{span.context.span_id:016x}"
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert (span.name, span.kind) == ("POST /v1/completions", SpanKind.SERVER)
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "http.route": PATH,
        "url.path": PATH,
        "url.scheme": "http",
        "client.address": "192.0.2.7",
        "server.address": "api",
        "expertmesh.request_id": "mine",
        "http.response.status_code": 200,
    }
    assert [event.name for event in span.events] == ["first byte"]
    inside = {name.decode(): value.decode() for name, value in app.scope["headers"]}
    assert inside == {
        "x-request-id": "mine",
        "host": "api",
        "other": "kept",
        "traceparent": f"00-{TRACE}-{ours}-01",
        "tracestate": "a=b",
    }
    assert app.current == ours, "log lines of the request find it"
    assert told == {"x-other": "1", "traceresponse": f"00-{TRACE}-{ours}-01"}


def test_without_a_traceparent_the_ratio_decides_and_the_client_learns_the_id(memory: InMemorySpanExporter) -> None:
    app = App()
    told = call(app, {})
    assert memory.get_finished_spans() == ()
    version, trace_id, span_id, flags = told["traceresponse"].split("-")
    assert (version, len(trace_id), len(span_id), int(flags, 16) & 1) == ("00", 32, 16, 0)
    [(name, value)] = app.scope["headers"]
    assert name == b"traceparent"
    assert int(value.decode().split("-")[3], 16) & 1 == 0, "vLLM does not trace it either"


@pytest.mark.parametrize("sent", ["", "00-xyz", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "\xff" * 40])
def test_what_is_no_traceparent_is_none(memory: InMemorySpanExporter, sent: str) -> None:
    told = call(App(), {"traceparent": sent})
    assert memory.get_finished_spans() == ()
    assert TRACE not in told["traceresponse"]


def test_serves_own_span_comes_first(memory: InMemorySpanExporter) -> None:
    """Where Serve's tracing is on, its span of this request is current, and has the client's as its parent."""
    outer = trace.get_tracer("serve").start_span("replica", None)
    context = trace.SpanContext(int(TRACE, 16), int(PARENT, 16), False, trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        call(App(), {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"})
    outer.end()
    assert f"{only(memory).parent.span_id:016x}" == PARENT


def test_errors(memory: InMemorySpanExporter) -> None:
    call(App(status=503), {"traceparent": SENT})
    call(App(status=429), {"traceparent": SENT})
    with pytest.raises(ConnectionError):
        call(App(fails=True), {"traceparent": SENT})
    ours, refused, broken = memory.get_finished_spans()
    assert (ours.status.status_code, ours.attributes["error.type"]) == (StatusCode.ERROR, "503")
    assert refused.status.status_code == StatusCode.UNSET, "a refusal is no fault of the server"
    assert broken.status.status_code == StatusCode.ERROR
    assert broken.events[-1].name == "exception"


def test_other_paths_pass_untouched(memory: InMemorySpanExporter) -> None:
    app = App()
    assert call(app, {"traceparent": SENT}, "/metrics") == {"x-other": "1"}
    assert app.scope["headers"] == [(b"traceparent", SENT.encode())]
    assert memory.get_finished_spans() == ()


def test_serve_takes_our_exporter() -> None:
    from ray.serve._private.tracing_utils import _load_span_processors

    [processor] = _load_span_processors("cluster.observability.http_spans:span_processors", "unused")
    processor.shutdown()
    assert len(span_processors()) == 1


def test_a_router_that_does_not_trace_imports_none_of_this() -> None:
    """Serve and vLLM import OpenTelemetry by themselves where it is installed."""
    code = (
        "import sys, cluster.http.app, cluster.router.options, cluster.config.serve_file\n"
        "print([m for m in sys.modules if m.startswith(('cluster.observability.http', 'experts.dispatch.tracing'))])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
