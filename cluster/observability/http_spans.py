"""The HTTP span of a request, around everything that a router does for it; vLLM's and the layers' spans are inside.

W3C Trace Context comes in as `traceparent` and `tracestate`. What vLLM sees of these names the span made here, so that
its spans, and those of steps, are children of it. Out goes `traceresponse` (Trace Context, level 2), which names the
trace also to a client that began none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_W3C = TraceContextTextMapPropagator()
_NAMES = ("traceparent", "tracestate")
RESPONSE_HEADER = "traceresponse"


class HttpSpans:
    """ASGI middleware: a span for each request to one of `paths`; everything else passes through."""

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self._app, self._paths = app, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; an exception ends the span and goes on."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if path not in self._paths:
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        span = trace.get_tracer("expertmesh").start_span(
            f"{scope['method']} {path}",
            parent_of(headers),
            kind=SpanKind.SERVER,
            attributes=dict(_attributes(scope, path, headers)),
        )

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                _note_status(span, message["status"])
                message = {**message, "headers": [*message.get("headers", ()), _told(span)]}
            elif message.get("body") and not begun:
                begun.append(True)
                span.add_event("first byte")
            await send(message)

        begun: list[bool] = []
        with trace.use_span(span, end_on_exit=True):
            await self._app({**scope, "headers": _as_child(scope["headers"], span)}, receive, send_and_note)


def parent_of(headers: dict[str, str]) -> Context | None:
    """Serve's own span of this request, where its tracing is on (None: the current one), else what the client sent."""
    if trace.get_current_span().get_span_context().is_valid:
        return None
    return _W3C.extract(headers)


def _as_child(headers: Iterable[tuple[bytes, bytes]], span: Span) -> list[tuple[bytes, bytes]]:
    """Headers by which what follows becomes a child of `span`."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span))
    others = [(name, value) for name, value in headers if name.decode("latin-1").lower() not in _NAMES]
    return [*others, *((name.encode(), value.encode()) for name, value in carrier.items())]


def _told(span: Span) -> tuple[bytes, bytes]:
    context = span.get_span_context()
    value = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    return RESPONSE_HEADER.encode(), value.encode()


def _attributes(scope: Scope, path: str, headers: dict[str, str]) -> Iterable[tuple[str, Any]]:
    """By OpenTelemetry's semantic conventions for HTTP servers."""
    yield "http.request.method", scope["method"]
    yield "http.route", path
    yield "url.path", scope["path"]
    yield "url.scheme", scope.get("scheme", "http")
    if scope.get("client"):
        yield "client.address", scope["client"][0]
    for header, name in (
        ("host", "server.address"),
        ("user-agent", "user_agent.original"),
        ("x-request-id", "expertmesh.request_id"),
    ):
        if header in headers:
            yield name, headers[header]


def _note_status(span: Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(Status(StatusCode.ERROR))


def span_processors() -> list[Any]:
    """What Serve's `tracing_config.exporter_import_path` may name: its spans go where OTEL_EXPORTER_OTLP_* say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]
