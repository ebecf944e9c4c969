"""What a request body may look like before vLLM sees it: bounds that keep one request from stalling all others.

vLLM checks the values itself. But it checks them in the event loop that all streams share, so a body that makes the
check itself slow (an array of 100,000 wrong messages costs 14 s) has to be refused without looking at it closely.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sized
from dataclasses import dataclass
from types import NoneType
from typing import Any

import msgspec

from cluster.http.errors import RefusedError, param_of

MAX_DEPTH = 128  # of arrays and objects within each other; vLLM takes schemas of 64
MAX_ITEMS = 1024  # in one array or object, token ids not counted
MORE_ITEMS = {"messages": 2048, "logit_bias": 2**15}
MAX_VALUES = 50_000  # in the whole body, token ids not counted
MAX_TOKEN_ID = 2**31 - 1
MAX_TOKEN_IDS = 2**18  # in one array, but for a prompt, whose length vLLM compares with the context first
MAX_NAME = 256  # characters
INT64 = range(-(2**63), 2**63)

MAX_PROPERTIES = 512  # of one object in a schema: a grammar's compilation takes time that grows with their cube
# What is compiled into a grammar takes time that grows with the square of its size. Characters and values.
GRAMMARS = {"structured_outputs": 2**15, "response_format": 2**15, "text": 2**15, "tools": 2**17}
# Fields that vLLM looks into before it has checked their type.
OBJECTS = ("structured_outputs", "stream_options", "response_format")
# Fields that vLLM passes over though they were to change the answer, and what does it instead.
PASSED_OVER = {
    "best_of": "send n, and choose among the answers",
    "functions": "send tools",
    "function_call": "send tool_choice",
    **{
        f"guided_{kind}": f"send structured_outputs with {kind}"
        for kind in ("json", "regex", "choice", "grammar", "json_object", "whitespace_pattern")
    },
}
# Strings that vLLM copies into every chunk, or tries at every step.
NAMES = frozenset({"request_id", "session_id", "model", "user", "bad_words"})

_LONE_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!..\\u[dD]..)\\u[dD][c-fC-F]")


@dataclass(frozen=True)
class Bounds:
    """What differs between bodies for an engine that generates and for one that pools."""

    input_items: int  # in an array `input`
    token_fields: frozenset[str]  # arrays of token ids, which may be as long as a context
    batches: tuple[str, ...]  # fields whose arrays are as many sequences for the engine
    multiplied: bool  # whether sequences are as many as the product of these; they are the sum of queries and documents


_TOKENS = frozenset({"prompt", "tokens", "token_ids", "query", "items"})
# Each item of a response's `input` is tried as 30 types.
GENERATING = Bounds(512, _TOKENS, ("prompt", "prompt_embeds", "messages", "items"), multiplied=True)
POOLING = Bounds(
    2048,  # as OpenAI's embeddings take
    _TOKENS | {"input"},
    (
        *("input", "messages", "texts", "images", "inputs", "queries", "documents", "items"),
        *("text_1", "text_2", "data_1", "data_2"),
    ),
    multiplied=False,
)


@dataclass(frozen=True)
class Found:
    """What the rest of the front door has to know of a body."""

    fields: tuple[str, ...] = ()  # names at its top, in the order of the client
    has_grammar: bool = False


def parse(raw: bytes) -> Any:
    """The JSON in a body, by the letter: UTF-8, no NaN, no lone surrogates, no huge numbers. Raises RefusedError."""
    try:
        return msgspec.json.decode(raw)
    except RecursionError:
        why, code = f"arrays and objects are nested more than {MAX_DEPTH} deep", "invalid_json"
    except UnicodeDecodeError as error:
        why, code = f"it is not UTF-8 at byte {error.start}", "invalid_json"
    except msgspec.MsgspecError as error:
        why, code = str(error).removeprefix("JSON is malformed: "), "invalid_json"
        if _LONE_SURROGATE.search(raw):
            why, code = (
                "it holds a lone surrogate (\\ud800 to \\udfff), which stands for no character",
                "invalid_unicode",
            )
    raise RefusedError(f"the request body is not JSON: {why}", code=code)


def check(body: Any, max_sequences: int, bounds: Bounds = GENERATING) -> Found:
    """What `Found` says of a parsed body. Raises RefusedError if it is out of bounds."""
    if not isinstance(body, dict):
        _walk(body, (), bounds)
        return Found()
    _check_length(body, (), bounds)
    for name, instead in PASSED_OVER.items():
        value = body.get(name)
        if value is not None and not (name == "best_of" and value in (1, body.get("n", 1))):
            message = f"{name} has no effect in this version of vLLM: {instead}"
            raise RefusedError(message, param=name, code="unsupported_parameter")
    for name in OBJECTS:
        if not isinstance(body.get(name), dict | NoneType):
            raise RefusedError(f"{name} is no object", param=name, code="invalid_type")
    for name, value in body.items():
        size = _walk(value, (name,), bounds)
        if size > GRAMMARS.get(name, size):
            raise RefusedError(
                f"{name} has {size} characters and values, expected at most {GRAMMARS[name]}",
                param=name,
                code="invalid_value",
            )
    _check_sequences(body, max_sequences, bounds)
    grammar = body.get("structured_outputs") or body.get("response_format") or body.get("tools") or body.get("text")
    return Found(tuple(body), bool(grammar))


def _walk(value: Any, place: tuple[Any, ...], bounds: Bounds) -> int:
    """The size of a value in characters and values. Raises RefusedError at what is out of bounds."""
    level, size, values = [(place, value)], 0, 0
    for _ in range(MAX_DEPTH):
        below: list[tuple[tuple[Any, ...], Any]] = []
        for where, item in level:
            values += 1
            if isinstance(item, str):
                size += len(item)
                if len(item) > MAX_NAME and where and where[0] in NAMES:
                    raise _refused(where, f"has {len(item)} characters, at most {MAX_NAME}", "string_above_max_length")
            elif isinstance(item, int):
                if item not in INT64:
                    raise _refused(where, "is beyond 64 bits", _side(item))
            elif isinstance(item, list):
                if not _are_token_ids(item, where, bounds):
                    below.extend(((*where, index), child) for index, child in enumerate(item))
            elif isinstance(item, dict):
                _check_length(item, where, bounds)
                size += sum(map(len, item))
                below.extend(((*where, key), child) for key, child in item.items())
        size += len(level)
        if values + len(below) > MAX_VALUES:
            raise _refused(place, f"has more than {MAX_VALUES} values", "array_above_max_length")
        if not below:
            return size
        level = below
    raise _refused(place, f"is nested more than {MAX_DEPTH} deep", "invalid_value")


def _check_length(items: Sized, where: tuple[Any, ...], bounds: Bounds) -> None:
    most = MORE_ITEMS.get(str(where[0]), MAX_ITEMS) if len(where) == 1 else MAX_ITEMS
    if where == ("input",):
        most = bounds.input_items
    if len(where) > 1 and where[-1] == "properties":
        most = MAX_PROPERTIES
    if len(items) > most:
        raise _refused(where, f"has {len(items)} items, at most {most}", "array_above_max_length")


def _are_token_ids(items: list[Any], where: tuple[Any, ...], bounds: Bounds) -> bool:
    """Whether an array holds token ids and need not be walked. Raises RefusedError if it is too long, or mixed."""
    field = str(where[0]) if where else ""
    may_be = field in bounds.token_fields or field.endswith("_token_ids")
    kinds = set(map(type, items))
    if may_be and kinds == {int}:
        for bound in (min(items), max(items)):
            if not 0 <= bound <= MAX_TOKEN_ID:
                raise _refused(where, f"holds {bound}, which is no token id", _side(bound))
        if len(items) > MAX_TOKEN_IDS and field != "prompt":
            raise _refused(where, f"has {len(items)} token ids, at most {MAX_TOKEN_IDS}", "array_above_max_length")
        return True
    _check_length(items, where, bounds)
    if field == "prompt" and len(kinds) > 1:
        raise _refused(where, "mixes types: expected strings, token ids, or arrays of token ids", "invalid_type")
    return False


def _check_sequences(body: dict[str, Any], most: int, bounds: Bounds) -> None:
    n = body.get("n", 1) if bounds.multiplied else 1
    n = n if isinstance(n, int) and n > 0 else 1
    sizes = {field: _batch(body[field], bounds) for field in bounds.batches if field in body}
    count = n * math.prod(sizes.values()) if bounds.multiplied else sum(sizes.values())
    if count > most:
        fewer = "prompts in a request, or a smaller n" if bounds.multiplied else "inputs in a request"
        raise RefusedError(
            f"the request asks for {count} sequences, expected at most {most}: send fewer {fewer} "
            "(http.max_sequences_per_request)",
            param="n" if n > 1 else max(sizes, key=lambda field: sizes[field]),
            code="integer_above_max_value" if n > 1 else "array_above_max_length",
        )


def _batch(value: Any, bounds: Bounds) -> int:
    """How many inputs an array stands for: one if it is a list of token ids or of a conversation's messages."""
    if not isinstance(value, list) or not value:
        return 1
    is_document = not bounds.multiplied and isinstance(value[0], dict) and "role" not in value[0]
    return len(value) if is_document or isinstance(value[0], str | list) else 1


def _refused(where: tuple[Any, ...], what: str, code: str) -> RefusedError:
    param = param_of(where) or None
    return RefusedError(f"{param or 'the request body'} {what}", param=param, code=code)


def _side(number: int) -> str:
    return "integer_above_max_value" if number > 0 else "integer_below_min_value"
