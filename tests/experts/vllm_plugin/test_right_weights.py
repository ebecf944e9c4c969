"""A router and its shards have the weights of the checkpoint, or are refused by name: whatever happened to its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.spoiled_checkpoints import STEPS
from tests.support.zygote.engine_zygote import Zygote

NUM_CASES = 300
CASES_S = 400.0  # 40 s on two cores of their own


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("weights") / "zygote", "engine", "weights_jobs")
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def cases(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cases")
    job = zygote.start("cases", folder=str(folder), seeds=list(range(NUM_CASES)))
    return zygote.wait(job, "cases", CASES_S)


def test_no_case_gives_other_weights(cases: list[dict[str, Any]]) -> None:
    """Bytes equal to the intact model's, in vLLM's parameters and in every expert, give its tokens (test_layer.py)."""
    assert [case for case in cases if case["wrong"]] == []


def test_every_refusal_names_a_tensor_or_file_at_fault(cases: list[dict[str, Any]]) -> None:
    refused = [case for case in cases if case["refusal"] is not None]
    assert [c for c in refused if not any(name in c["refusal"] for name in c["culprits"])] == []


def test_what_is_in_order_is_served(cases: list[dict[str, Any]]) -> None:
    assert [case for case in cases if not case["culprits"] and case["refusal"] is not None] == []


def test_the_cases_are_of_every_kind_and_both_ends_occur(cases: list[dict[str, Any]]) -> None:
    assert len(cases) == NUM_CASES
    steps = Counter(step for case in cases for step in case["steps"])
    assert set(steps) == set(STEPS)
    assert min(steps.values()) > 10
    served = sum(case["refusal"] is None for case in cases)
    assert NUM_CASES / 10 < served < NUM_CASES / 2
    assert {case["side"] for case in cases} == {"both", "router", "shard"}
