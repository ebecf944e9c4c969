"""Kernels made of vLLM's kernels for quantized weights on GPUs: FP8 blocks and INT4 (Triton), MXFP4 (Marlin).

The vLLM names used here exist in vllm 0.25.1 and 0.32.0. Legend as in base.py; B bytes of a row.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from experts.checkpoint.dequantize import E8M0_BIAS
from experts.checkpoint.weight_format import FormatName, QuantizedExpert
from experts.kernels.base import KernelShape
from experts.kernels.quantized import QuantizedKernel, QuantizedShape, QuantizedStackKernel
from experts.kernels.vllm.common import ACTIVATIONS, one_row_per_pair, swigluoai_misfit, vllm_misfit

# Marlin's tiles, as vLLM rounds the sizes of its own MXFP4 layers.
MARLIN_HIDDEN, MARLIN_WIDTH = 256, 128


@functools.cache
def _fused_moe() -> SimpleNamespace:
    """vLLM's functional fused MoE and its configurations. Importing vllm takes seconds."""
    from vllm.model_executor.layers.fused_moe import config, fused_moe
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return SimpleNamespace(
        experts=fused_moe.fused_experts,
        fp8=config.fp8_w8a8_moe_quant_config,
        int4=config.int4_w4a16_moe_quant_config,
        activation=MoEActivation,
    )


@functools.cache
def _marlin_moe() -> SimpleNamespace:
    """vLLM's Marlin MoE, its packing of MXFP4, and its id of FP4."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_moe_mxfp4_layer_for_marlin
    from vllm.scalar_type import scalar_types

    return SimpleNamespace(
        experts=fused_marlin_moe,
        prepare=prepare_moe_mxfp4_layer_for_marlin,
        fp4=scalar_types.float4_e2m1f.id,
        activation=MoEActivation,
    )


class VllmQuantizedKernel(QuantizedKernel):
    """What the three kernels share: when they can run, and ragged pairs as rows of their own."""

    format_name: ClassVar[FormatName]
    activations: ClassVar[tuple[str, ...]] = ACTIVATIONS

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """CUDA with vllm, 16-bit rows, the kernel's format, and what its layout allows."""
        if not isinstance(shape, QuantizedShape) or shape.format.name != cls.format_name:
            return f"it takes {cls.format_name} weights"
        if shape.activation.kind not in cls.activations:
            return f"it takes {', '.join(cls.activations)}, not {shape.activation.kind}"
        reason = cls._misfit(shape) or vllm_misfit(shape)
        if reason is not None:
            return reason
        try:
            cls._library()
        except Exception as error:  # vllm fails in many ways when built for another platform
            return f"vllm's kernel cannot be imported: {error}"
        return None

    @classmethod
    @abstractmethod
    def _misfit(cls, shape: QuantizedShape) -> str | None:
        """Why `shape` does not fit the layout, or None."""

    @classmethod
    @abstractmethod
    def _library(cls) -> SimpleNamespace:
        """The functions taken from vllm."""

    @abstractmethod
    def _experts(self, layer: int, x_ND: torch.Tensor, slots_N1: torch.Tensor, ones_N1: torch.Tensor) -> torch.Tensor:
        """Each row through the expert in its slot."""

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
        one_row_per_pair(
            self.shape, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD, functools.partial(self._experts, layer)
        )


class VllmStackKernel(VllmQuantizedKernel, QuantizedStackKernel):
    """The kernels that read weights as the checkpoint stores them."""

    @classmethod
    def _library(cls) -> SimpleNamespace:
        return _fused_moe()


class VllmFp8Kernel(VllmStackKernel):
    """DeepSeek-V3's FP8 blocks. vLLM quantizes the rows too, with one scale for 128 values."""

    name = "vllm_fp8"
    format_name = "fp8_block"

    @classmethod
    def _misfit(cls, shape: QuantizedShape) -> str | None:
        if shape.has_bias:
            return "biases are not supported"
        for field in ("hidden_size", "intermediate_size"):
            if getattr(shape, field) % shape.format.group:
                return f"{field} {getattr(shape, field)} is not a multiple of {shape.format.group}"
        return None

    def _experts(self, layer: int, x_ND: torch.Tensor, slots_N1: torch.Tensor, ones_N1: torch.Tensor) -> torch.Tensor:
        vllm, stack, group = _fused_moe(), self._weights, self.shape.format.group
        return vllm.experts(
            x_ND,
            stack.w13_LS2IB[layer].view(torch.float8_e4m3fn),
            stack.w2_LSDB[layer].view(torch.float8_e4m3fn),
            ones_N1,
            slots_N1,
            activation=vllm.activation(self.shape.activation.kind),
            quant_config=vllm.fp8(stack.w13_scale_LS[layer], stack.w2_scale_LS[layer], block_shape=[group, group]),
        )


class VllmInt4Kernel(VllmStackKernel):
    """Symmetric INT4 with one scale for each group of a row."""

    name = "vllm_int4"
    format_name = "int4"

    @classmethod
    def _misfit(cls, shape: QuantizedShape) -> str | None:
        if shape.has_bias:
            return "biases are not supported"
        return None if shape.format.group >= 32 else f"groups of {shape.format.group} are not supported"

    def _experts(self, layer: int, x_ND: torch.Tensor, slots_N1: torch.Tensor, ones_N1: torch.Tensor) -> torch.Tensor:
        vllm, stack = _fused_moe(), self._weights
        return vllm.experts(
            x_ND,
            stack.w13_LS2IB[layer],
            stack.w2_LSDB[layer],
            ones_N1,
            slots_N1,
            activation=vllm.activation(self.shape.activation.kind),
            quant_config=vllm.int4(
                stack.w13_scale_LS[layer], stack.w2_scale_LS[layer], block_shape=[0, self.shape.format.group]
            ),
        )


def _interleaved(rows: torch.Tensor) -> torch.Tensor:
    """Rows gate 0, up 0, gate 1, up 1, ... from all gates followed by all ups."""
    gate, up = rows.chunk(2)
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def _halves_padded(rows: torch.Tensor, width: int, columns: int, value: int) -> torch.Tensor:
    """Pad both halves of [2I, columns'] to `width` rows each, and all rows to `columns`."""
    parts = [_padded(half, width, columns, value) for half in rows.chunk(2)]
    return torch.cat(parts)


def _padded(rows: torch.Tensor, height: int, columns: int, value: int) -> torch.Tensor:
    return F.pad(rows, (0, columns - rows.shape[1], 0, height - rows.shape[0]), value=value)


def for_marlin(weights: QuantizedExpert, hidden_size: int, intermediate_size: int, interleave: bool) -> QuantizedExpert:
    """Pad one MXFP4 expert to sizes that Marlin supports, with zeros of scale 1.

    `interleave`: let gate and up rows alternate, as vLLM's swigluoai expects.
    """
    D, I, group = hidden_size, intermediate_size, weights.format.group
    w13 = _halves_padded(weights.w13_2IB, I, D // 2, 0)
    w13_scale = _halves_padded(weights.w13_scale, I, D // group, E8M0_BIAS)
    b13 = None if weights.b13_2I is None else _halves_padded(weights.b13_2I[:, None], I, 1, 0)
    if interleave:
        w13, w13_scale, b13 = _interleaved(w13), _interleaved(w13_scale), None if b13 is None else _interleaved(b13)
    return replace(
        weights,
        w13_2IB=w13,
        w13_scale=w13_scale,
        w2_DB=_padded(weights.w2_DB, D, I // 2, 0),
        w2_scale=_padded(weights.w2_scale, D, I // group, E8M0_BIAS),
        b13_2I=None if b13 is None else b13[:, 0],
        b2_D=None if weights.b2_D is None else F.pad(weights.b2_D, (0, D - weights.b2_D.shape[0])),
    )


class VllmMxfp4Kernel(VllmQuantizedKernel):
    """gpt-oss's MXFP4 in Marlin's layout. Only vLLM knows that layout, so it packs each expert, on the GPU."""

    name = "vllm_mxfp4"
    format_name = "mxfp4"
    activations = ("silu", "swigluoai")

    def __init__(self, shape: QuantizedShape) -> None:
        super().__init__(shape)
        self._hidden_size = -(-shape.hidden_size // MARLIN_HIDDEN) * MARLIN_HIDDEN
        self._width = -(-shape.intermediate_size // MARLIN_WIDTH) * MARLIN_WIDTH
        self._stacked: list[torch.Tensor | None] = []
        """w13, w2, w13's scales, w2's scales, b13, b2, each [layers, slots, ...]; allocated with the first expert."""

    @classmethod
    def _misfit(cls, shape: QuantizedShape) -> str | None:
        if shape.dtype == torch.float16:
            return "MXFP4's powers of two do not fit into float16"
        return swigluoai_misfit(shape.activation)

    @classmethod
    def _library(cls) -> SimpleNamespace:
        return _marlin_moe()

    def _pack(self, layer: int, slot: int, weights: QuantizedExpert) -> None:
        shape = self.shape
        sized = for_marlin(weights, self._hidden_size, self._width, shape.activation.kind == "swigluoai")
        tensors: list[Any] = [sized.w13_2IB, sized.w2_DB, sized.w13_scale, sized.w2_scale, sized.b13_2I, sized.b2_D]
        packed = _marlin_moe().prepare(
            SimpleNamespace(params_dtype=shape.dtype),
            *(None if t is None else t[None].contiguous().to(shape.device) for t in tensors),
        )
        if not self._stacked:
            self._stacked = [
                None if t is None else t.new_zeros((shape.num_layers, shape.num_slots, *t.shape[1:])) for t in packed
            ]
        for stacked, one in zip(self._stacked, packed, strict=True):
            if stacked is not None:
                stacked[layer, slot].copy_(one[0])

    def _weight_tensors(self) -> list[torch.Tensor]:
        return [t for t in self._stacked if t is not None]

    def _experts(self, layer: int, x_ND: torch.Tensor, slots_N1: torch.Tensor, ones_N1: torch.Tensor) -> torch.Tensor:
        marlin, D = _marlin_moe(), self.shape.hidden_size
        w13, w2, w13_scale, w2_scale, b13, b2 = (None if t is None else t[layer] for t in self._stacked)
        y_ND = marlin.experts(
            F.pad(x_ND, (0, self._hidden_size - D)),
            w13,
            w2,
            b13,
            b2,
            w13_scale,
            w2_scale,
            ones_N1,
            slots_N1,
            quant_type_id=marlin.fp4,
            activation=marlin.activation(self.shape.activation.kind),
        )
        return y_ND[:, :D]
