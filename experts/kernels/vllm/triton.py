"""Kernel made of vLLM's Triton fused MoE (`fused_experts`), for GPUs; needs vllm. Legend as in base.py."""

from __future__ import annotations

import functools
from typing import Any

import torch

from experts.kernels.base import KernelShape
from experts.kernels.stacked import StackedKernel
from experts.kernels.vllm.common import ACTIVATIONS, one_row_per_pair, vllm_misfit


@functools.cache
def _vllm() -> tuple[Any, Any, Any]:
    """(fused_experts, MoEActivation, biased_moe_quant_config). Importing vllm takes seconds."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import biased_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    return fused_experts, MoEActivation, biased_moe_quant_config


class VllmTritonKernel(StackedKernel):
    """vLLM's kernel with its tuned tile sizes."""

    name = "vllm_triton"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """CUDA, without gpt-oss's activation: vLLM takes its constants from the layer's configuration."""
        if shape.activation.kind not in ACTIVATIONS:
            return f"it takes {', '.join(ACTIVATIONS)}, not {shape.activation.kind}"
        misfit = vllm_misfit(shape)
        if misfit is not None:
            return misfit
        try:
            _vllm()
        except Exception as error:  # vllm fails in many ways when built for another platform
            return f"vllm's fused MoE cannot be imported: {error}"
        return None

    def forward(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
    ) -> None:
        """See `ExpertKernel.forward`. Rounds each pair's product to the rows' dtype before the sum."""
        self._check_call(layer, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD)
        fused_experts, activations, biased_config = _vllm()
        stacked, config = self._weights, None
        if stacked.b13_LS2I is not None and stacked.b2_LSD is not None:
            config = biased_config(stacked.b13_LS2I[layer], stacked.b2_LSD[layer])

        def experts(x_ND: torch.Tensor, slots_N1: torch.Tensor, ones_N1: torch.Tensor) -> torch.Tensor:
            return fused_experts(
                x_ND,
                stacked.w13_LS2ID[layer],
                stacked.w2_LSDI[layer],
                ones_N1,
                slots_N1,
                activation=activations(self.shape.activation.kind),
                quant_config=config,
            )

        one_row_per_pair(self.shape, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD, experts)
