"""Adapters by name over HTTP, before a real engine with room for one: lists, answers, refusals, keys.

The oracle is transformers over the tiny model with the adapter merged into its weights, in float32.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from benchmarks.serving.fuzz_http.own_server import own_server
from cluster.keys.command import line_of
from tests.support.random_adapters import layers_of, merge, write_adapter, write_files
from tests.support.spoiled_checkpoints import TINY

MODEL = "tiny-moe"
PROMPT = [374, 353, 607, 13]  # def main(
NEW_TOKENS = 24
ROUTED = "base_model.model.model.layers.1.mlp.experts.7.up_proj.lora_A.weight"


@dataclass
class Door:
    """A server with adapters, a key for everything and one for one adapter alone, and the right tokens by model."""

    url: str
    keys: dict[str, str]
    expected: dict[str, list[int]]

    def client(self, key: str = "all") -> openai.OpenAI:
        return openai.OpenAI(api_key=self.keys[key], base_url=f"{self.url}/v1", max_retries=0, timeout=120)

    def tokens(self, model: str, key: str = "all") -> list[int]:
        answer: Any = self.client(key).completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=NEW_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        assert answer.model == model
        return answer.choices[0].token_ids


def greedy(model: Path) -> list[int]:
    from transformers import AutoModelForCausalLM

    engine = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids.append(int(engine(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vllm")
    home = tmp_path_factory.mktemp("adapters")
    adapters, expected = home / "adapters", {MODEL: greedy(TINY)}
    attention = layers_of(TINY, lambda layer: "self_attn" in layer)
    for seed, name in enumerate(("first", "second:v2"), start=1):
        adapter = write_adapter(adapters / name, TINY, attention, seed=seed, size=0.3)
        expected[f"{MODEL}:{name}"] = greedy(merge(TINY, adapter, home / f"merged-{seed}"))
    pair = {ROUTED: torch.ones(4, 256), ROUTED.replace("lora_A", "lora_B"): torch.ones(64, 4)}
    write_files(adapters / "routed", pair, ["up_proj"])
    secrets: dict[str, str] = {}
    lines: list[str] = []
    for name, models in (("all", []), ("one", [f"{MODEL}:first"])):
        secrets[name] = f"sk-{name}"
        lines.append(line_of(secrets[name], name=name, models=models))
    (home / "keys.yaml").write_text("\n".join(lines))
    http = json.dumps({"keys_file": str(home / "keys.yaml")})
    lora = json.dumps({"dynamic_lora_loading_path": str(adapters), "max_num_adapters_per_replica": 1})
    with own_server("--http", http, "--lora-config", lora) as url:
        yield Door(url, secrets, expected)


def test_each_model_name_has_the_answers_of_its_merged_model(door: Door) -> None:
    """In turn, so that each adapter is loaded twice: the engine has room for one."""
    assert len({tuple(ids) for ids in door.expected.values()}) == 3
    for model in [*door.expected, *door.expected]:
        assert door.tokens(model) == door.expected[model], model


def test_requests_at_the_same_time_keep_to_their_adapters(door: Door) -> None:
    models = [*door.expected] * 4
    with ThreadPoolExecutor(len(models)) as pool:
        answers = list(pool.map(door.tokens, models))
    assert answers == [door.expected[model] for model in models]


def test_all_adapters_are_listed_loaded_or_not(door: Door) -> None:
    cards: dict[str, Any] = {card.id: card for card in door.client().models.list().data}
    assert cards.keys() == {*door.expected, f"{MODEL}:routed"}
    assert (cards[MODEL].parent, cards[f"{MODEL}:first"].parent) == (None, MODEL)
    assert door.client().models.retrieve(f"{MODEL}:second:v2").id == f"{MODEL}:second:v2"


@pytest.mark.parametrize("name", ["third", "", "..", "../adapters/first", "first/../first", ".first", "first:v2"])
def test_an_unknown_adapter_is_not_found(door: Door, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        door.tokens(f"{MODEL}:{name}")
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )


def test_another_models_adapter_is_not_found(door: Door) -> None:
    with pytest.raises(openai.NotFoundError, match="other:first"):
        door.tokens("other:first")


def test_an_adapter_of_routed_experts_is_refused_by_name(door: Door) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        door.tokens(f"{MODEL}:routed")
    assert ROUTED in caught.value.message
    assert "target_modules: up_proj" in caught.value.message
    assert door.tokens(f"{MODEL}:first") == door.expected[f"{MODEL}:first"]


def test_a_key_has_the_adapters_that_it_names(door: Door) -> None:
    assert door.tokens(f"{MODEL}:first", "one") == door.expected[f"{MODEL}:first"]
    for model in (MODEL, f"{MODEL}:second:v2"):
        with pytest.raises(openai.NotFoundError, match=f"it may use {MODEL}:first"):
            door.tokens(model, "one")


def test_streams_and_chats_know_adapters_too(door: Door) -> None:
    chat = door.client().chat.completions.create(
        model=f"{MODEL}:first", messages=[{"role": "user", "content": "def"}], max_tokens=4, stream=True
    )
    chunks = list(chat)
    assert {chunk.model for chunk in chunks} == {f"{MODEL}:first"}
    assert chunks[-1].choices[0].finish_reason is not None


def test_what_would_end_the_engine_is_refused(door: Door) -> None:
    """Log-probabilities of prompts: vLLM applies adapters to the head's rows of answers alone."""
    with pytest.raises(openai.BadRequestError, match="does not go with adapters"):
        door.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=1, extra_body={"prompt_logprobs": 0})
    assert door.tokens(MODEL) == door.expected[MODEL]
