"""What a key may use: its models, its limits, and what it is told of them, in OpenAI's errors and headers."""

from __future__ import annotations

import math
from collections.abc import Collection

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.http.asked import ASKED, Asked
from cluster.http.errors import error_response
from cluster.http.gate import key_in
from cluster.http.metering import METER, Meter
from cluster.keys.keyring import Key
from cluster.keys.leases import Leases, Refusal
from cluster.keys.messages import Totals

HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)


class Quota:
    """ASGI middleware behind `Gate` and `BodyCheck`: every POST with a key counts, and has to be within its limits.

    `generation_paths` are those whose requests make tokens.
    """

    def __init__(
        self, app: ASGIApp, leases: Leases, model_id: str, max_model_len: int, generation_paths: Collection[str]
    ) -> None:
        self._app = app
        self._leases = leases
        self._model_id = model_id
        self._max_model_len = max_model_len
        self._generation_paths = frozenset(generation_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; one without a key passes through."""
        key = key_in(scope)
        if key is None or scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        asked: Asked = scope.get(ASKED) or Asked()
        refused = self._not_its_model(key, asked)
        if refused is None:
            generates = scope["path"].removeprefix(scope.get("root_path", "")) in self._generation_paths
            tokens = asked.tokens(self._max_model_len, generates)
            refused = _never_fits(key, tokens)
        if refused is None:
            charge = await self._leases.admit(key, tokens)
            if isinstance(charge, Refusal):
                refused = _over(key, tokens, charge)
        if refused is not None:
            self._leases.count(key.name, Totals(refused=1))
            refused.raw_headers.extend(self._headers(key))
            await refused(scope, receive, send)
            return
        assert not isinstance(charge, Refusal)
        failed = False

        async def send_with_headers(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start":
                failed = message["status"] >= 400
                if key.limits:
                    message = {**message, "headers": [*message.get("headers", ()), *self._headers(key)]}
            await send(message)

        meter = Meter()
        before = METER.set(meter)
        try:
            await self._app(scope, receive, send_with_headers)
        except BaseException:
            failed = True
            raise
        finally:
            METER.reset(before)
            # What did not come to the engine has cost nothing, unless it was answered.
            self._leases.finish(charge, meter.tokens if meter.started or failed else None)
            self._leases.count(key.name, Totals(1, meter.prompt_tokens, meter.completion_tokens))

    def _not_its_model(self, key: Key, asked: Asked) -> JSONResponse | None:
        model = asked.model or self._model_id
        if not key.models or model in key.models:
            return None
        message = f"the model {model!r} does not exist, or {key.name} may not use it; it may use "
        return error_response(404, message + ", ".join(sorted(key.models)), "model", "model_not_found")

    def _headers(self, key: Key) -> list[tuple[bytes, bytes]]:
        limits = (key.limits.requests_per_minute, key.limits.tokens_per_minute)
        if limits == (None, None):
            return []
        standing = self._leases.standing(key)
        values: list[str] = []
        for limit, left, reset_s in zip(limits, standing.remaining, standing.reset_s, strict=True):
            values += ["", "", ""] if limit is None else [str(limit), str(min(left, limit)), duration(reset_s)]
        return [(name.encode(), value.encode()) for name, value in zip(HEADERS, values, strict=True) if value]


def duration(seconds: float) -> str:
    """Seconds as OpenAI writes them: 250ms, 12s, 1m2s."""
    if seconds < 1:
        return f"{max(0, math.ceil(seconds * 1000))}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _never_fits(key: Key, tokens: int) -> JSONResponse | None:
    most = key.limits.tokens_per_minute
    if most is None or tokens <= most:
        return None
    response = error_response(
        429,
        f"this request may take {tokens} tokens, more than the {most} a minute of {key.name}: send less, or a smaller "
        "max_tokens",
        code="rate_limit_exceeded",
        kind="tokens",
    )
    response.headers["x-should-retry"] = "false"  # OpenAI's clients know it
    return response


def _over(key: Key, tokens: int, refusal: Refusal) -> JSONResponse:
    """Status 429, with the limit that holds the request up longest."""
    limits = key.limits
    wait_s = max(refusal.retry_s)
    kind = refusal.retry_s.index(wait_s)
    what, limit = (
        ("requests", f"{limits.requests_per_minute} requests a minute"),
        ("tokens", f"{limits.tokens_per_minute} tokens a minute, of which this request may take {tokens}"),
        ("concurrency", f"{limits.concurrency} requests at the same time"),
    )[kind]
    retry_after_s = max(1, math.ceil(wait_s))
    message = f"{key.name} is at its limit of {limit}: try again in {retry_after_s} s"
    return error_response(429, message, code="rate_limit_exceeded", retry_after_s=retry_after_s, kind=what)
