"""One entry for each MoE architecture of vLLM's registry (vllm 0.32), by the name that config.json gives in
`architectures`. A test walks the registry of the vllm installed and names what this table lacks.

An architecture that vLLM learns is one more entry: `parity` once `PARITY_FAMILIES` of the tests has its model type,
`read` once `FAMILIES` has, until then `refused` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """What becomes of a model of an architecture."""

    parity = "parity"  # served, and small random models give the tokens of vLLM's own engine
    read = "read"  # served; the experts' names and shapes are tested, their tokens are not
    refused = "refused"
    dense = "dense"  # refused too: it has no routed experts


STATES = {
    State.parity: "small random checkpoints give the tokens of vLLM's own engine",
    State.read: "the experts are read right by the hub's names and shapes; nobody has compared tokens with vLLM's",
    State.refused: "refused by name",
    State.dense: "it has no routed experts: a dense model gains nothing here, serve it with plain vLLM",
}


@dataclass(frozen=True)
class Architecture:
    """One entry. `model_type`: what its experts are read by, if they are. `note`: why it is refused, or a limit."""

    name: str
    state: State
    model_type: str = ""
    note: str = ""


def _entries(state: State, *rows: tuple[str, str] | tuple[str, str, str]) -> tuple[Architecture, ...]:
    return tuple(Architecture(name, state, *rest) for name, *rest in rows)


def _without(state: State, note: str, *names: str) -> tuple[Architecture, ...]:
    return tuple(Architecture(name, state, note=note) for name in names)


_BY_TRANSFORMERS = "vLLM runs transformers' model with its own MoE layer"
_NO_MAMBA = "compared on layers of attention only: vLLM's Mamba layers do not run on CPUs"
_GPU_ONLY = "its class in vLLM runs on GPUs only, and nobody has tried it"
_NESTED = "its language model's values are nested in a way that is not read here"
_NOT_TRIED = "nobody has tried it"
_CLAMPED = "its experts clamp SwiGLU (swiglu_limit), which no kernel of a shard does"
_NO_GATE = "its experts have no gate (relu squared of up alone), and a shard computes gated ones"
_ZERO = "its gate also picks experts that compute nothing (zero experts), which a dispatch has no name for"
DRAFT = "it guesses tokens for another model: routed experts of a draft are on no shard"

ARCHITECTURES: tuple[Architecture, ...] = (
    *_entries(
        State.parity,
        ("AfmoeForCausalLM", "afmoe"),
        ("Cohere2MoeForCausalLM", "cohere2_moe"),
        ("DeepseekV2ForCausalLM", "deepseek_v2"),
        ("DeepseekV3ForCausalLM", "deepseek_v3"),
        ("Dots1ForCausalLM", "dots1", _BY_TRANSFORMERS),
        ("Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),
        ("ExaoneMoEForCausalLM", "exaone_moe"),
        ("ExaoneMoeForCausalLM", "exaone_moe"),
        ("FlexOlmoForCausalLM", "flex_olmo", _BY_TRANSFORMERS),
        ("Gemma4ForCausalLM", "gemma4_text"),
        ("Glm4MoeForCausalLM", "glm4_moe"),
        ("Glm4MoeLiteForCausalLM", "glm4_moe_lite"),
        ("GptOssForCausalLM", "gpt_oss"),
        ("GraniteMoeForCausalLM", "granitemoe"),
        ("GraniteMoeHybridForCausalLM", "granitemoehybrid", _NO_MAMBA),
        ("GraniteMoeSWAForCausalLM", "granitemoe_swa"),
        ("GraniteMoeSharedForCausalLM", "granitemoeshared"),
        ("HYV3ForCausalLM", "hy_v3"),
        ("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", _BY_TRANSFORMERS),
        ("Lfm2MoeForCausalLM", "lfm2_moe"),
        ("MellumForCausalLM", "mellum", _BY_TRANSFORMERS),
        ("MixtralForCausalLM", "mixtral"),
        ("OlmoeForCausalLM", "olmoe"),
        ("Qwen2MoeForCausalLM", "qwen2_moe"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("Qwen3NextForCausalLM", "qwen3_next", "compared on layers of full attention only"),
        ("SolarOpenForCausalLM", "solar_open", _BY_TRANSFORMERS),
    ),
    *_entries(
        State.read,
        ("AXK1ForCausalLM", "axk1"),
        ("BailingMoeForCausalLM", "bailing_moe"),
        ("BailingMoeV2ForCausalLM", "bailing_moe_v2"),
        ("BailingMoeV2_5ForCausalLM", "bailing_hybrid"),
        ("BailingMoeV3ForCausalLM", "bailing_hybrid"),
        ("DbrxForCausalLM", "dbrx"),
        ("DeepseekForCausalLM", "deepseek"),
        ("DeepseekV32ForCausalLM", "deepseek_v32"),
        ("Gemma4ForConditionalGeneration", "gemma4"),
        ("Glm4vMoeForConditionalGeneration", "glm4v_moe"),
        ("GlmMoeDsaForCausalLM", "glm_moe_dsa"),
        ("JambaForCausalLM", "jamba"),
        ("KimiK25ForConditionalGeneration", "kimi_k25"),
        ("KimiLinearForCausalLM", "kimi_linear"),
        ("LagunaForCausalLM", "laguna"),
        ("Llama4ForCausalLM", "llama4_text"),
        ("Llama4ForConditionalGeneration", "llama4"),
        ("MiMoV2FlashForCausalLM", "mimo_v2_flash"),
        ("MiMoV2ForCausalLM", "mimo_v2_flash"),
        ("MiniMaxM2ForCausalLM", "minimax_m2"),
        ("PanguUltraMoEForCausalLM", "pangu_ultra_moe"),
        ("PhiMoEForCausalLM", "phimoe"),
        ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe"),
        ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
        ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"),
        ("SarvamMLAForCausalLM", "sarvam_mla"),
        ("SarvamMoEForCausalLM", "sarvam_moe"),
        ("Step3TextForCausalLM", "step3_text"),
    ),
    *_without(
        State.refused,
        _CLAMPED,
        *("DeepseekV4ForCausalLM", "DeepseekV4ForConditionalGeneration", "DeepseekV41ForCausalLM", "HYV4ForCausalLM"),
        "Step3p5ForCausalLM",
    ),
    *_without(
        State.refused,
        _NO_GATE,
        *("Cosmos3EdgeForConditionalGeneration", "NemotronHForCausalLM", "NemotronHPuzzleForCausalLM"),
        *("NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Nano_VL_V2", "NemotronH_Omni_Reasoning_V3"),
        "NemotronH_Super_Omni_Reasoning_V3",
    ),
    *_without(State.refused, _ZERO, "LongcatFlashForCausalLM", "LongcatFlashNgramForCausalLM"),
    *_without(
        State.refused,
        _GPU_ONLY,
        *("Dots3NoteForCausalLM", "Glm5NextForCausalLM", "Glm5NextForConditionalGeneration", "InklingForCausalLM"),
        *("InklingForConditionalGeneration", "MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"),
        *("Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration"),
    ),
    *_without(
        State.refused,
        _NESTED,
        *("BailingMoeV3VLForConditionalGeneration", "DeepseekOCR2ForCausalLM", "DeepseekOCRForCausalLM"),
        *("DeepseekVLV2ForCausalLM", "MiMoV2OmniForCausalLM", "Qwen3OmniMoeForConditionalGeneration"),
        "UnlimitedOCRForCausalLM",
    ),
    *_without(
        State.refused,
        _NOT_TRIED,
        *(
            "AriaForConditionalGeneration",
            "Gemma4UnifiedForConditionalGeneration",
            "InternS1ProForConditionalGeneration",
        ),
        *("InternS2MobiusForConditionalGeneration", "InternS2PreviewForConditionalGeneration"),
        *("PanguProMoEV2ForCausalLM", "Param2MoEForCausalLM"),
    ),
    *_entries(
        State.refused,
        ("DiffusionGemmaForBlockDiffusion", "", "it writes blocks of tokens by diffusion, which nobody has tried"),
        ("Ernie4_5_VLMoeForConditionalGeneration", "", "a layer has two sets of experts, for text and for images"),
        ("K2HorizonForCausalLM", "", "its attention has experts of its own, which nobody has tried"),
        ("KimiK3ForConditionalGeneration", "", "its experts compute in a smaller space than the model (latent MoE)"),
        ("MistralLarge3ForCausalLM", "", "its files are in Mistral's own format (params.json, consolidated tensors)"),
    ),
    *_without(
        State.dense,
        "",
        *("MiniCPMV4_6ForConditionalGeneration", "MiniCPMV4_7ForConditionalGeneration", "PanguEmbeddedForCausalLM"),
        *("Qwen3ASRForConditionalGeneration", "Qwen3ASRRealtimeGeneration", "Qwen3_5ForCausalLM"),
        "Qwen3_5ForConditionalGeneration",
    ),
)
BY_NAME = {entry.name: entry for entry in ARCHITECTURES}


def entry_of(values: dict[str, Any]) -> Architecture | None:
    """The entry of a model by the `architectures` of its config.json, None if there is none."""
    names = values.get("architectures")
    found = [BY_NAME[name] for name in map(str, names) if name in BY_NAME] if isinstance(names, list) else []
    return found[0] if found else None


def why_refused(values: dict[str, Any]) -> str | None:
    """Why a model of this architecture is not served; None if it is, or if its architecture is in no table."""
    entry = entry_of(values)
    if entry is None or entry.state in (State.parity, State.read):
        return None
    return f"{entry.name} is refused: {entry.note or STATES[entry.state]}"
