"""Engine options that change how tokens are made, with the experts on two shards: the tokens stay what they are.

Float32, greedy. Each engine is one of its own, so each makes all batches that its tests look at.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.zygote.engine_zygote import Zygote

TINY = Path(__file__).parents[3] / "examples" / "tiny-moe"
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


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its experts, as a dense model that guesses well enough now and then."""
    folder, width = tmp_path_factory.mktemp("draft"), 16
    config = json.loads((TINY / "config.json").read_text())
    tensors = {name: t for name, t in load_file(TINY / "model.safetensors").items() if ".mlp." not in name}
    hidden = config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")
    kept = {key: value for key, value in config.items() if "expert" not in key and "moe" not in key}
    kept |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": width}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


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


def test_a_dense_draft_model_changes_no_token(engines: Engines, draft: Path) -> None:
    """It is loaded whole, by vLLM's own loader, and its layers ask no shard."""
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    run = engines.run(speculative_config=speculative)
    check_tokens(run, engines.run(block_size=32))
    assert run["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert run["status"]["dispatches"] == run["status"]["layers"] * run["status"]["steps"]


@pytest.fixture(scope="module")
def medusa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads, each of which guesses what the model says next once more."""
    folder = tmp_path_factory.mktemp("medusa")
    hidden, vocab, embedding = _sizes()
    tensors = {}
    for head in range(2):
        tensors[f"blocks.{head}.layers.0.weight"] = torch.zeros(hidden, hidden)
        tensors[f"lm_heads.{head}.weight"] = embedding.clone()
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": hidden, "vocab_size": vocab}
    (folder / "config.json").write_text(json.dumps({**config, "num_heads": 2, "num_hidden_layers": 1}))
    return folder


@pytest.fixture(scope="module")
def eagle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer that hands on the model's last state, so that it guesses what the model says next once more."""
    folder, width = tmp_path_factory.mktemp("eagle"), 16
    hidden, vocab, _ = _sizes()
    tensors = {"fc.weight": torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1)}
    for name in "qkvo":
        tensors[f"layers.0.self_attn.{name}_proj.weight"] = torch.zeros(hidden, hidden)
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        tensors[f"layers.0.mlp.{name}_proj.weight"] = torch.zeros(shape)
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocab}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": width}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return folder


def _sizes() -> tuple[int, int, torch.Tensor]:
    """Hidden size, vocabulary and embedding of the tiny model."""
    embedding = load_file(TINY / "model.safetensors")["model.embed_tokens.weight"]
    return embedding.shape[1], embedding.shape[0], embedding


@pytest.mark.parametrize("method", ["medusa", "eagle"])
def test_heads_without_experts_change_no_token(engines: Engines, request: pytest.FixtureRequest, method: str) -> None:
    folder: Path = request.getfixturevalue(method)
    speculative = {"method": method, "model": str(folder), "num_speculative_tokens": 2}
    run = engines.run(speculative_config=speculative)
    check_tokens(run, engines.run(block_size=32))
    assert run["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert run["status"]["dispatches"] == run["status"]["layers"] * run["status"]["steps"]


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
