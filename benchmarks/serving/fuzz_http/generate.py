"""Where odd requests come from: schemathesis over the service's OpenAPI document, and Hypothesis over raw bodies."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st

from benchmarks.serving.fuzz_http.wire import Request

JSON_HEADERS = (("Content-Type", "application/json"),)
ODD_NUMBERS = [0, -1, 1, 2, 255, 257, 2048, 10**6, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400]
ODD_NUMBERS += [0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")]  # type: ignore[list-item]
ODD_STRINGS = [
    "",
    " ",
    "\0",
    "\ud800",
    "a\udfffb",
    "\u2028",
    "😀",
    "def",
    "x" * 5000,
    "(",
    "a{1,99999}",
    "{{ 1/0 }}",
    "-1",
]
ODD_STRINGS += ["null", "auto", "required", "json_object", "user", "../../etc/passwd", "http://127.0.0.1:1/x.png"]
DEEP = json.loads("[" * 300 + "]" * 300)
ODD_TEXT = ["[" * 50_000, "9" * 10_000, "\ufeff", '{"a":1}{"a":1}', "nul", "\x00", "'a'", "{,}", "1e99999"]


def run(strategy: st.SearchStrategy[Request], count: int, seed: int, send: Callable[[Request], None]) -> None:
    """Send `count` requests drawn from a strategy. `send` must not raise: Hypothesis would try to shrink."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def one(request: Request) -> None:
        send(request)

    one()


def from_schema(document: dict[str, Any], model: str) -> st.SearchStrategy[Request]:
    """Requests that follow the OpenAPI document, and such that break it, for each of its operations."""
    import schemathesis
    from schemathesis.generation import GenerationMode

    def to_request(case: Any) -> Request:
        body = case.body
        has_body = type(body).__name__ != "NotSet"
        if isinstance(body, dict) and "model" in body and isinstance(body["model"], str):
            body = {**body, "model": model}
        raw = body if isinstance(body, bytes) else json.dumps(body).encode() if has_body else None
        return Request(case.method.upper(), quoted(case.formatted_path), raw, JSON_HEADERS if has_body else ())

    schema = schemathesis.openapi.from_dict(document)
    strategies = [
        operation.ok().as_strategy(generation_mode=mode).map(to_request)
        for operation in schema.get_all_operations()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    ]
    return st.one_of(strategies)


def quoted(path: str) -> str:
    """A path that http.client takes."""
    from urllib.parse import quote

    return quote(path, safe="/%:@!$&'()*+,;=-._~", errors="replace") or "/"


def from_bodies(document: dict[str, Any], model: str) -> st.SearchStrategy[Request]:
    """Good requests with odd values, broken JSON, raw bytes, odd methods, paths and headers."""
    good = good_bodies(model)
    paths = st.sampled_from(sorted(good))
    odd = odd_values()

    def changed(path: str) -> st.SearchStrategy[Request]:
        names = st.sampled_from(sorted({*fields_of(document, path), *good[path]}))
        changes = st.dictionaries(names, odd, min_size=1, max_size=3)
        return changes.map(lambda new: Request("POST", path, json.dumps({**good[path], **new}).encode()))

    def broken(path: str) -> st.SearchStrategy[Request]:
        text = json.dumps(good[path]).encode()
        cut = st.integers(0, len(text)).map(lambda end: text[:end])
        part = st.one_of(st.binary(max_size=4), st.sampled_from([odd.encode() for odd in ODD_TEXT]))
        inserted = st.tuples(st.integers(0, len(text)), part).map(lambda at: text[: at[0]] + at[1] + text[at[0] :])
        raw = st.one_of(cut, inserted, st.binary(max_size=200), odd.map(lambda value: json.dumps(value).encode()))
        return raw.map(lambda body: Request("POST", path, body))

    def dressed(path: str) -> st.SearchStrategy[Request]:
        methods = st.sampled_from(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "POST", "TRACE"])
        tails = st.sampled_from(["", "/", "//", "/%00", "/%ff", "?a=b", "/..", "%20", "/x/cancel"])
        values = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)
        names = ["Content-Type", "X-Request-Id", "X-Session-ID", "X-Vllm-Priority", "X-data-parallel-rank", "Accept"]
        names += ["traceparent", "serve_multiplexed_model_id", "Origin", "endpoint-load-metrics-format"]
        typed = st.sampled_from(["text/plain", "application/json; charset=utf-16", "multipart/form-data", "9" * 30, ""])
        headers = st.dictionaries(st.sampled_from(names), st.one_of(values, typed), max_size=3)
        text = json.dumps(good[path]).encode()
        return st.builds(
            lambda method, tail, more: Request(
                method, path + tail, text, tuple({**dict(JSON_HEADERS), **more}.items())
            ),
            methods,
            tails,
            headers,
        )

    return st.one_of(paths.flatmap(changed), paths.flatmap(changed), paths.flatmap(broken), paths.flatmap(dressed))


def odd_values() -> st.SearchStrategy[Any]:
    """Values that a field does not expect, and a few that it may."""
    leaves = st.one_of(
        st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_STRINGS), st.integers(-5, 20)
    )
    names = st.sampled_from(
        ["type", "json", "regex", "schema", "json_schema", "name", "function", "text", "role", "5", ""]
    )
    nested = st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=3)),
        max_leaves=8,
    )
    return st.one_of(leaves, nested, st.just(DEEP), st.just([1] * 3000), st.just(["a"] * 600))


def good_bodies(model: str) -> dict[str, dict[str, Any]]:
    """A request that works, for each path that takes one."""
    chat = [{"role": "user", "content": "def"}]
    return {
        "/v1/completions": {"model": model, "prompt": "def", "max_tokens": 2},
        "/v1/chat/completions": {"model": model, "messages": chat, "max_tokens": 2},
        "/v1/chat/completions/batch": {"model": model, "messages": [chat, chat], "max_tokens": 2},
        "/v1/responses": {"model": model, "input": "def", "max_output_tokens": 2},
        "/v1/messages": {"model": model, "messages": chat, "max_tokens": 2},
        "/v1/messages/count_tokens": {"model": model, "messages": chat},
        "/tokenize": {"model": model, "prompt": "def"},
        "/detokenize": {"model": model, "tokens": [5, 6]},
        "/generative_scoring": {"model": model, "query": "a", "items": ["b"], "label_token_ids": [1, 2]},
    }


def fields_of(document: dict[str, Any], path: str) -> set[str]:
    """Names of the fields that the document gives the body of a POST."""
    names: set[str] = set()
    pending: list[Any] = [document["paths"].get(path, {}).get("post", {}).get("requestBody", {})]
    for _ in range(6):  # the nesting of references and alternatives above the fields
        below: list[Any] = []
        for item in pending:
            if isinstance(item, list):
                below.extend(item)
            elif isinstance(item, dict):
                names.update(item.get("properties", {}))
                below.extend(
                    item.get(key) for key in ("content", "application/json", "schema", "anyOf", "oneOf", "allOf")
                )
                if "$ref" in item:
                    below.append(document["components"]["schemas"][item["$ref"].rpartition("/")[2]])
        pending = below
    return names
