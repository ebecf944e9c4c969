"""Our own grouped MLP in Triton, for GPUs without vllm.

The CPU knows the pairs, so it cuts the tiles and sends them in one copy: nothing waits for the GPU. Legend as in
base.py; P pairs sorted by slot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from experts.kernels.base import KernelShape
from experts.kernels.stacked import StackedKernel
from experts.kernels.triton.tiles import ThreePrograms, TiledPairs, dot_precision, triton_misfit


class TritonMlpKernel(ThreePrograms, StackedKernel):
    """The kernel for plain weights."""

    name = "triton_mlp"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """CUDA devices with triton installed; the CPU in Triton's interpreter."""
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
        from experts.kernels.triton import mlp_programs

        shape, stacked = self.shape, self._weights
        D, I = shape.hidden_size, shape.intermediate_size
        w13, w2 = stacked.w13_LS2ID[layer], stacked.w2_LSDI[layer]
        b13 = w13 if stacked.b13_LS2I is None else stacked.b13_LS2I[layer]
        b2 = w2 if stacked.b2_LSD is None else stacked.b2_LSD[layer]
        common = {
            "HAS_BIAS": shape.has_bias, "WEIGHT_ON_INPUT": shape.weight_on_input,
            "PRECISION": dot_precision(shape.dtype), "BLOCK_P": pairs.block, **pairs.options,
        }  # fmt: skip
        run(
            mlp_programs.gate_up, (-(-I // pairs.wide), pairs.num_tiles),
            rows_MD, w13, b13, pairs.row_P, pairs.weight_P, pairs.tiles, h_PI,
            rows_MD.stride(0), D, I, shape.activation.alpha, self._limit,
            KIND=shape.activation.kind, BLOCK_I=pairs.wide, BLOCK_D=64, **common,
        )  # fmt: skip
        run(
            mlp_programs.down, (-(-D // pairs.wide), pairs.num_tiles),
            h_PI, w2, b2, pairs.pair_P, pairs.weight_P, pairs.tiles, y_ND,
            D, I,
            BLOCK_D=pairs.wide, BLOCK_I=64, **common,
        )  # fmt: skip
