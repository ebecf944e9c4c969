"""Our own grouped MLP in Triton over quantized weights: bytes are widened in registers, rows keep their dtype.

Legend as in base.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from experts.kernels.base import KernelShape
from experts.kernels.quantized import QuantizedShape, QuantizedStackKernel
from experts.kernels.triton.forms import Form
from experts.kernels.triton.tiles import ThreePrograms, TiledPairs, dot_precision, triton_misfit

# By pairs of a tile. A depth divides 128, so that no step crosses an FP8 block. Not measured against others yet: long
# steps where few pairs share a weight's row, as more bytes are then in flight; gate_up has two accumulators, and
# weights that pass through registers.
GATE_UP = {16: Form(64, 128, 4, 3), 32: Form(64, 128, 4, 3), 64: Form(64, 64, 4, 3), 128: Form(64, 64, 8, 3)}
DOWN = {16: Form(64, 128, 4, 3), 32: Form(64, 128, 4, 3), 64: Form(64, 64, 4, 3), 128: Form(128, 64, 8, 3)}


class TritonQuantizedKernel(ThreePrograms, QuantizedStackKernel):
    """`TritonMlpKernel` for quantized weights: decode reads a half or a quarter of bfloat16's bytes."""

    name = "triton_quantized"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """Wherever Triton's programs run, with router weights on the output."""
        if not isinstance(shape, QuantizedShape):
            return "it takes quantized weights"
        if shape.weight_on_input:
            return "router weights on the input are not supported"
        if shape.format.name == "mxfp4" and shape.dtype == torch.float16:
            return "MXFP4's powers of two do not fit into float16"
        return triton_misfit(shape)

    def _matmuls(
        self,
        run: Callable[..., None],
        layer: int,
        rows_MD: torch.Tensor,
        pairs: TiledPairs,
        h_PI: torch.Tensor,
        y_ND: torch.Tensor,
    ) -> None:
        from experts.kernels.triton import quantized_programs

        shape, stack = self.shape, self._weights
        D, I = shape.hidden_size, shape.intermediate_size
        w13, s13 = stack.w13_LS2IB[layer], stack.w13_scale_LS[layer]
        w2, s2 = stack.w2_LSDB[layer], stack.w2_scale_LS[layer]
        b13 = h_PI if stack.b13_LS2I is None else stack.b13_LS2I[layer]
        b2 = h_PI if stack.b2_LSD is None else stack.b2_LSD[layer]
        common = {
            "HAS_BIAS": shape.has_bias, "PRECISION": dot_precision(shape.dtype), "FORMAT": shape.format.name,
            "GROUP": shape.format.group, "BLOCK_P": pairs.block,
        }  # fmt: skip
        form = GATE_UP[pairs.block]
        run(
            quantized_programs.gate_up, (-(-I // form.columns), pairs.num_tiles),
            rows_MD, w13, s13, b13, pairs.row_P, pairs.tiles, h_PI,
            rows_MD.stride(0), D, I, w13.shape[2], s13.shape[1] // 2, s13.shape[2], shape.activation.alpha, self._limit,
            KIND=shape.activation.kind, BLOCK_I=form.columns, BLOCK_D=form.depth, **common,
            num_warps=form.warps, num_stages=form.stages,
        )  # fmt: skip
        form = DOWN[pairs.block]
        run(
            quantized_programs.down, (-(-D // form.columns), pairs.num_tiles),
            h_PI, w2, s2, b2, pairs.pair_P, pairs.weight_P, pairs.tiles, y_ND,
            D, I, w2.shape[2], s2.shape[1], s2.shape[2],
            BLOCK_D=form.columns, BLOCK_I=form.depth, **common,
            num_warps=form.warps, num_stages=form.stages,
        )  # fmt: skip
