"""What `expertmesh check config.json` and `expertmesh size` say of a quantization, without any weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.checkpoint.architectures.table import State
from experts.checkpoint.architectures.verdict import Verdict, verdict_on
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.sizes.architecture import facts_of
from experts.checkpoint.sizes.find import find_facts
from placement.sizing.demand import Demand
from placement.sizing.expert_times import ExpertTimes, Half
from placement.sizing.gpus import gpu_named
from placement.sizing.memory import engine_memory, shard_memory
from placement.sizing.model import ModelFacts
from placement.sizing.plan import plan_engines
from tests.support.hub_names import write
from tests.support.quantized_checkpoint import LAYERS, E, quantized
from tests.support.quantized_formats import FORMATS

D, I = 256, 128
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_size": D,
    "moe_intermediate_size": I,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "vocab_size": 512,
}
DEQUANTIZED = [name for name, form in FORMATS.items() if form.kept is None]


def config_in(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig.of_values(
        {**CONFIG, "quantization_config": FORMATS[name].config, **changes}, Path("config.json")
    )


def verdict(name: str, **changes: Any) -> Verdict:
    return verdict_on(config_in(name, **changes))


@pytest.mark.parametrize("name", FORMATS)
def test_a_verdict_says_whether_kernels_keep_the_format(name: str) -> None:
    found = verdict(name)
    assert found.served
    if name in DEQUANTIZED:
        assert "which no kernel keeps: an expert takes" in found.text
        assert f"in 16 bits, {2 * 3 * D * I / 1e6:.1f} MB in memory" in found.text
    else:
        assert found.text.endswith("which kernels for GPUs keep as it is")


def test_a_verdict_names_the_format_and_its_bytes() -> None:
    assert "AWQ, 4 bits in groups of 32 with zero points, which no kernel keeps: an expert takes" in verdict("awq").text
    assert "GPTQ, 8 bits in groups of 32, " in verdict("gptq_8_bits").text
    assert "INT8 with a scale a row, " in verdict("w8a16").text
    assert "INT4 in groups of 32 with zero points, " in verdict("int4_zeros").text


def test_what_does_not_fit_the_model_is_refused_at_once() -> None:
    found = verdict("awq", moe_intermediate_size=80)
    assert found.state is State.refused
    assert "Qwen3MoeForCausalLM (qwen3_moe): experts stored as AWQ" in found.text
    assert "80 columns are not a multiple of the 32 that share a scale in awq" in found.text
    stacked = verdict("awq", architectures=["GraniteMoeForCausalLM"], model_type="granitemoe", intermediate_size=I)
    assert stacked.state is State.refused
    assert "only where each expert has tensors of its own, and this model stacks them" in stacked.text


def facts_in(name: str, **changes: Any) -> ModelFacts:
    return facts_of(config_in(name, **changes), name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_shard_is_sized_by_what_it_holds(name: str) -> None:
    plain = facts_of(ModelConfig.of_values(CONFIG, Path("config.json")), "plain")
    facts = facts_in(name)
    assert facts.stored.form == FORMATS[name].name
    assert facts.weight_bytes("experts") < 0.6 * plain.weight_bytes("experts")
    slots = (shard_memory(each, slots=4, pairs=1).lines[0].nbytes for each in (facts, plain))
    of_format, of_floats = slots
    assert (of_format == of_floats) == (name in DEQUANTIZED)
    assert of_format <= of_floats
    told = [note for note in facts.notes if "no kernel of a shard keeps" in note]
    assert len(told) == (name in DEQUANTIZED)


def test_plain_expert_parallelism_holds_what_is_stored() -> None:
    facts = facts_in("awq")
    lines = {line.what: line.nbytes for line in engine_memory(
        facts, 2.0, gpus=2, chunk=64, sequences=1, context=64
    ).lines}  # fmt: skip
    assert lines["experts"] == 4 * 2 * facts.engine_expert_bytes
    assert facts.engine_expert_bytes * 16 == facts.weight_bytes("experts")
    assert facts.expert_bytes == 2 * 3 * D * I


def test_plain_expert_parallelism_reads_what_is_stored() -> None:
    """Whether shards can keep a format changes the split's time, never that of engines, which all read it."""
    floats = facts_in("awq")
    kept = replace(floats, stored=replace(floats.stored, kept=True))
    gpu = gpu_named("h100")
    lockstep, split = Half(2, 2, 2, lockstep=True), Half(2, 1, 3)
    (engine_s, same_s), (slow_s, fast_s) = (
        [ExpertTimes(facts, gpu, 0.5).layer(1, 1, 0.0, half).shard_s for facts in (floats, kept)]
        for half in (lockstep, split)
    )
    assert engine_s == same_s == fast_s
    call_s = gpu.constants.call_s
    assert (slow_s - call_s) / (engine_s - call_s) == pytest.approx(floats.expert_bytes / kept.expert_bytes)
    demand = Demand(isl=50, osl=50, rate=100, tpot_ms=50, ttft_ms=1000, max_gpus=4)
    engines, others = plan_engines(floats, gpu, demand), plan_engines(kept, gpu, demand)
    assert engines is not None
    assert engines == others


def test_attention_is_quantized_unless_the_settings_spare_it() -> None:
    dense, spared = facts_in("awq"), facts_in(
        "awq", quantization_config={**FORMATS["awq"].config, "modules_to_not_convert": ["self_attn"]}
    )  # fmt: skip
    assert dense.weight_bytes("router") < spared.weight_bytes("router")
    plain = facts_of(ModelConfig.of_values(CONFIG, Path("config.json")), "plain")
    assert spared.weight_bytes("router") == plain.weight_bytes("router")


@pytest.mark.parametrize("name", ["awq", "gptq", "nvfp4", "fp8", "w8a8"])
def test_headers_of_a_folder_are_counted(tmp_path: Path, name: str) -> None:
    made = quantized(tmp_path, FORMATS[name], D, I)
    tensors = {**made.tensors, "model.embed_tokens.weight": torch.zeros(512, D).bfloat16()}
    stored = sum(tensor.nbytes for tensor in made.tensors.values())
    write(tmp_path, {**CONFIG, "num_experts": E, "quantization_config": FORMATS[name].config}, tensors)
    facts, _ = find_facts(str(tmp_path))
    assert {part: nbytes for part, _, nbytes in facts.parts()}["routed experts"] == stored
    held = stored if FORMATS[name].kept else LAYERS * E * 2 * 3 * D * I
    assert facts.held_bytes("experts") == held
