"""Every MoE architecture of the installed vLLM has one entry, and what an entry says is what happens."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.architectures.table import ARCHITECTURES, BY_NAME, State, entry_of, why_refused
from experts.checkpoint.architectures.verdict import verdict_on
from experts.checkpoint.families import FAMILIES
from experts.checkpoint.hf_config import ModelConfig
from experts.vllm_plugin.source.registry import ModelRegistry
from tests.support.family_configs import PARITY_FAMILIES
from tests.support.hub_names import MAKERS, write

# vLLM runs them by way of transformers without an entry of their own, or as the language model of another model.
NOT_IN_THE_WALK = {
    "Dots1ForCausalLM",
    "SolarOpenForCausalLM",
    "Glm4vMoeForConditionalGeneration",
    "KimiK25ForConditionalGeneration",
}


def of_state(*states: State) -> list[Any]:
    return [pytest.param(entry, id=entry.name) for entry in ARCHITECTURES if entry.state in states]


def config_of(entry: Any) -> dict[str, Any]:
    """A config.json of the architecture, as small as possible."""
    maker = MAKERS.get({"qwen3_next": "qwen3_moe", "glm4_moe_lite": "glm4_moe"}.get(entry.model_type, entry.model_type))
    config = {"model_type": "nothing"} if maker is None else maker().config
    if maker is not None and config["model_type"] != entry.model_type:
        config = {**config, "model_type": entry.model_type}
    return {**config, "architectures": [entry.name]}


@pytest.fixture(scope="module")
def registry() -> ModelRegistry:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs vllm")
    return ModelRegistry(Path(spec.submodule_search_locations[0]))


def test_the_table_has_what_the_registry_of_vllm_has(registry: ModelRegistry) -> None:
    walked = registry.with_experts()
    models = {name for name, entry in walked.items() if not entry.draft}
    assert len(models) > 90
    assert sorted(models - BY_NAME.keys()) == [], "enter them into experts/checkpoint/architectures/table.py"
    assert sorted(BY_NAME.keys() - models) == sorted(NOT_IN_THE_WALK), (
        "vLLM has them no longer, or not as models with experts"
    )


def test_names_stand_once() -> None:
    assert [name for name, count in Counter(entry.name for entry in ARCHITECTURES).items() if count > 1] == []


def test_parity_is_what_the_parity_test_compares() -> None:
    assert {entry.model_type for entry in ARCHITECTURES if entry.state is State.parity} == set(PARITY_FAMILIES)


def test_read_is_what_families_have() -> None:
    known = {model_type for family in FAMILIES for model_type in family.model_types}
    read = {entry.model_type for entry in ARCHITECTURES if entry.state is State.read}
    assert read <= known - set(PARITY_FAMILIES)


@pytest.mark.parametrize("entry", of_state(State.parity, State.read))
def test_a_config_of_what_is_served_is_served(entry: Any) -> None:
    verdict = verdict_on(ModelConfig.of_values(config_of(entry), Path("config.json")))
    assert verdict.served
    assert verdict.state is entry.state
    assert verdict.text.startswith(f"{entry.name} (")
    assert re.search(r" layers of 3 experts, top-[12], hidden size 8, expert width 6, ", verdict.text)


@pytest.mark.parametrize("entry", of_state(State.refused, State.dense))
def test_a_config_of_what_is_refused_is_refused_with_the_reason(entry: Any) -> None:
    verdict = verdict_on(ModelConfig.of_values(config_of(entry), Path("config.json")))
    assert not verdict.served
    assert verdict.state is entry.state
    assert verdict.text == why_refused({"architectures": [entry.name]})
    assert len(verdict.text) > len(entry.name) + 20


def test_a_refused_architecture_is_refused_when_its_checkpoint_is_opened(tmp_path: Path) -> None:
    """Though its model type would be read."""
    made = MAKERS["deepseek_v3"]()
    write(tmp_path, {**made.config, "architectures": ["MistralLarge3ForCausalLM"]}, made.tensors)
    with pytest.raises(
        CheckpointError, match="MistralLarge3ForCausalLM is refused: its files are in Mistral's own format"
    ):
        ExpertCheckpoint.open(tmp_path)


@pytest.mark.parametrize("architectures", [None, [], ["NewForCausalLM"], "MixtralForCausalLM", [["x"]]])
def test_what_is_in_no_table_is_read_by_its_model_type(architectures: Any) -> None:
    values = {**MAKERS["mixtral"]().config, "architectures": architectures}
    assert entry_of({k: v for k, v in values.items() if k != "architectures"}) is None
    verdict = verdict_on(ModelConfig.of_values(values, Path("config.json")))
    assert verdict.state is State.read
    assert verdict.text.startswith("mixtral: ")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is unknown"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq is not supported"),
        ({"num_local_experts": None}, "expected one of num_experts"),
    ],
)
def test_values_that_do_not_fit_are_told(change: dict[str, Any], text: str) -> None:
    values = {**MAKERS["mixtral"]().config, **change}
    verdict = verdict_on(ModelConfig.of_values(values, Path("config.json")))
    assert verdict.state is State.refused
    assert text in verdict.text


def test_a_model_of_dense_layers_is_dense() -> None:
    values = {**MAKERS["gemma4_text"]().config, "num_experts": None}
    verdict = verdict_on(ModelConfig.of_values(values, Path("config.json")))
    assert verdict.state is State.dense
