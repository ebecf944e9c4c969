"""Bounds of request bodies: what is refused, in which words, and that everything else passes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.http import shape
from cluster.http.errors import RefusedError
from cluster.http.shape import POOLING, Found, check, parse

MOST = 256
PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
)


def refused(body: Any) -> RefusedError:
    with pytest.raises(RefusedError) as found:
        check(body, MOST)
    assert found.value.status == 400
    return found.value


@given(PLAIN)
def test_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse(text.encode()) == json.loads(text)


def is_strict(raw: bytes) -> bool:
    """The oracle: UTF-8, the standard library's JSON without its extensions, and no half of a surrogate pair."""

    def no_constant(name: str) -> Any:
        raise ValueError(name)

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(text)
        return float(text)

    try:
        value = json.loads(raw.decode(), parse_constant=no_constant, parse_float=finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


@settings(max_examples=400)
@given(
    st.one_of(
        st.binary(max_size=12),
        st.text('"\\{}[]:,0123456789.eE+-tfnu dDcC89abAB', max_size=16).map(str.encode),
        st.lists(st.sampled_from(["\\ud800", "\\udc00", "\\uDBFF", "\\u0041", "\\\\", "a", "é"]), max_size=5).map(
            lambda parts: f'"{"".join(parts)}"'.encode()
        ),
    )
)
def test_what_is_not_json_by_the_letter_is_refused_and_nothing_else(raw: bytes) -> None:
    if is_strict(raw):
        assert parse(raw) == json.loads(raw)
    else:
        with pytest.raises(RefusedError, match=r"^the request body is not JSON: ") as found:
            parse(raw)
        assert found.value.code in ("invalid_json", "invalid_unicode")


@pytest.mark.parametrize(
    "raw", [b'{"prompt": "\\ud800"}', b'{"stop": ["a\\uDFFFb"]}', b'{"\\ud83d": 1}', b'"\\udc00\\ud800"']
)
def test_half_a_character_is_called_so(raw: bytes) -> None:
    with pytest.raises(RefusedError, match="lone surrogate") as found:
        parse(raw)
    assert found.value.code == "invalid_unicode"


@pytest.mark.parametrize("raw", ['{"a": "\\ud83d\\ude00"}', '{"a": "\\\\ud800"}', '{"a": "\\u0000"}'])
def test_whole_characters_pass_however_they_are_written(raw: str) -> None:
    assert parse(raw.encode()) == json.loads(raw)


def test_nesting_ends_in_a_refusal_and_not_in_the_stack() -> None:
    for depth in (1000, 10**6):
        with pytest.raises(RefusedError, match="nested"):
            parse(b"[" * depth + b"]" * depth)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"seed": -(2**63) - 1}, "seed", "integer_below_min_value"),
        ({"vllm_xargs": {"a": [1, 2**70]}}, "vllm_xargs.a[1]", "integer_above_max_value"),
        ({"prompt": [1, -1]}, "prompt", "integer_below_min_value"),
        ({"prompt": [[1], [2**31]]}, "prompt[1]", "integer_above_max_value"),
        ({"stop_token_ids": [-5]}, "stop_token_ids", "integer_below_min_value"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_type"),
        ({"prompt": [[1], "a"]}, "prompt", "invalid_type"),
        ({"prompt": [True, 1]}, "prompt", "invalid_type"),
        ({"messages": [1] * 2049}, "messages", "array_above_max_length"),
        ({"input": [{}] * 513}, "input", "array_above_max_length"),
        ({"stop": ["a"] * 1025}, "stop", "array_above_max_length"),
        ({"x": {str(i): 1 for i in range(1025)}}, "x", "array_above_max_length"),
        ({"allowed_token_ids": [1] * (2**18 + 1)}, "allowed_token_ids", "array_above_max_length"),
        ({"tools": [[[1] * 10] * 100] * 60}, "tools", "array_above_max_length"),
        ({"kv_transfer_params": nested(200)}, "kv_transfer_params", "invalid_value"),
        ({"structured_outputs": {"regex": "(ab|cd)" * 6000}}, "structured_outputs", "invalid_value"),
        (
            {"response_format": {"json_schema": {"schema": {"enum": ["x" * 40] * 1000}}}},
            "response_format",
            "invalid_value",
        ),
        (
            {"response_format": {"schema": {"properties": dict.fromkeys(map(str, range(513)), 1)}}},
            "response_format.schema.properties",
            "array_above_max_length",
        ),
        ({"structured_outputs": 5}, "structured_outputs", "invalid_type"),
        ({"stream_options": [1]}, "stream_options", "invalid_type"),
        ({"request_id": "x" * 257}, "request_id", "string_above_max_length"),
        ({"bad_words": ["a", "b" * 257]}, "bad_words[1]", "string_above_max_length"),
        ({"n": 257}, "n", "integer_above_max_value"),
        ({"n": 10**6, "prompt": "a"}, "n", "integer_above_max_value"),
        ({"n": 2, "prompt": ["a"] * 129}, "n", "integer_above_max_value"),
        ({"prompt": ["a"] * 257}, "prompt", "array_above_max_length"),
        ({"prompt": [[1, 2]] * 257}, "prompt", "array_above_max_length"),
        ({"messages": [[{"role": "user"}]] * 257}, "messages", "array_above_max_length"),
    ],
)
def test_what_is_out_of_bounds_is_named(body: dict[str, Any], param: str, code: str) -> None:
    error = refused(body)
    assert (error.param, error.code) == (param, code)
    assert str(error).startswith(param) or "sequences" in str(error)


def test_a_body_that_is_no_object_is_left_to_vllm_but_for_its_size() -> None:
    for body in (None, 5, "text", [1, 2], True):
        assert check(body, MOST) == Found()
    assert refused([[1]] * 1025).param is None
    assert refused({str(i): 1 for i in range(1025)}).param is None


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [5] * 10**6},
        {"prompt": [[5] * 1000] * MOST},
        {"prompt": ["a"] * MOST},
        {"prompt": "a", "n": MOST},
        {"prompt": ["a"] * 16, "n": 16},
        {"messages": [{"role": "user", "content": "a"}] * 2048, "n": 128},
        {"logit_bias": {str(token): 1.5 for token in range(2**15)}},
        {"seed": -(2**63), "top_k": 2**63 - 1, "n": -3},
        {"prompt": "x" * 10**6, "stop": ["y" * 10**5]},
        {"response_format": {"type": "json_schema", "json_schema": nested(64)}},
        {"structured_outputs": None, "stream_options": {}, "n": True},
        {},
    ],
)
def test_what_a_client_may_want_passes(body: dict[str, Any]) -> None:
    assert check(body, MOST).fields == tuple(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "a"}, False),
        ({"structured_outputs": {}, "tools": []}, False),
        ({"structured_outputs": {"regex": "a"}}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"tools": [{"type": "function"}]}, True),
    ],
)
def test_grammars_are_noticed(body: dict[str, Any], expected: bool) -> None:
    assert check(body, MOST).has_grammar is expected


def test_the_bounds_do_not_contradict_vllms_own() -> None:
    limits = pytest.importorskip("vllm.sampling_params", reason="vLLM's limits")
    assert shape.MAX_DEPTH > limits.MAX_STRUCTURED_OUTPUT_JSON_NESTING + limits.STRUCTURAL_TAG_WRAPPER_NESTING


@pytest.mark.parametrize(
    ("body", "param", "instead"),
    [
        ({"best_of": 3, "n": 2}, "best_of", "send n, and choose among the answers"),
        ({"guided_json": {"type": "object"}}, "guided_json", "send structured_outputs with json"),
        ({"functions": [{"name": "f"}]}, "functions", "send tools"),
    ],
)
def test_a_field_that_vllm_would_pass_over_is_refused(body: dict[str, Any], param: str, instead: str) -> None:
    error = refused({"prompt": "x", **body})
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert error.message == f"{param} has no effect in this version of vLLM: {instead}"


@pytest.mark.parametrize("body", [{"best_of": 1}, {"best_of": 2, "n": 2}, {"best_of": None}, {"function_call": None}])
def test_such_a_field_that_asks_for_nothing_passes(body: dict[str, Any]) -> None:
    assert check({"prompt": "x", **body}, MOST).fields == ("prompt", *body)


@pytest.mark.parametrize(
    "body",
    [
        {"input": ["a"] * 256},
        {"input": [5] * 4096},  # token ids of one input
        {"input": [[5] * 600] * 256},
        {"input": [{"role": "user", "content": "a"}] * 2048},
        {"messages": [{"role": "user", "content": "a"}] * 2048},
        {"queries": "a", "documents": ["b"] * 255},
        {"queries": ["a"] * 128, "documents": ["b"] * 128},
        {"query": "a", "documents": ["b"] * 256, "n": 9},
    ],
)
def test_what_an_engine_that_pools_is_asked_passes(body: Any) -> None:
    assert check(body, MOST, POOLING) == Found(tuple(body))


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"input": ["a"] * 257}, "input", "array_above_max_length"),
        ({"input": ["a"] * 2049}, "input", "array_above_max_length"),
        ({"input": [-1]}, "input", "integer_below_min_value"),
        ({"queries": "a", "documents": ["b"] * 256}, "documents", "array_above_max_length"),
        ({"queries": ["a"] * 200, "documents": ["b"] * 100}, "queries", "array_above_max_length"),
        ({"query": "a", "documents": [{"content": []}] * 257}, "documents", "array_above_max_length"),
        ({"inputs": [{"content": []}] * 257}, "inputs", "array_above_max_length"),
    ],
)
def test_what_it_is_asked_is_bounded(body: Any, param: str, code: str) -> None:
    with pytest.raises(RefusedError) as found:
        check(body, MOST, POOLING)
    assert (found.value.param, found.value.code) == (param, code)
