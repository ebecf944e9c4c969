"""Everything of vLLM's internals that the project touches, in one place.

Written for vllm 0.25.1 to 0.32; `tests/experts/vllm_plugin/test_joints.py` says what a later version moved. Names and
parameters are the same in 0.25.1 and 0.32.0, but 0.25.1 has no expert class for gpt-oss. Engines were run with 0.32.0
only.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm.envs as vllm_envs
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from experts.vllm_plugin.engine_kwargs import REFUSED, TRACES

logger = logging.getLogger(__name__)

# Models with an expert class of their own. vLLM looks replacements up by exact class name, so each is listed.
_EXPERT_SUBCLASSES = (
    ("vllm.model_executor.models.gpt_oss", "GptOssRoutedExperts"),
    ("vllm.model_executor.models.dbrx", "DbrxExperts"),
    ("vllm.model_executor.models.transformers.moe", "TransformersRoutedExperts"),
)


def routed_expert_classes() -> list[type[RoutedExperts]]:
    """RoutedExperts and its replaceable subclasses, as far as this version has them."""
    classes: list[type[RoutedExperts]] = [RoutedExperts]
    for module_name, class_name in _EXPERT_SUBCLASSES:
        try:
            found = getattr(importlib.import_module(module_name), class_name, None)
        except ImportError as error:
            logger.debug("%s is not in this vllm: %s", module_name, error)
            continue
        if inspect.isclass(found) and issubclass(found, RoutedExperts):
            classes.append(found)
    return classes


def expertmesh_settings(config: VllmConfig) -> dict[str, Any] | None:
    """The `expertmesh` part of additional_config, None when this engine has none."""
    extra = config.additional_config
    if not isinstance(extra, dict):
        return None
    found = extra.get("expertmesh")
    return dict(found) if found is not None else None


# Built from the quantization's settings; vLLM's own check of loaded weights knows it by name too.
_FROM_SETTINGS = ("input_scale_ub",)


def defaulted_parameters(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that have a default where a checkpoint lacks them: scales of the KV cache, and such."""
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] in _FROM_SETTINGS]
    for prefix, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod):
            names += [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()]
    return names


def output_of(shared_experts: Any) -> torch.Tensor | None:
    """What shared experts have computed and nobody has taken yet: reading `output` would take it."""
    return shared_experts._output[shared_experts._output_idx]  # type: ignore[no-any-return]


def step_in_progress() -> tuple[bool, torch.Tensor | None]:
    """Whether the current forward pass serves requests, and which rows are padding (bool [rows], None if none).

    Only steps that serve requests have attention metadata; profiling and warm-up have none. vLLM pads a step only to
    the size of a CUDA graph. Where a version does not mark padding rows, they count as real ones.
    """
    if not is_forward_context_available():
        return True, None
    context = get_forward_context()
    padded = context.cudagraph_runtime_mode != CUDAGraphMode.NONE
    return context.attn_metadata is not None, getattr(context, "is_padding", None) if padded else None


def most_rows_while_generating(config: VllmConfig) -> int:
    """Rows that a request has at most in a step while it generates: one, and those that are guessed ahead of it."""
    speculative = config.speculative_config
    return 1 + int((speculative and speculative.num_speculative_tokens) or 0)


def is_draft(config: VllmConfig, model_config: Any) -> bool:
    """Whether a model that is loaded guesses tokens for the engine's own."""
    speculative = config.speculative_config
    draft = None if speculative is None else speculative.draft_model_config
    # n-gram speculation names the engine's own model as its draft.
    return draft is not None and model_config is draft and draft is not speculative.target_model_config


def guesses_by_mtp(config: VllmConfig) -> bool:
    """Whether the engine guesses tokens by multi-token prediction; vLLM has one name for all models' kinds."""
    return config.speculative_config is not None and config.speculative_config.method == "mtp"


def rows_of_prompts(num_rows: int, while_generating: int) -> np.ndarray | None:
    """Which rows of the current forward pass are of prompts (bool [rows]); None if none are, or nobody says.

    Attention metadata says how many tokens of each request are in the step: `while_generating` at most while it
    generates. A prompt of which no more are left counts as generated, which is what it costs.
    """
    metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
    of_layers = metadata.values() if isinstance(metadata, dict) else ()
    told = next((each for each in of_layers if getattr(each, "query_start_loc", None) is not None), None)
    if told is None or getattr(told, "max_query_len", num_rows) <= while_generating:
        return None
    # On a device this waits for it, as each layer's dispatch does; steps that only generate do not come here.
    starts_R = told.query_start_loc.cpu().numpy()
    prefill_T = np.zeros(num_rows, np.bool_)
    for start, stop in itertools.pairwise(starts_R.tolist()):
        if stop - start > while_generating:
            prefill_T[start:stop] = True
    return prefill_T


def model_runner(config: VllmConfig) -> Any:
    """The class that this engine's worker runs its steps with; subclasses for CPUs inherit what is touched here."""
    version_2 = getattr(config, "use_v2_model_runner", False)
    module = "vllm.v1.worker.gpu.model_runner" if version_2 else "vllm.v1.worker.gpu_model_runner"
    return importlib.import_module(module).GPUModelRunner


def report_refused(
    config: VllmConfig,
    take_refused: Callable[[], np.ndarray | None],
    count: Callable[[int], None],
    ending: str = "sample_tokens",
) -> None:
    """Have each step's output name the requests of rows that lack an expert, for `scheduler` to end them.

    `take_refused` gives those rows of the forward pass before (bool [T], or None for none), and `count` takes how many
    requests they belong to. `ending`: the runner's method that makes a step's output.
    """
    runner = model_runner(config)
    end_step = getattr(runner, ending)

    @functools.wraps(end_step)
    def end_and_report(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.execute_model_state
        refused_T = take_refused() if state is not None else None
        if refused_T is None:
            return end_step(self, *args, **kwargs)
        refused = requests_of_rows(*rows_of_requests(self, state), refused_T)
        count(len(refused))
        return with_refused(end_step(self, *args, **kwargs), refused)

    setattr(runner, ending, end_and_report)


def watch_traced_steps(
    config: VllmConfig, start: Callable[[Mapping[str, Mapping[str, str]]], None], end: Callable[[], None]
) -> None:
    """Call `start` with requests' W3C headers, by id, before each step that `scheduler` traces, and `end` after it."""
    runner = model_runner(config)
    execute_model = runner.execute_model

    @functools.wraps(execute_model)
    def execute_and_tell(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        traces = getattr(scheduler_output, TRACES, None)
        if traces is None:
            return execute_model(self, scheduler_output, *args, **kwargs)
        start(traces)
        try:
            return execute_model(self, scheduler_output, *args, **kwargs)
        finally:
            end()

    runner.execute_model = execute_and_tell


def requests_of_rows(ids: list[str], lengths: list[int], chosen_T: np.ndarray) -> list[str]:
    """Those of a step's requests that have any of the rows `chosen_T` (bool [T]), of `lengths` rows each."""
    if sum(lengths) > len(chosen_T):
        raise RuntimeError(f"a step of {sum(lengths)} tokens had {len(chosen_T)} rows in its MoE layers")
    stops = np.cumsum(lengths).tolist()
    return [
        request_id
        for request_id, length, stop in zip(ids, lengths, stops, strict=True)
        if chosen_T[stop - length : stop].any()
    ]


def rows_of_requests(runner: Any, state: Any) -> tuple[list[str], list[int]]:
    """Ids of the requests of the step that `state` is of, and how many rows each has, in the order of its rows."""
    if hasattr(state, "input_batch"):  # model runner 2
        return list(state.input_batch.req_ids), state.input_batch.num_scheduled_tokens.tolist()
    scheduled = state.scheduler_output.num_scheduled_tokens
    ids = [request_id for request_id in runner.input_batch.req_ids if request_id in scheduled]
    return ids, [scheduled[request_id] for request_id in ids]


def with_refused(output: Any, refused: list[str]) -> Any:
    """A step's output that names requests for `scheduler` to end."""
    if hasattr(output, "get_output"):  # with asynchronous scheduling, the output is made later
        get_output = output.get_output
        output.get_output = lambda: with_refused(get_output(), refused)
    else:
        setattr(output, REFUSED, refused)
    return output


def leave_moe_layers_without_adapters() -> None:
    """Have vLLM wrap no MoE layer for LoRA. Call before an engine makes its adapter manager; more calls do nothing.

    Its wrapper asks the layer for a kernel that knows adapters, and takes the routed experts to Triton, on CPUs too.
    Shared experts and gates are linear layers, each with a wrapper of its own.
    """
    manager: Any = importlib.import_module("vllm.lora.model_manager")
    find = manager.get_supported_lora_modules
    if hasattr(find, "__wrapped__"):
        return

    @functools.wraps(find)
    def find_but_moe_layers(model: torch.nn.Module) -> list[str]:
        named = model.named_modules()
        moe_layers = {name.rpartition(".")[2] for name, module in named if isinstance(module, manager.MoERunner)}
        return [name for name in find(model) if name not in moe_layers]

    manager.get_supported_lora_modules = find_but_moe_layers


def keep_a_slot_without_adapter() -> None:
    """On CPUs, have each layer's slots for adapters end with one that stays empty. More calls do nothing.

    Rows without an adapter have the index -1, by which vLLM's CPU kernels take the last slot, whatever is in it.
    """
    manager: Any = importlib.import_module("vllm.lora.model_manager")
    if not current_platform.is_cpu():
        return
    for name, slots in (("from_layer", 1), ("from_layer_logits_processor", 2)):
        make = getattr(manager, name)
        if not hasattr(make, "__wrapped__"):
            setattr(manager, name, _with_one_more(make, slots))


def _with_one_more(make: Callable[..., Any], place: int) -> Callable[..., Any]:
    """`make` with its positional argument at `place` increased by one."""

    @functools.wraps(make)
    def make_with_one_more(*args: Any, **kwargs: Any) -> Any:
        return make(*args[:place], args[place] + 1, *args[place + 1 :], **kwargs)

    return make_with_one_more


def check_adapters(check: Callable[[Path], None]) -> None:
    """Call `check` with the folder of each adapter before vLLM loads it; what it raises is the answer to the load.

    What of an adapter has no layer is refused, too (ValueError): vLLM would leave it out without a word. A second call
    does nothing.
    """
    workers: Any = importlib.import_module("vllm.lora.worker_manager")
    load = workers.WorkerLoRAManager._load_adapter
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def check_and_load(self: Any, lora_request: Any) -> Any:
        check(Path(workers.get_adapter_absolute_path(lora_request.lora_path)))
        adapter, layers = load(self, lora_request), self._adapter_manager
        known = {part for name in layers.modules for part in layers.packed_modules.get(name, [name])}
        unknown = sorted(set(adapter.loras) - known)
        if unknown:
            raise ValueError(
                f"{lora_request.lora_path} changes {', '.join(unknown[:3])}, which this model does not have as a layer "
                f"for adapters ({len(unknown)} of {len(adapter.loras)} layers)"
            )
        return adapter

    workers.WorkerLoRAManager._load_adapter = check_and_load


def gather_from_workers(told: Any) -> list[Any]:
    """What every worker of this tensor-parallel engine hands to this function, by rank. All of them must call it."""
    group = get_tp_group()
    if group.world_size == 1:
        return [told]
    found: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(found, told, group=group.cpu_group)
    return found


def most_rows_of_a_step(config: VllmConfig) -> int:
    """Rows that a forward pass may have: the tokens that may be scheduled, or the largest CUDA graph."""
    largest_graph = config.compilation_config.max_cudagraph_capture_size or 0
    return max(config.scheduler_config.max_num_batched_tokens, largest_graph)


def longest_step_s() -> float:
    """After so long the executor of several workers gives up a step, and with it the engine."""
    return float(vllm_envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def loaders_may_reserve() -> bool:
    """Whether vLLM takes what a loader says with `get_external_weight_memory` off the memory that it shares out.

    It was made for weights that another process holds; a version without it asks nobody.
    """
    return hasattr(DefaultModelLoader, "get_external_weight_memory")


_MOE_OPS = ("vllm::moe_forward", "vllm::moe_forward_shared")


def split_graphs_at_moe(config: VllmConfig) -> None:
    """Make vLLM split its graphs at the ops that wrap a MoE layer on GPUs. Call before the model is compiled."""
    compilation = config.compilation_config
    present = list(compilation.splitting_ops or [])
    compilation.splitting_ops = present + [name for name in _MOE_OPS if name not in present]


# vLLM's own names that others take from here.
__all__ = [
    "DefaultModelLoader",
    "FusedMoEMethodBase",
    "RoutedExperts",
    "SharedExpertsOrder",
    "VllmConfig",
    "direct_register_custom_op",
    "extract_layer_index",
    "get_current_vllm_config",
    "op_registry_oot",
    "register_model_loader",
]
