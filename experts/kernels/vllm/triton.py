"""Kernel made of vLLM's Triton fused MoE (`fused_experts`), on GPUs where vllm is installed.

Never run by its authors: no GPU was at hand. Ragged pairs go in as rows of their own with top-k 1; the weighted sum
over a row's pairs follows in float32. Legend as in base.py.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from experts.kernels.base import KernelShape
from experts.kernels.stacked import StackedKernel

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@functools.cache
def _vllm() -> tuple[Any, Any, Any]:
    """(fused_experts, MoEActivation, biased_moe_quant_config); importing vllm takes seconds."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import biased_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    return fused_experts, MoEActivation, biased_moe_quant_config


def one_row_a_pair(
    shape: KernelShape,
    rows_MD: torch.Tensor,
    row_offsets_M1: torch.Tensor,
    slots_N: torch.Tensor,
    weights_N: torch.Tensor,
    out_MD: torch.Tensor,
    experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """`ExpertKernel.forward` by a function of (rows [N, D], slots [N, 1], ones [N, 1]) that knows top-k 1 only."""
    M, N = rows_MD.shape[0], slots_N.shape[0]
    if N == 0:
        out_MD.zero_()
        return
    device = rows_MD.device
    row_N = torch.repeat_interleave(torch.arange(M), row_offsets_M1.diff().long()).to(device, non_blocking=True)
    slots_N1 = slots_N[:, None].to(device, non_blocking=True)
    weights_N1 = weights_N[:, None].to(device, non_blocking=True)
    x_ND = rows_MD[row_N]
    if shape.weight_on_input:
        x_ND = (x_ND.float() * weights_N1).to(shape.dtype)
    y_ND = experts(x_ND, slots_N1, torch.ones_like(weights_N1)).float()
    if not shape.weight_on_input:
        y_ND *= weights_N1
    acc_MD = torch.zeros(rows_MD.shape, dtype=torch.float32, device=device)
    out_MD.copy_(acc_MD.index_add_(0, row_N, y_ND))


def vllm_misfit(shape: KernelShape) -> str | None:
    """Why vLLM's kernels for GPUs cannot run where `shape` computes, before any of vllm is imported."""
    if shape.device_type != "cuda":
        return f"it runs on CUDA, not on {shape.device}"
    if shape.dtype == torch.float32:
        return "its matmuls round float32 to TF32, and float32 is served for exactness"
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


class VllmTritonKernel(StackedKernel):
    """vLLM's own kernel with its tuned tile sizes."""

    name = "vllm_triton"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """CUDA; not gpt-oss's activation, whose constants it takes from vLLM's own layer configuration."""
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

        one_row_a_pair(self.shape, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD, experts)
