"""Reads each request body once, ahead of vLLM, and refuses what is no JSON or out of bounds."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.http.asked import ASKED, asked_of
from cluster.http.errors import RefusedError, response_for
from cluster.http.shape import GENERATING, POOLING, Found, check, parse

FOUND = "expertmesh.found"  # key of the scope
DRAINED = 8  # times the largest body: what is read of one that is too large, so that its client gets to read the answer
MAX_INT_HEADER = 18  # digits
# vLLM compares a prompt's characters with the context before it makes tokens of them, but not here, and one thread
# makes everybody's tokens.
TEXT_ONLY = frozenset({"/tokenize", "/v1/messages/count_tokens"})
BYTES_PER_TOKEN = 64
INT_HEADERS = (b"x-vllm-priority", b"x-data-parallel-rank")


class BodyCheck:
    """ASGI middleware. The app gets the body as one message, and the scope what `Found` says of it.

    With `estimate` the scope also gets what the body asks for (`Asked`). `pools`: bodies are for an engine that pools.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_sequences: int,
        max_model_len: int,
        estimate: bool = False,
        pools: bool = False,
    ) -> None:
        self._app = app
        self._bounds = POOLING if pools else GENERATING
        self._max_model_len = max_model_len
        self._max_body_bytes = max_body_bytes
        self._max_sequences = max_sequences
        self._estimate = estimate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; anything but a request with a body passes through."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            body = await self._read(receive, headers.get(b"content-length", b""))
            if body is None:
                return  # the client has hung up
            for name in INT_HEADERS:
                if len(headers.get(name, b"")) > MAX_INT_HEADER:
                    raise RefusedError(f"the header {name.decode()} is no 64-bit integer", code="invalid_value")
            if scope["path"] in TEXT_ONLY and len(body) > BYTES_PER_TOKEN * self._max_model_len:
                raise RefusedError(
                    f"the text has {len(body)} bytes, far more than the maximum context length of "
                    f"{self._max_model_len} tokens",
                    code="context_length_exceeded",
                )
            if body and headers.get(b"content-type", b"").partition(b";")[0].strip().lower() == b"application/json":
                parsed = parse(body)
                scope[FOUND] = check(parsed, self._max_sequences, self._bounds)
                if self._estimate:
                    scope[ASKED] = asked_of(parsed)
                del parsed  # vLLM parses it again
        except RefusedError as error:
            await response_for(error, 0)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive, content_length: bytes) -> bytes | None:
        """The whole body; None if the client hangs up. Raises RefusedError if it is too large."""
        chunks: list[bytes] = []
        size, announced = 0, int(content_length) if content_length.isdigit() and len(content_length) < 20 else 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= self._max_body_bytes:
                chunks.append(chunk)
            ended = not message.get("more_body", False)
            if ended and size <= self._max_body_bytes:
                return b"".join(chunks)
            if ended or max(size, announced) > DRAINED * self._max_body_bytes:
                raise RefusedError(
                    f"the request body has {max(size, announced)} bytes, expected at most {self._max_body_bytes}",
                    status=413,
                )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body first."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def found_in(scope: Scope) -> Found:
    """What `BodyCheck` found in the body of this request."""
    return scope.get(FOUND) or Found()
