"""Engine options that change how tokens are made, with the experts on two shards: the tokens stay what they are.

Float32, greedy. Each engine is one of its own, so each makes all batches that its tests look at.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.draft_heads import TINY, SameAgain, config_alone, dense_draft, dflash, eagle, eagle3, medusa
from tests.support.zygote.engine_zygote import Zygote

NEW_TOKENS = 24
# Token ids: what repeats itself, one token, and what is as long as several blocks of the cache.
REPEATED, ALONE, LONG = [374, 290, 13, 81] * 4, [374], list(range(300, 440))
BATCHES = [[REPEATED, ALONE, LONG], [LONG]]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


class Engines:
    """Runs of the tiny model with engine options, each started once."""

    def __init__(self, zygote: Zygote, membership: dict[str, Any]) -> None:
        self._zygote, self._membership = zygote, membership
        self._runs: dict[str, dict[str, Any]] = {}

    def run(self, on_shards: bool = True, **options: Any) -> dict[str, Any]:
        """What an engine with these options made; `on_shards`: not plain vLLM."""
        name = json.dumps([on_shards, options], sort_keys=True)
        if name not in self._runs:
            membership = self._membership if on_shards else None
            job = self._zygote.start(
                "generate",
                model=str(TINY), batches=BATCHES, max_tokens=NEW_TOKENS, options=options, membership=membership,
            )  # fmt: skip
            self._zygote.wait(job, "done")
            self._runs[name] = self._zygote.events(job)
        return self._runs[name]


@pytest.fixture(scope="module")
def engines(feature_zygote: Zygote, membership: dict[str, Any]) -> Engines:
    return Engines(feature_zygote, membership)


def check_tokens(run: dict[str, Any], expected: dict[str, Any]) -> None:
    assert run["error"] is None
    assert run["ids"] == expected["ids"]
    assert (run["status"]["failovers"], run["status"]["fallback_pairs"]) == (0, 0)


def test_prefix_caching_takes_over_blocks_and_changes_no_token(engines: Engines) -> None:
    cached, without = engines.run(block_size=32), engines.run(enable_prefix_caching=False)
    check_tokens(cached, without)
    assert cached["counters"]["vllm:prefix_cache_hits"] == len(LONG) // 32 * 32
    assert without["counters"]["vllm:prefix_cache_hits"] == 0
    assert cached["status"]["rows"] < without["status"]["rows"], "what is cached is not dispatched again"


def test_a_prompt_in_chunks_gives_the_same_tokens(engines: Engines) -> None:
    chunked, whole = engines.run(max_num_batched_tokens=48), engines.run(block_size=32)
    check_tokens(chunked, whole)
    assert chunked["status"]["steps"] > whole["status"]["steps"]


def test_what_is_sampled_of_a_prompt_are_the_experts_that_its_own_rows_take(engines: Engines) -> None:
    """Judged by transformers. The last prompt is in the cache but for its end, whose rows are the last ones."""
    found = engines.run(block_size=32)["prompts"]
    assert [tokens for tokens, _, _ in found] == [REPEATED, LONG, LONG], "one row says nothing"
    assert {num_experts for _, _, num_experts in found} == {32}
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rows = {0: range(16), 1: [row * 140 // 32 for row in range(32)], 2: range(128, 140)}
    for (tokens, ids_RLK, _), rows_R in zip(found, rows.values(), strict=True):
        with torch.no_grad():
            logits_LTE = model(torch.tensor([tokens]), output_router_logits=True).router_logits
        expected_LRK = [logits_TE[list(rows_R)].topk(4).indices.sort().values for logits_TE in logits_LTE]
        torch.testing.assert_close(torch.tensor(ids_RLK).sort().values, torch.stack(expected_LRK, 1))


def test_asynchronous_scheduling_gives_the_same_tokens(engines: Engines) -> None:
    check_tokens(engines.run(async_scheduling=True), engines.run(block_size=32))


def test_fp8_kv_cache_gives_the_tokens_of_vllm_with_one(engines: Engines) -> None:
    run = engines.run(kv_cache_dtype="fp8")
    check_tokens(run, engines.run(on_shards=False, kv_cache_dtype="fp8"))
    assert run["ids"] != engines.run(block_size=32)["ids"], "it rounds, so it is in use"


def test_ngram_speculation_accepts_guesses_and_changes_no_token(engines: Engines) -> None:
    run = engines.run(speculative_config=NGRAM)
    check_tokens(run, engines.run(block_size=32))
    assert run["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0


def test_guessed_rows_count_as_generated_and_not_as_a_prompt(engines: Engines) -> None:
    """A request has up to four rows a step while it generates, of which the planner must not make a prompt."""
    plain, guessing = engines.run(enable_prefix_caching=False), engines.run(speculative_config=NGRAM)
    of_prompts = len(REPEATED) + 2 * len(LONG)
    assert plain["observed"][1] == of_prompts
    counters = guessing["counters"]
    assert guessing["observed"][1] == of_prompts - counters["vllm:prefix_cache_hits"]
    guessed = counters["vllm:spec_decode_num_draft_tokens"]
    assert plain["observed"][0] < guessing["observed"][0] <= plain["observed"][0] + guessed


def test_a_dense_draft_model_changes_no_token(engines: Engines, tmp_path: Path) -> None:
    """It is loaded whole, by vLLM's own loader, and its layers ask no shard."""
    speculative = {"method": "draft_model", "model": str(dense_draft(tmp_path)), "num_speculative_tokens": 2}
    run = engines.run(speculative_config=speculative)
    check_tokens(run, engines.run(block_size=32))
    assert run["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert run["status"]["dispatches"] == run["status"]["layers"] * run["status"]["steps"]


@pytest.mark.parametrize("method", [medusa, eagle, eagle3])
def test_heads_without_experts_change_no_token(
    engines: Engines, method: Callable[[Path], Path], tmp_path: Path
) -> None:
    """And as many of their guesses are right as in plain vLLM: EAGLE 3 gets the states of several layers."""
    speculative = {"method": method.__name__, "model": str(method(tmp_path)), "num_speculative_tokens": 2}
    run = engines.run(speculative_config=speculative)
    check_tokens(run, engines.run(block_size=32))
    assert run["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert run["status"]["dispatches"] == run["status"]["layers"] * run["status"]["steps"]
    if method is eagle3:
        plain = engines.run(on_shards=False, speculative_config=speculative)
        for counted in ("draft", "accepted"):
            name = f"vllm:spec_decode_num_{counted}_tokens"
            assert run["counters"][name] == plain["counters"][name]


def test_guesses_that_are_made_at_once_change_no_token(engines: Engines, tmp_path: Path) -> None:
    """By a draft model (PARD) and by a DFlash head, which guesses what the model says most often."""
    whole = engines.run(block_size=32)
    [(most_often, _)] = Counter(token for batch in whole["ids"] for ids in batch for token in ids).most_common(1)
    folders = {name: tmp_path / name for name in ("pard", "dflash")}
    for folder in folders.values():
        folder.mkdir()
    for speculative in (
        {"method": "draft_model", "model": str(dense_draft(folders["pard"], pard_token=1)), "parallel_drafting": True},
        {"method": "dflash", "model": str(dflash(folders["dflash"], most_often))},
    ):
        run = engines.run(speculative_config={**speculative, "num_speculative_tokens": 2})
        check_tokens(run, whole)
        assert run["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0


def test_a_class_of_ones_own_may_guess(engines: Engines) -> None:
    run = engines.run(
        speculative_config={
            "method": "custom_class",
            "model": f"{SameAgain.__module__}.{SameAgain.__name__}",
            "num_speculative_tokens": 1,
        }
    )
    check_tokens(run, engines.run(block_size=32))
    assert run["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("ngram_gpu", "pin_memory=True requires a CUDA or other accelerator backend"),
        ("dspark", "Model Runner V1 does not support: dspark speculative decoding"),
        ("mlp_speculator", "Model architectures ['MLPSpeculatorPreTrain"),
    ],
    ids=["ngram_gpu", "dspark", "mlp_speculator"],
)
def test_other_ways_to_guess_are_refused_by_vllm_on_cpus(
    engines: Engines, tmp_path: Path, method: str, told: str
) -> None:
    speculative: dict[str, Any] = {"method": method, "num_speculative_tokens": 2}
    if method == "ngram_gpu":
        speculative |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    else:
        speculative["model"] = str(config_alone(tmp_path, method))
    assert told in engines.run(speculative_config=speculative)["error"]


def test_suffix_decoding_is_refused_by_vllm_without_its_package(engines: Engines) -> None:
    error = engines.run(speculative_config={"method": "suffix"})["error"]
    assert "Arctic Inference is required for suffix decoding" in error


def test_a_connector_of_vllms_takes_over_blocks_and_changes_no_token(engines: Engines, tmp_path: Path) -> None:
    """The second time, out of files: without a prefix cache the engine has no blocks of its own."""
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    run = engines.run(kv_transfer_config=transfer, enable_prefix_caching=False, block_size=32)
    without = engines.run(enable_prefix_caching=False)
    check_tokens(run, without)
    assert run["counters"]["vllm:external_prefix_cache_hits"] == len(LONG) // 32 * 32
    assert run["status"]["rows"] < without["status"]["rows"]


def test_a_draft_model_with_experts_is_refused_by_name(engines: Engines) -> None:
    speculative = {"method": "draft_model", "model": str(TINY), "num_speculative_tokens": 2}
    error = engines.run(speculative_config=speculative)["error"]
    assert "mlp.experts is a MoE layer of the draft (draft_model), whose experts are on no shard" in error


def test_sleep_mode_is_refused_by_vllm_on_cpus(engines: Engines) -> None:
    assert "Sleep mode is not supported on current platform" in engines.run(enable_sleep_mode=True)["error"]
