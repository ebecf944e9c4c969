"""Our own grouped MLP in Triton, for GPUs without vllm.

The CPU knows the pairs, so it cuts the tiles and sends them in one copy: nothing waits for the GPU. Legend as in
base.py; P pairs sorted by slot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from experts.kernels.base import KernelShape
from experts.kernels.stacked import StackedKernel
from experts.kernels.triton.forms import Form, shared_bytes
from experts.kernels.triton.tiles import ThreePrograms, TiledPairs, dot_precision, triton_misfit

# By pairs of a tile. The best of 265 on an H100 in bfloat16, over the shapes of DeepSeek-V3, Qwen3-30B and gpt-oss with
# 1 to 4096 rows (docs/gpu-results.md).
GATE_UP = {16: Form(32, 256, 4, 3), 32: Form(64, 128, 4, 3), 64: Form(64, 64, 4, 3), 128: Form(128, 64, 8, 4)}
DOWN = {16: Form(64, 128, 4, 4), 32: Form(128, 128, 4, 2), 64: Form(128, 64, 4, 4), 128: Form(256, 64, 8, 4)}


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
            "PRECISION": dot_precision(shape.dtype), "BLOCK_P": pairs.block,
        }  # fmt: skip
        block, itemsize, shared = pairs.block, shape.dtype.itemsize, shared_bytes(shape.device)
        form = GATE_UP[block]
        run(
            mlp_programs.gate_up, (pairs.num_tiles, -(-I // form.columns)),
            rows_MD, w13, b13, pairs.row_P, pairs.weight_P, pairs.tiles, h_PI,
            rows_MD.stride(0), D, I, shape.activation.alpha, self._limit,
            KIND=shape.activation.kind, BLOCK_I=form.columns, BLOCK_D=form.depth, **common,
            num_warps=form.warps, num_stages=form.fit(block, 2, itemsize, shared),
        )  # fmt: skip
        form = DOWN[block]
        run(
            mlp_programs.down, (pairs.num_tiles, -(-D // form.columns)),
            h_PI, w2, b2, pairs.pair_P, pairs.weight_P, pairs.tiles, y_ND,
            D, I,
            BLOCK_D=form.columns, BLOCK_I=form.depth, **common,
            num_warps=form.warps, num_stages=form.fit(block, 1, itemsize, shared),
        )  # fmt: skip
