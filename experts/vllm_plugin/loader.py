"""vLLM's weight loader without the routed experts, and the check that every MoE layer was replaced."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Generator
from typing import Any

import torch
from safetensors import safe_open

from experts.protocol.errors import UnsupportedModelError
from experts.vllm_plugin.joints import (
    DefaultModelLoader,
    RoutedExperts,
    register_model_loader,
    weight_files,
)
from experts.vllm_plugin.layer import MeshExpertsMixin, current_checkpoint, current_client
from experts.vllm_plugin.refusals import check_engine

logger = logging.getLogger(__name__)

LOAD_FORMAT = "expertmesh"


def verify_model(model: torch.nn.Module) -> int:
    """Check that every MoE layer was replaced and return how many; UnsupportedModelError names one that was not."""
    replaced = 0
    for name, module in model.named_modules():
        if isinstance(module, MeshExpertsMixin):
            replaced += 1
        elif isinstance(module, RoutedExperts) or _looks_like_experts(module):
            raise UnsupportedModelError(
                f"MoE layer {name} ({type(module).__name__}) was not replaced by expertmesh; this model class of vLLM "
                "brings its own experts, which is not supported yet"
            )
    if replaced == 0:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no routed experts: a dense model gains nothing here, serve it with plain vLLM"
        )
    expected = current_client().shape.num_layers
    if replaced != expected:
        raise UnsupportedModelError(f"{replaced} MoE layers were replaced, the checkpoint has {expected}")
    return replaced


def _looks_like_experts(module: torch.nn.Module) -> bool:
    return any(name in ("w13_weight", "w2_weight") for name, _ in module.named_parameters(recurse=False))


@register_model_loader(LOAD_FORMAT)
class RouterModelLoader(DefaultModelLoader):
    """vLLM's loader without the tensors of routed experts, which a router neither reads nor holds."""

    def __init__(self, load_config: Any) -> None:
        load_config = copy.copy(load_config)
        load_config.load_format = "safetensors"
        super().__init__(load_config)

    def load_model(self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Load the dense half, then check that expertmesh replaced every MoE layer."""
        self._checkpoint = current_checkpoint(check_engine(vllm_config))
        model = super().load_model(vllm_config, model_config, *args, **kwargs)
        count = verify_model(model)
        num_params = sum(p.numel() for p in model.parameters())
        logger.info("replaced %d MoE layers; this router holds %d parameters", count, num_params)
        return model

    def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Every tensor of the checkpoint except those of routed experts.

        vLLM's own iterator creates each tensor before we could skip it, which touches its pages: with read-ahead, most
        of the checkpoint.
        """
        strategy = self.load_config.safetensors_load_strategy
        if strategy not in (None, "lazy") or self.load_config.model_loader_extra_config:
            logger.warning("the whole checkpoint is read, experts too: the load strategy is not vLLM's own")
            for name, tensor in super()._get_weights_iterator(source):
                if not self._checkpoint.owns(name.removeprefix(source.prefix)):
                    yield name, tensor
            return
        files = weight_files(self, source)
        self.counter_before_loading_weights = getattr(self, "counter_before_loading_weights", 0) or time.perf_counter()
        for file in sorted(files):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    if not self._checkpoint.owns(name):
                        yield source.prefix + name, tensors.get_tensor(name)
