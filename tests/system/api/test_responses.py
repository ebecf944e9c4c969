"""/v1/responses, vLLM's own implementation, through the openai package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.model_api import ModelApi
from tests.support.waiting import wait_for
from tests.support.zygote.engine_zygote import Zygote

TINY = Path(__file__).parents[3] / "examples" / "tiny-moe"
INPUT = "Document the function os.path.join"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def storing(feature_zygote: Zygote, membership: dict[str, Any]) -> Iterator[ModelApi]:
    """The same service with the environment variable that has its router keep responses."""
    job = feature_zygote.start(
        "serve",
        model=str(TINY), model_id="tiny-moe", engine_kwargs={}, membership=membership,
        env_vars={"VLLM_ENABLE_RESPONSES_API_STORE": "1"},
    )  # fmt: skip
    yield ModelApi(feature_zygote.wait(job, "url"), "tiny-moe")
    feature_zygote.stop(job)


def test_a_response_says_what_a_chat_says(api: ModelApi) -> None:
    """Streamed too."""
    asked: dict[str, Any] = {"model": api.model, "input": INPUT, "max_output_tokens": 12, "temperature": 0}
    chat = api.client.chat.completions.create(
        model=api.model, messages=[{"role": "user", "content": INPUT}], max_tokens=12, temperature=0
    )
    whole = api.client.responses.create(**asked)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage is not None
    assert chat.usage is not None
    assert whole.usage.output_tokens == chat.usage.completion_tokens
    events: list[Any] = list(api.client.responses.create(**asked, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text


def test_a_response_keeps_the_format_of_its_text(api: ModelApi) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True}}
    answer = api.client.responses.create(model=api.model, input=INPUT, max_output_tokens=48, temperature=0, text=text)
    assert json.loads(answer.output_text)["city"] in ("Rome", "Oslo")


def test_a_response_calls_a_function(api: ModelApi) -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}]
    answer = api.client.responses.create(
        model=api.model, input=INPUT, max_output_tokens=64, temperature=0, tools=tools, tool_choice="required"
    )
    [call] = [each for each in answer.output if each.type == "function_call"]
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")


def test_a_stored_response_is_gone_on_with_and_found_again(storing: ModelApi) -> None:
    """What goes on with one says what a conversation says that is sent whole."""
    asked: dict[str, Any] = {"model": storing.model, "max_output_tokens": 12, "temperature": 0}
    responses = storing.client.responses
    first = responses.create(**asked, input=INPUT)
    assert responses.retrieve(first.id).output_text == first.output_text
    whole: list[Any] = [
        {"role": "user", "content": INPUT},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "more"},
    ]
    second = responses.create(**asked, input="more", previous_response_id=first.id)
    together = responses.create(**asked, input=whole)
    assert second.output_text == together.output_text
    assert second.usage is not None
    assert together.usage is not None
    assert second.usage.input_tokens == together.usage.input_tokens > 2 * len("more")


def test_a_response_in_the_background_is_there_when_it_is_done(storing: ModelApi) -> None:
    responses = storing.client.responses
    asked: dict[str, Any] = {"model": storing.model, "input": INPUT, "max_output_tokens": 12, "temperature": 0}
    running = ("queued", "in_progress")
    begun = responses.create(**asked, background=True, store=True)
    assert begun.status in running
    done = wait_for(lambda: (r := responses.retrieve(begun.id)).status not in running and r, 60, "the response")
    assert done.output_text == responses.create(**asked).output_text


def test_what_is_not_stored_is_refused_with_the_remedy(api: ModelApi) -> None:
    """A conversation has to be sent whole; a background response has to be stored."""
    first = api.client.responses.create(model=api.model, input=INPUT, max_output_tokens=2)
    asked: dict[str, Any] = {"model": api.model, "input": "more", "max_output_tokens": 2}
    with pytest.raises(openai.NotFoundError, match="VLLM_ENABLE_RESPONSES_API_STORE"):
        api.client.responses.create(**asked, previous_response_id=first.id)
    with pytest.raises(openai.NotFoundError, match="VLLM_ENABLE_RESPONSES_API_STORE"):
        api.client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="does not support the background mode"):
        api.client.responses.create(**asked, background=True, store=True)
