"""What a router asks an engine that pools for, and what it takes for granted of it."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM's engine client")

from cluster.router.pooling import engine_pools, pool_one_token
from tests.support.waiting import run_async


class Engine:
    """Notes what it is asked to pool."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple[Any, Any, str]] = []
        self._error = error
        self.model_config = SimpleNamespace(
            get_pooling_task=lambda tasks: tasks[-1],
            pooler_config=SimpleNamespace(tok_pooling_type="ALL"),
            runner_type="pooling",
        )

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("token_classify", "classify")

    async def encode(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, request_id))
        if self._error is not None:
            raise self._error
        yield SimpleNamespace(finished=True)


def test_a_probe_is_a_prompt_of_one_token_for_the_task_of_the_model() -> None:
    engine = Engine()
    for _ in range(2):
        run_async(pool_one_token(engine))
    (prompt, params, first), (_, _, second) = engine.asked
    assert (prompt["prompt_token_ids"], params.task) == ([0], "classify")
    assert first != second, "requests at a time have names of their own"


def test_what_the_engine_raises_is_what_the_probe_raises() -> None:
    with pytest.raises(RuntimeError, match="no experts"):
        run_async(pool_one_token(Engine(RuntimeError("no experts"))))


def test_the_engine_says_what_it_does() -> None:
    client = Engine()
    server = SimpleNamespace(engine=SimpleNamespace(_engine_client=client))
    assert engine_pools(server)
    client.model_config.runner_type = "generate"
    assert not engine_pools(server)


def test_the_engine_client_is_asked_as_vllm_has_it() -> None:
    from vllm.config import ModelConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    assert list(inspect.signature(AsyncLLM.encode).parameters)[1:4] == ["prompt", "pooling_params", "request_id"]
    assert list(inspect.signature(ModelConfig.get_pooling_task).parameters) == ["self", "supported_tasks"]
    assert "self.runner_type = self._get_runner_type(" in inspect.getsource(ModelConfig)
