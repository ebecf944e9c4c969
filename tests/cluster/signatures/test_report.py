"""A router's end: what it tells request routers of the prompts that its engine computed."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.signatures import ray_joints
from cluster.signatures.messages import KEY, MOST_PAIRS, SignatureReport
from cluster.signatures.report import Signatures
from cluster.signatures.text import features
from cluster.signatures.usage import signature
from placement.traces.prompts import PromptSample
from tests.support.signature_scene import EXPERTS, rows_of_kind, text_of_kind
from tests.support.waiting import asynchronous


def sample(kind: int, seed: int) -> PromptSample:
    """A prompt whose one token is `seed`, whose text `text_of` gives."""
    return PromptSample([kind, seed], rows_of_kind(kind, seed), EXPERTS)


def text_of(tokens: list[int]) -> str:
    return text_of_kind(*tokens)


async def nothing() -> list[PromptSample]:
    return []


def test_each_prompt_is_told_once_as_its_text_and_its_experts() -> None:
    signatures = Signatures(nothing, text_of)
    assert signatures.stats() == {}
    signatures.add([sample(0, 1), sample(1, 2)])
    stats = signatures.stats()
    report = SignatureReport.from_stats(stats)
    assert report is not None
    assert report.number == 1
    for place, (kind, seed) in enumerate([(0, 1), (1, 2)]):
        np.testing.assert_array_equal(report.features_NF[place], features(text_of_kind(kind, seed)))
        np.testing.assert_array_equal(report.signatures_NW[place], signature(rows_of_kind(kind, seed), EXPERTS))
    assert signatures.stats() is stats, "Serve hands on what changed alone"
    signatures.add([sample(1, 3)])
    again = SignatureReport.from_stats(signatures.stats())
    assert again is not None
    assert (again.number, len(again.features_NF)) == (2, 1)


def test_a_report_is_bounded_and_its_mean_follows_what_is_computed() -> None:
    signatures = Signatures(nothing, text_of)
    signatures.add([sample(0, seed) for seed in range(200)])
    signatures.add([sample(2, seed) for seed in range(300)])
    stats = signatures.stats()
    report = SignatureReport.from_stats(stats)
    assert report is not None
    assert len(report.features_NF) == MOST_PAIRS
    assert sum(map(len, stats[KEY][1:])) <= 20.1 * 1024
    mean_2 = np.mean([signature(rows_of_kind(2, seed), EXPERTS) for seed in range(300)], axis=0)
    assert np.abs(report.mean_W - mean_2).max() < 15, "of 127; what was before is faded to 1 %, rounding and noise stay"


def test_prompts_without_text_or_experts_are_not_told() -> None:
    signatures = Signatures(nothing, lambda tokens: "")
    signatures.add([sample(0, 1)])
    assert signatures.stats() == {}
    signatures = Signatures(nothing, text_of)
    signatures.add([PromptSample([0, 1], np.full((4, 2, 2), -1, np.int16), EXPERTS)])
    assert signatures.stats() == {}


@asynchronous
async def test_an_engine_that_does_not_answer_is_asked_again() -> None:
    answers = iter([RuntimeError("silent"), [sample(0, 1)]])
    done = asyncio.Event()

    async def take() -> list[PromptSample]:
        answer = next(answers, None)
        if answer is None:  # so the one before was taken in
            done.set()
            return []
        if isinstance(answer, Exception):
            raise answer
        return answer

    signatures = Signatures(take, text_of)
    task = asyncio.create_task(signatures.follow(0.0))
    await done.wait()
    task.cancel()
    report = SignatureReport.from_stats(signatures.stats())
    assert report is not None
    assert len(report.features_NF) == 1


def test_an_engines_tokenizer_makes_the_text() -> None:
    pytest.importorskip("ray.serve.llm", reason="ray.serve.llm needs vllm")
    from ray.serve.llm.deployment import LLMServer
    from vllm.v1.engine.async_llm import AsyncLLM

    assert callable(AsyncLLM.get_tokenizer)
    assert "self.engine.routing_stats()" in inspect.getsource(LLMServer.record_routing_stats)
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: f"{tokens} {skip_special_tokens}")
    server: Any = SimpleNamespace(
        engine=SimpleNamespace(_engine_client=SimpleNamespace(get_tokenizer=lambda: tokenizer))
    )
    assert ray_joints.text_of_tokens(server)([1, 2]) == "[1, 2] True"
