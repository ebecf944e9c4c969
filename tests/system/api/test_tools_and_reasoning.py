"""Tool calls and reasoning on the tiny model's chat template, which knows neither: grammars make the model say them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.model_api import ModelApi

CHAT: list[Any] = [{"role": "user", "content": "Document the function os.path.join"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "parameters": PARAMETERS}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
CALL = r'<tool_call>\n\{"name": "weather", "arguments": \{"city": "(Rome|Oslo)"\}\}\n</tool_call>'


def check_arguments(text: str) -> None:
    found = json.loads(text)
    assert found.keys() == {"city"}
    assert found["city"] in ("Rome", "Oslo")


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "weather"}}, "required"])
def test_a_forced_tool_call_has_valid_arguments(api: ModelApi, choice: Any) -> None:
    """It ends after the first: the tiny model would go on."""
    answer = api.client.chat.completions.create(
        model=api.model,
        **{"messages": CHAT, "max_tokens": 64, "temperature": 0, "tool_choice": choice, "stop": ["</tool_call>"]},
        tools=[{"type": "function", "function": {**WEATHER, "strict": True}}],
        extra_body={"include_stop_str_in_output": True},
    )
    calls: Any = answer.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["weather"]
    check_arguments(calls[0].function.arguments)


def test_a_call_that_the_model_chooses_is_found_in_its_text(api: ModelApi) -> None:
    """Streamed or not; the engine option tool_call_parser says how it is written."""
    asked: dict[str, Any] = {
        "model": api.model,
        **{"messages": CHAT, "max_tokens": 128, "temperature": 0, "tools": TOOLS, "tool_choice": "auto"},
        "extra_body": {"structured_outputs": {"regex": CALL}},
    }
    choice = api.client.chat.completions.create(**asked).choices[0]
    calls: Any = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    assert [call.function.name for call in calls] == ["weather"]
    check_arguments(calls[0].function.arguments)
    chunks = api.client.chat.completions.create(**asked, stream=True)
    parts = [part.function for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(part.name or "" for part in parts) == "weather"
    assert "".join(part.arguments or "" for part in parts) == calls[0].function.arguments


def test_an_answer_without_a_call_stays_text(api: ModelApi) -> None:
    answer = api.client.chat.completions.create(
        model=api.model, messages=CHAT, max_tokens=8, temperature=0, tools=TOOLS, tool_choice="auto"
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_what_the_chat_template_does_not_know_is_refused_in_its_words(api: ModelApi) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *CHAT,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    status, error = api.refused("/v1/chat/completions", messages=messages, max_tokens=2)
    assert (status, error["message"]) == (400, "role tool: expected system, user or assistant")


def test_reasoning_is_told_apart_from_the_answer(api: ModelApi) -> None:
    """Streamed or not; the engine option reasoning_parser says how it is marked."""
    asked: dict[str, Any] = {
        "model": api.model,
        **{"messages": CHAT, "max_tokens": 48, "temperature": 0},
        "extra_body": {
            "chat_template_kwargs": {"enable_thinking": True},
            "structured_outputs": {"regex": "<think>it joins</think>(yes|no)"},
        },
    }
    message: Any = api.client.chat.completions.create(**asked).choices[0].message
    assert message.reasoning == "it joins"
    assert message.content in ("yes", "no")
    deltas: Any = [chunk.choices[0].delta for chunk in api.client.chat.completions.create(**asked, stream=True)]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "it joins"
    assert "".join(delta.content or "" for delta in deltas) == message.content
