"""Every place where the project touches vLLM's internals is as it was when the plug-in was written.

A failure here means that this version of vLLM moved a joint: the message names it, and experts/vllm_plugin/joints.py,
layer.py and worker.py are the files to change.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.zygote.engine_zygote import Zygote

WRITTEN_FOR = {
    "RoutedExperts.forward_modular": [
        "self", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input",
    ],
    "RoutedExperts._get_quant_method": ["self", "prefix", "quant_config", "moe_config"],
    "RoutedExperts.load_weights": ["self", "weights"],
    "RoutedExperts.register_oot": ["_decorated_layer_cls", "name"],
    "FusedMoEMethodBase.create_weights": [
        "self", "layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype",
        "extra_weight_attrs",
    ],
    "FusedMoEMethodBase.apply": [
        "self", "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input",
    ],
    "FusedMoEMethodBase.maybe_roundup_sizes": [
        "self", "hidden_size", "intermediate_size_per_partition", "act_dtype", "moe_parallel_config",
    ],
    "SharedExperts.__call__": ["self", "shared_experts_input", "order"],
    "register_model_loader": ["load_format"],
    "DefaultModelLoader._get_weights_iterator": ["self", "source"],
    "DefaultModelLoader._prepare_weights": [
        "self", "model_name_or_path", "subfolder", "revision", "fall_back_to_pt", "allow_patterns_overrides",
    ],
    "DefaultModelLoader.load_model": ["self", "vllm_config", "model_config", "prefix"],
    "direct_register_custom_op": [
        "op_name", "op_func", "mutates_args", "fake_impl", "target_lib", "dispatch_key", "tags",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def facts(vllm_zygote: Zygote) -> dict[str, Any]:
    job = vllm_zygote.start("joints")
    vllm_zygote.wait(job, "clashes")
    return vllm_zygote.events(job)


@pytest.mark.parametrize("joint", WRITTEN_FOR)
def test_signature(facts: dict[str, Any], joint: str) -> None:
    found = facts["signatures"][joint]
    assert found == WRITTEN_FOR[joint], (
        f"vllm {facts['version']} moved {joint}: it takes {found}, the plug-in was written for {WRITTEN_FOR[joint]}"
    )


def test_sources_of_weights(facts: dict[str, Any]) -> None:
    wanted = {"model_or_path", "subfolder", "revision", "fall_back_to_pt", "allow_patterns_overrides", "prefix"}
    assert wanted <= set(facts["source_fields"]), f"vllm {facts['version']}: {facts['source_fields']}"


def test_shared_experts_know_the_order_that_the_plug_in_asks_for(facts: dict[str, Any]) -> None:
    assert "MK_INTERNAL_OVERLAPPED" in facts["shared_orders"], f"vllm {facts['version']}: {facts['shared_orders']}"


def test_the_runner_calls_forward_modular_with_the_shared_experts_input(facts: dict[str, Any]) -> None:
    assert facts["runner_calls"] == ["forward_modular(", "shared_experts_input="], (
        f"vllm {facts['version']}: MoERunner no longer calls RoutedExperts.forward_modular as it did"
    )


def test_the_runner_adds_up_what_workers_return_once(facts: dict[str, Any]) -> None:
    """Each worker returns the sums of its rows and zeros in the others. `skip_final_all_reduce`: the model adds up."""
    assert facts["sums_over_workers"] == {
        "adds": 1,
        "unless": [
            "not self.moe_config.is_sequence_parallel",
            "not self.moe_config.skip_final_all_reduce",
            "(self.moe_config.tp_size > 1 or self.moe_config.ep_size > 1)",
            "not output_is_reduced",
        ],
        "config": ["tp_size", "is_sequence_parallel"],
        "rank": True,
    }, f"vllm {facts['version']}"


def test_the_methods_base_wants_nothing_that_ours_lacks(facts: dict[str, Any]) -> None:
    assert facts["not_implemented"] == [], f"vllm {facts['version']} made these abstract: {facts['not_implemented']}"
    assert set(facts["abstract"]) == {"create_weights", "get_fused_moe_quant_config"}


def test_importing_the_worker_registers_the_layers_once(facts: dict[str, Any]) -> None:
    assert facts["registered_before"] == []
    assert facts["registered"] == ["DbrxExperts", "GptOssRoutedExperts", "RoutedExperts", "TransformersRoutedExperts"]


def test_layers_are_replaced_by_their_exact_class_name(facts: dict[str, Any]) -> None:
    """So a subclass of another name is not: verify_model has to refuse it."""
    assert facts["replaces"] == [True, False]


def test_custom_ops_are_registered_for_the_compiler(facts: dict[str, Any]) -> None:
    assert facts["schemas"] == {
        # Declared to write what they read too, so that the compiler keeps order and buffers; see layer.py.
        "begin": "expertmesh::begin(Tensor(a0!) x, Tensor topk_weights, Tensor topk_ids, SymInt layer, "
        "Tensor(a4!)? shared_x) -> Tensor",
        "finish": "expertmesh::finish(Tensor(a0!) y, Tensor(a1!) x, Tensor topk_weights, Tensor topk_ids, "
        "Tensor? shared) -> ()",
    }


def test_shared_experts_keep_their_output_until_it_is_taken(facts: dict[str, Any]) -> None:
    assert facts["shared_output"] == ["_output", "_output_idx", "output"]


def test_the_load_format_leads_to_our_loader(facts: dict[str, Any]) -> None:
    assert facts["loader"] == "RouterModelLoader"


def test_the_worker_has_no_methods_of_our_names(facts: dict[str, Any]) -> None:
    assert facts["clashes"] == []


@pytest.fixture(scope="module")
def adapters(vllm_zygote: Zygote) -> dict[str, Any]:
    job = vllm_zygote.start("adapter_joints")
    vllm_zygote.wait(job, "registry_is_used")
    return vllm_zygote.events(job)


def test_no_moe_layer_is_wrapped_for_adapters(adapters: dict[str, Any]) -> None:
    """vLLM wraps each layer whose name's last part `get_supported_lora_modules` lists."""
    assert adapters["wrapped_before"] == ["experts", "q_proj"], f"vllm {adapters['version']} does not wrap MoE layers"
    assert adapters["wrapped"] == ["q_proj"]
    assert adapters["once"], "each is patched once, however many engines a process has"


def test_adapters_are_loaded_and_layers_wrapped_as_they_were(adapters: dict[str, Any]) -> None:
    assert adapters["signatures"] == {
        "get_supported_lora_modules": ["model"],
        "from_layer": ["layer", "max_loras", "lora_config", "packed_modules_list", "model_config"],
        "from_layer_logits_processor": ["layer", "lm_head", "max_loras", "lora_config", "model_config"],
        "WorkerLoRAManager._load_adapter": ["self", "lora_request"],
        "get_adapter_absolute_path": ["lora_path"],
    }, f"vllm {adapters['version']}"
    assert len(adapters["asks"]) == 5, f"vllm {adapters['version']}: LoRAModelManager has only {adapters['asks']}"
    assert adapters["registry_is_used"], "the model runner makes another manager of adapters"


def test_rows_without_an_adapter_take_the_last_slot_on_cpus(adapters: dict[str, Any]) -> None:
    """If not any more, `keep_a_slot_without_adapter` can go."""
    assert adapters["last_slot_is_taken"], f"vllm {adapters['version']}"


@pytest.fixture(scope="module")
def ends(vllm_zygote: Zygote) -> dict[str, Any]:
    """What ends requests whose experts are nowhere."""
    job = vllm_zygote.start("refusal_joints")
    vllm_zygote.wait(job, "makes_scheduler")
    return vllm_zygote.events(job)


def test_the_scheduler_ends_requests_as_it_did(ends: dict[str, Any]) -> None:
    assert ends["signatures"] == {
        "Scheduler.update_from_output": ["self", "scheduler_output", "model_runner_output"],
        "Scheduler.finish_requests": ["self", "request_ids", "finished_status"],
        "Scheduler._free_request_blocks": ["self", "request"],
        "KVCacheManager.evict_blocks": ["self", "block_ids"],
        "KVCacheManager.get_block_ids": ["self", "request_id"],
    }, f"vllm {ends['version']}"
    assert (ends["is_scheduler"], ends["overridden"]) == (True, [])
    assert ends["gone_is_skipped"], "tokens of requests that ended while their step was out are not let out"
    assert ends["all_frees"] == 2, "requests lose their blocks when they are preempted and when they end"
    assert ends["in_flight"]
    assert ends["makes_scheduler"]


def test_the_steps_of_an_engine_that_pools_end_as_they_did(ends: dict[str, Any]) -> None:
    assert ends["pool"] == {
        "1": ["self", "hidden_states", "num_scheduled_tokens", "num_scheduled_tokens_np", "kv_connector_output"],
        "2": ["self"],
        "1 has that of 2": False,
        "inherited": True,
        "request": True,
    }, f"vllm {ends['version']}"


def test_a_step_says_which_requests_are_traced(ends: dict[str, Any]) -> None:
    """The scheduler marks the step's output, and the model runner is wrapped where it takes that."""
    assert ends["schedule"] == ["self", "throttle_prefills"], f"vllm {ends['version']}"
    assert ends["schedule_is_inherited"]
    assert ends["headers_stay"], "requests keep the W3C headers that they came with"
    assert ends["execute_model"] == {"1": ["self", "scheduler_output"], "2": ["self", "scheduler_output"]}
    assert ends["execute_is_inherited"], "the CPU's model runner runs a step as the GPU's does"
    assert ends["traces_travel"] == {"a": {"traceparent": "x"}}, "a worker in a process of its own gets the mark too"


def test_a_step_says_what_it_computed_for_whom(ends: dict[str, Any]) -> None:
    assert ends["sample_tokens"] == {"1": ["self", "grammar_output"], "2": ["self", "grammar_output"]}
    assert ends["inherited"], "the CPU's model runner samples as the GPU's does"
    assert "scheduler_output" in ends["states"]["1"]
    assert "input_batch" not in ends["states"]["1"]
    assert "input_batch" in ends["states"]["2"]
    assert {"req_ids", "num_scheduled_tokens"} <= set(ends["batch_2"])
    assert {"num_scheduled_tokens", "scheduled_new_reqs", "scheduled_cached_reqs"} <= set(ends["output"])
    assert {"req_id", "num_computed_tokens", "prompt_token_ids"} <= set(ends["new"])
    assert {"req_ids", "num_computed_tokens"} <= set(ends["cached"])
    used = {"request_id", "new_token_ids", "pooling_output", "finish_reason", "stop_reason", "trace_headers"}
    assert used <= set(ends["core_output"])
