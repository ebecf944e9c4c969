"""What the front door takes for granted of vLLM: its keys, its exceptions, its engine client."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI

pytest.importorskip("vllm", reason="vLLM's HTTP side")

from cluster.http import vllm_joints
from tests.support.waiting import run_async


def app_with_a_key() -> FastAPI:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "m", "--api-key", "vllms-own"])
    return build_app(args, ("generate",), None)


def test_options_that_the_front_end_reads_are_made_objects() -> None:
    """As vLLM's own command makes them, of the mappings that a config has."""
    made = vllm_joints.front_end_options({"structured_outputs_config": {"enable_in_reasoning": True}, "seed": 0})
    assert list(made) == ["structured_outputs_config"]
    assert made["structured_outputs_config"].enable_in_reasoning
    assert vllm_joints.front_end_options({"seed": 0}) == vllm_joints.front_end_options(made) == {}


def test_vllms_own_keys_become_the_doors() -> None:
    import hashlib

    vllm_app = app_with_a_key()
    before = len(vllm_app.user_middleware)
    assert vllm_joints.take_keys(vllm_app) == {hashlib.sha256(b"vllms-own").digest()}
    assert len(vllm_app.user_middleware) == before - 1
    assert vllm_joints.take_keys(vllm_app) == frozenset()


def test_the_engine_client_has_the_methods_that_are_wrapped() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient

    assert list(inspect.signature(AsyncLLM.add_request).parameters)[1:4] == ["request_id", "prompt", "params"]
    for method in (AsyncLLM.generate, AsyncLLM.encode):
        assert inspect.isasyncgenfunction(method), "`count_tokens` takes its place as one"
    assert list(inspect.signature(AsyncLLM.generate).parameters)[1:3] == ["prompt", "sampling_params"]
    assert "self.add_request(" in inspect.getsource(AsyncLLM.generate)
    assert list(inspect.signature(AsyncMPClient.add_request_async).parameters) == ["self", "request"]
    assert {"internal"} <= set(inspect.signature(AsyncLLM.abort).parameters)
    assert isinstance(AsyncLLM.errored, property)


class Engine:
    """An engine client that cannot send what it is asked to."""

    def __init__(self, error: Exception, errored: bool = False) -> None:
        self.errored, self.aborted, self.engine_core = errored, [], self
        self._error = error
        self.model_config = self

    def get_vocab_size(self) -> int:
        return 1000

    async def add_request(self, request_id: str, prompt: Any, params: Any, *, priority: int = 0) -> str:
        await self.engine_core.add_request_async(self)
        return f"{request_id} {priority}"

    async def add_request_async(self, request: Any) -> None:
        if self._error is not None:
            raise self._error

    async def abort(self, request_id: Any, internal: bool) -> None:
        assert internal
        self.aborted.append(request_id)

    async def generate(self, *outputs: Any) -> AsyncIterator[Any]:
        try:
            for output in outputs:
                yield output
        finally:
            self.closed = True

    encode = generate

    request_id = "inner"


class Params:
    def __init__(self, prompt_logprobs: int | None = None) -> None:
        self.prompt_logprobs = prompt_logprobs


PROMPT = {"type": "token", "prompt_token_ids": [5] * 10}


def test_what_the_engine_cannot_be_sent_is_the_clients_mistake_and_forgotten() -> None:
    from vllm.exceptions import VLLMValidationError

    engine = Engine(OverflowError("can't serialize ints >= 2**64"))
    vllm_joints.guard_engine(engine, 100)
    with pytest.raises(VLLMValidationError, match="the engine cannot take this request: OverflowError: can't"):
        run_async(engine.add_request("outer", PROMPT, Params()))
    assert engine.aborted == ["inner"]


@pytest.mark.parametrize("errored", [False, True])
def test_what_the_engine_says_itself_stays_as_it_is(errored: bool) -> None:
    from vllm.exceptions import QueueOverflowError
    from vllm.v1.engine.exceptions import EngineDeadError

    for error in (EngineDeadError(), QueueOverflowError(), *([ValueError("x")] if errored else [])):
        engine = Engine(error, errored)
        vllm_joints.guard_engine(engine, 100)
        with pytest.raises(type(error)):
            run_async(engine.add_request("outer", PROMPT, Params()))


def test_a_request_that_the_engine_takes_passes_with_all_its_arguments() -> None:
    engine: Any = Engine(None)  # type: ignore[arg-type]
    vllm_joints.guard_engine(engine, 100)
    assert run_async(engine.add_request("outer", PROMPT, Params(), priority=3)) == "outer 3"
    assert engine.aborted == []


@pytest.mark.parametrize(("asked", "passes"), [(None, True), (0, True), (9, True), (10, False), (-1, False)])
def test_log_probabilities_of_the_prompt_are_counted(asked: int | None, passes: bool) -> None:
    from vllm.exceptions import VLLMValidationError

    engine: Any = Engine(None)  # type: ignore[arg-type]
    vllm_joints.guard_engine(engine, 100)
    if passes:
        assert run_async(engine.add_request("outer", PROMPT, Params(asked)))
    else:
        with pytest.raises(VLLMValidationError, match="max_prompt_logprobs") as found:
            run_async(engine.add_request("outer", PROMPT, Params(asked)))
        assert found.value.parameter == "prompt_logprobs"


def output(finish_reason: str | None, stop_reason: str | None) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(finish_reason=finish_reason, stop_reason=stop_reason)])


def test_a_request_that_ended_for_want_of_experts_is_told_apart_from_other_errors() -> None:
    from vllm.exceptions import RetryableRequestError

    engine: Any = Engine(None)  # type: ignore[arg-type]
    vllm_joints.guard_engine(engine, 100)
    good = [output(None, None), output("error", None), output("stop", "experts_unavailable")]

    async def taken(*outputs: Any) -> list[Any]:
        return [one async for one in engine.generate(*outputs)]

    assert run_async(taken(*good)) == good
    with pytest.raises(RetryableRequestError, match=f"^{vllm_joints.EXPERTS_UNAVAILABLE}$"):
        run_async(taken(good[0], output("error", "experts_unavailable"), good[0]))
    assert engine.closed


def test_a_prompt_that_lacked_experts_is_no_embedding() -> None:
    """The engine has to answer something, and an empty tensor is no answer of any pooler."""
    from vllm.exceptions import RetryableRequestError

    engine: Any = Engine(None)  # type: ignore[arg-type]
    vllm_joints.guard_engine(engine, 100)
    pooled, nothing = (
        SimpleNamespace(finished=True, outputs=SimpleNamespace(data=torch.empty(size))) for size in (1, 0)
    )

    async def taken(*outputs: Any) -> list[Any]:
        return [one async for one in engine.encode(*outputs)]

    assert run_async(taken(pooled)) == [pooled]
    with pytest.raises(RetryableRequestError, match=f"^{vllm_joints.EXPERTS_UNAVAILABLE}$"):
        run_async(taken(nothing))
    assert engine.closed


def test_the_engines_own_encode_is_what_the_routes_call() -> None:
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.v1.engine.async_llm import AsyncLLM

    assert inspect.isasyncgenfunction(AsyncLLM.encode)
    assert "self.engine_client.encode(" in inspect.getsource(PoolingBaseServing)


def test_the_engines_own_generate_is_what_the_routes_call() -> None:
    from vllm.entrypoints.openai.chat_completion import serving as chat
    from vllm.entrypoints.openai.completion import serving as completions
    from vllm.v1.engine.async_llm import AsyncLLM

    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    for module in (chat, completions):
        assert "self.engine_client.generate(" in inspect.getsource(module)
