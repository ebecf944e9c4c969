"""Engine options against vLLM's own classes: the same names, no value refused that vLLM takes, and few taken that it
does not. A failure of a comparison means that this version of vLLM writes its classes in a way that
experts/vllm_plugin/source/vllm_source.py does not read."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from experts.vllm_plugin import engine_options
from experts.vllm_plugin.engine_options import (
    ENGINE,
    FRONT_END,
    refused_by_project,
    refused_by_vllm,
    refused_without_mtp,
)
from experts.vllm_plugin.source.vllm_source import VllmSource
from tests.support.zygote.engine_zygote import Zygote
from tests.support.zygote.option_facts import PROBES

TINY = Path(__file__).parents[3] / "examples" / "tiny-moe"

# Their types come from elsewhere or are converted by vLLM, so every value passes here.
UNTYPED = {"distributed_executor_backend", "hf_overrides", "logits_processors", "lora_dtype", "scheduler_cls"}
UNTYPED_PARTS = {
    "attention_config.backend",
    "attention_config.backend_per_kind",
    "attention_config.mla_prefill_backend",
    "compilation_config.cudagraph_capture_sizes",
    "compilation_config.debug_dump_path",
    "compilation_config.pass_config",
    "ir_op_priority.fused_add_rms_norm",
    "ir_op_priority.gelu_and_mul_sparse",
    "ir_op_priority.rms_norm",
    "kernel_config.linear_backend",
    "kernel_config.moe_backend",
    "kernel_config.sparse_indexer_topk_backend",
    "kv_events_config.publisher",
    "mamba_config.backend",
}


@pytest.fixture(scope="module")
def facts(vllm_zygote: Zygote) -> dict[str, Any]:
    job = vllm_zygote.start("options")
    vllm_zygote.wait(job, "front_end")
    return vllm_zygote.events(job)


@pytest.fixture(scope="module")
def source() -> VllmSource:
    found = VllmSource.installed()
    assert found is not None
    return found


def taken(kind: Any) -> set[str]:
    """The PROBES that a type takes."""
    return {name for name, value in PROBES.items() if takes(kind, value)}


def takes(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


def model_in(kind: Any) -> type[BaseModel]:
    """The config class in a type such as `SomeConfig | None`."""
    parts = (kind, *typing.get_args(kind))
    return next(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))


def test_names_are_those_of_vllms_classes(facts: dict[str, Any], source: VllmSource) -> None:
    assert set(source.fields(*ENGINE)) == set(facts["engine"])
    assert set(source.fields(*FRONT_END)) == set(facts["front_end"])
    for option, parts in facts["nested"].items():
        assert set(model_in(source.type_of(*ENGINE, option)).model_fields) == set(parts), option


def test_every_value_that_vllm_takes_is_taken(facts: dict[str, Any], source: VllmSource) -> None:
    for cls, names in ((ENGINE, "engine"), (FRONT_END, "front_end")):
        wrong = {name: set(probes) - taken(source.type_of(*cls, name)) for name, probes in facts[names].items()}
        assert {name: probes for name, probes in wrong.items() if probes} == {}, names
    for option, parts in facts["nested"].items():
        model = model_in(source.type_of(*ENGINE, option))
        for part, probes in parts.items():
            assert [name for name in probes if not takes(model, {part: PROBES[name]})] == [], f"{option}.{part}"


def test_few_values_that_vllm_refuses_are_taken(facts: dict[str, Any], source: VllmSource) -> None:
    too_kind = {name for name, probes in facts["engine"].items() if taken(source.type_of(*ENGINE, name)) - set(probes)}
    assert too_kind == UNTYPED
    parts = {
        f"{option}.{part}"
        for option, parts in facts["nested"].items()
        for part, probes in parts.items()
        for name, value in PROBES.items()
        if takes(model_in(source.type_of(*ENGINE, option)), {part: value}) and name not in probes
    }
    assert parts == UNTYPED_PARTS


# What users get wrong, and the line they get. vLLM is asked for a config of the same options.
WRONG = {
    "misspelt": (
        {"max_num_sequences": 4},
        "max_num_sequences is no engine option of the installed vllm; did you mean ",
    ),
    "gone": ({"swap_space": 4}, "swap_space is no engine option of the installed vllm"),
    "zero": ({"max_num_seqs": 0}, "max_num_seqs is 0: expected greater than or equal to 1"),
    "no tokens": ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0: expected greater than or equal to 1"),
    "quoted": ({"max_num_seqs": "64"}, "max_num_seqs is the string '64': expected 64, without quotes"),
    "suffix": ({"max_model_len": "32k"}, "max_model_len is '32k': expected a valid integer"),
    "share": ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5: expected less than or equal to 1"),
    "choice": ({"scheduling_policy": "lifo"}, "scheduling_policy is 'lifo': expected 'fcfs' or 'priority'"),
    "cache": ({"kv_cache_dtype": "fp9"}, "kv_cache_dtype is 'fp9': expected 'auto', "),
    "nested": (
        {"compilation_config": {"cudagraph_moed": "NONE"}},
        "compilation_config.cudagraph_moed is no option of the installed vllm; did you mean cudagraph_mode?",
    ),
    "enum": ({"compilation_config": {"cudagraph_mode": "FUL"}}, "compilation_config.cudagraph_mode is 'FUL': expected"),
    "role": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "both"}},
        "kv_transfer_config.kv_role is 'both': expected ",
    ),
    "mapping": ({"compilation_config": 3}, "compilation_config is 3: expected a valid dictionary"),
    "backend": ({"attention_backend": "FLASH_ATN"}, "attention_backend is 'FLASH_ATN': expected one of FLASH_ATTN, "),
}
RIGHT: dict[str, dict[str, Any]] = {
    "as shipped": {"max_model_len": 1024, "max_num_seqs": 64, "enforce_eager": True},
    "none": {"max_num_seqs": None, "enable_prefix_caching": None},
    "graphs": {"compilation_config": {"cudagraph_mode": "none", "mode": 0}},
    "lists": {"kv_cache_dtype_skip_layers": ["0"], "additional_config": {"theirs": 1}},
    "seed": {"seed": 3, "block_size": 32, "enable_chunked_prefill": True},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case: str) -> None:
    options, expected = WRONG[case]
    [line] = refused_by_vllm({"max_model_len": 1024, **options})
    assert line.startswith(expected)
    assert "\n" not in line


def test_the_engine_refuses_what_is_refused_here_and_takes_the_rest(vllm_zygote: Zygote) -> None:
    cases = {**{name: options for name, (options, _) in WRONG.items()}, **RIGHT}
    job = vllm_zygote.start("engine_configs", model=str(TINY), cases=cases)
    answers = vllm_zygote.wait(job, "answers")
    assert {name for name, answer in answers.items() if answer is None} == set(RIGHT), answers
    for options in RIGHT.values():
        assert list(refused_by_vllm(options)) == []


def test_front_end_options_are_known() -> None:
    assert list(refused_by_vllm({"enable_auto_tool_choice": True, "tool_call_parser": "hermes"})) == []
    [line] = refused_by_vllm({"chat_template_content_format": "html"})
    assert line == "chat_template_content_format is 'html': expected 'auto', 'string' or 'openai'"


def test_nothing_is_refused_where_vllm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_options.VllmSource, "installed", lambda: None)
    assert list(refused_by_vllm({"no_such_option": 1})) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"load_format": "dummy"}, "load_format is set by the project: the loader leaves"),
        ({"distributed_executor_backend": "mp"}, "distributed_executor_backend is set by the project: Ray Serve LLM"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2, expected 1: run more routers"),
        ({"nnodes": 2}, "nnodes is 2, expected 1: run more routers"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0, expected a whole number of 1 or more"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size is True, expected a whole number"),
        ({"enable_expert_parallel": True}, "enable_expert_parallel is True, expected false: the shards hold"),
        ({"enable_eplb": True}, "enable_eplb is True, expected false: the shards hold"),
        ({"enable_moe_shared_loras": True}, "enable_moe_shared_loras is True, expected false: adapters leave"),
        ({"lora_target_modules": ["q_proj", "mlp.experts"]}, "lora_target_modules has 'mlp.experts', but the shards"),
        ({"lora_modules": []}, "lora_modules is set by the project: use lora_config instead"),
        (
            {"compilation_config": {"cudagraph_mode": "full"}},
            "compilation_config.cudagraph_mode is 'full', expected",
        ),
    ],
)
def test_what_the_project_cannot_serve_with_is_refused(options: dict[str, Any], expected: str) -> None:
    [line] = refused_by_project(options, "cuda")
    assert line.startswith(expected)


@pytest.mark.parametrize("method", ["mtp", "deepseek_mtp"])
def test_mtp_is_refused_where_no_shard_has_its_layer(method: str) -> None:
    [line] = refused_without_mtp({"speculative_config": {"method": method, "num_speculative_tokens": 1}})
    assert line == (
        f"speculative_config.method is {method!r}, but model.mtp is false, so no shard holds the experts of the MTP "
        "layer: set it to true for shards and routers"
    )
    assert not list(refused_without_mtp({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}))
    assert not list(refused_without_mtp({}))


def test_what_is_switched_off_is_not_refused() -> None:
    options = {"enable_lora": True, "tensor_parallel_size": 2, "compilation_config": {"cudagraph_mode": "PIECEWISE"}}
    options |= {"runner": "generate", "speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    assert list(refused_by_project(options, "cuda")) == []
    full = {"compilation_config": {"cudagraph_mode": "FULL"}}
    assert list(refused_by_project(full, "cpu")) == []
    assert list(refused_by_project({**full, "enforce_eager": True}, "cuda")) == []
