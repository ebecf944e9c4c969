"""Everything of vLLM's internals that the project touches, in one place.

Written for vllm 0.25.1 to 0.32; `tests/experts/vllm_plugin/test_joints.py` says what a later version moved. Names and
parameters are the same in 0.25.1 and 0.32.0, but 0.25.1 has no expert class for gpt-oss. Engines were run with 0.32.0
only.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op

logger = logging.getLogger(__name__)

# Models with an expert class of their own. vLLM looks replacements up by exact class name, so each is listed.
_EXPERT_SUBCLASSES = (
    ("vllm.model_executor.models.gpt_oss", "GptOssRoutedExperts"),
    ("vllm.model_executor.models.dbrx", "DbrxExperts"),
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


_MOE_OPS = ("vllm::moe_forward", "vllm::moe_forward_shared")


def split_graphs_at_moe(config: VllmConfig) -> None:
    """Make vLLM split its graphs at the ops that wrap a MoE layer on GPUs. Call before the model is compiled."""
    compilation = config.compilation_config
    present = list(compilation.splitting_ops or [])
    compilation.splitting_ops = present + [name for name in _MOE_OPS if name not in present]


__all__ = [
    "DefaultModelLoader",
    "FusedMoEMethodBase",
    "RoutedExperts",
    "SharedExpertsOrder",
    "VllmConfig",
    "defaulted_parameters",
    "direct_register_custom_op",
    "expertmesh_settings",
    "extract_layer_index",
    "get_current_vllm_config",
    "op_registry_oot",
    "register_model_loader",
    "routed_expert_classes",
    "split_graphs_at_moe",
    "step_in_progress",
]
