"""What a grammar asks for is what comes, from a model that would say something else."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.support.model_api import ModelApi

CHAT: list[Any] = [{"role": "user", "content": "Document the function os.path.join"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["join", "split"]}, "args": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "args"],
    "additionalProperties": False,
}


def said(api: ModelApi, **asked: Any) -> str:
    answer = api.client.chat.completions.create(model=api.model, messages=CHAT, max_tokens=48, temperature=0, **asked)
    assert answer.choices[0].finish_reason == "stop"
    return str(answer.choices[0].message.content)


def check_schema(text: str) -> None:
    found = json.loads(text)
    assert found.keys() == {"name", "args"}
    assert found["name"] in ("join", "split")
    assert found["args"] in range(10)


def test_a_json_schema_is_kept(api: ModelApi) -> None:
    check_schema(said(api, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}))
    check_schema(said(api, extra_body={"structured_outputs": {"json": SCHEMA}}))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"choice": ["yes", "perhaps"]}, "yes|perhaps"),
        ({"grammar": 'root ::= ("ab" | "cd") "-" [0-9]'}, "(ab|cd)-[0-9]"),
    ],
)
def test_regex_choice_and_grammar_are_kept(api: ModelApi, asked: dict[str, Any], expected: str) -> None:
    assert re.fullmatch(expected, said(api, extra_body={"structured_outputs": asked}))


def test_a_structural_tag_has_its_schema_between_its_ends(api: ModelApi) -> None:
    """As the format of the answer, and as vLLM's own field."""
    tag = {"begin": "<call>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</call>"}
    tags = {"type": "triggered_tags", "triggers": ["<call>"], "tags": [{"type": "tag", **tag}]}
    tags |= {"at_least_one": True, "stop_after_first": True}
    whole = {"type": "structural_tag", "format": tags}
    for asked in ({"response_format": whole}, {"structured_outputs": {"structural_tag": json.dumps(whole)}}):
        text = said(api, extra_body=asked)
        assert text.startswith("<call>")
        assert text.endswith("</call>")
        check_schema(text.removeprefix("<call>").removesuffix("</call>"))


def test_a_streamed_answer_keeps_its_grammar(api: ModelApi) -> None:
    chunks = api.client.completions.create(
        model=api.model, prompt="def", max_tokens=16, stream=True, extra_body={"structured_outputs": {"regex": "ab{5}"}}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abbbbb"


def test_a_grammar_that_cannot_be_followed_is_refused(api: ModelApi) -> None:
    status, error = api.refused("/v1/completions", prompt="def", structured_outputs={"regex": "("})
    assert (status, error["code"]) == (400, "invalid_value")
