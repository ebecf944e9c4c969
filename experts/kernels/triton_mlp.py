"""Our own grouped MLP in Triton, for GPUs where vllm is not installed.

Never run on a GPU by its authors: none was at hand. Its programs were checked against the float64 oracle in Triton's
interpreter on the CPU (TRITON_INTERPRET=1); tile sizes are reasoned, not measured.

The pairs are known on the CPU, so tiles are cut there and travel in one copy: nothing waits for the GPU. Legend as in
base.py; P pairs sorted by slot.
"""

from __future__ import annotations

import importlib.util
import math
import os

import numpy as np
import torch

from experts.kernels.base import ExpertKernel, KernelShape
from experts.kernels.torch_loop import StackedWeights
from experts.spec import ExpertWeights


def interpreted() -> bool:
    """True if Triton runs its programs in Python on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cut_tiles(slots_N: np.ndarray, num_slots: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Order that sorts the pairs by slot, int32 [N], and tiles of `block` pairs, int32 [T, 3]: slot, first pair, end.

    `end` is that of the slot's pairs, which may lie within or beyond the tile. Slots [0, 2, 0] and block 2 give the
    order [0, 2, 1] and the tiles [0, 0, 2] and [2, 2, 3].
    """
    order_P = np.argsort(slots_N, kind="stable").astype(np.int32)
    counts_S = np.bincount(slots_N, minlength=num_slots)
    tiles_S = -(-counts_S // block)
    ends_S = np.cumsum(counts_S)
    slot_T = np.repeat(np.arange(num_slots), tiles_S)
    index_T = np.arange(slot_T.shape[0]) - np.repeat(np.cumsum(tiles_S) - tiles_S, tiles_S)
    first_T = (ends_S - counts_S)[slot_T] + index_T * block
    return order_P, np.stack([slot_T, first_T, ends_S[slot_T]], axis=1).astype(np.int32)


def choose_block(num_pairs: int, num_slots: int) -> int:
    """Pairs of a tile: the smallest size of Triton's that holds an average slot's, 16 to 128."""
    average = num_pairs / num_slots
    return next((block for block in (16, 32, 64) if average <= block), 128)


class TritonMlpKernel(ExpertKernel):
    """Three programs a call: gate and up with the activation, down with the weight, sum over a row's pairs."""

    name = "triton_mlp"

    def __init__(self, shape: KernelShape) -> None:
        super().__init__(shape)
        self._weights = StackedWeights(shape)
        activation = shape.activation
        self._limit = math.inf if activation.limit is None else activation.limit
        # float32 models are served for exactness: no TF32
        self._precision = "ieee" if shape.dtype == torch.float32 else "tf32"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """CUDA devices with triton installed; the CPU in Triton's interpreter."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if interpreted() and shape.device_type == "cpu":
            return "Triton's interpreter cannot multiply bfloat16" if shape.dtype == torch.bfloat16 else None
        if shape.device_type != "cuda":
            return f"it runs on CUDA, not on {shape.device}"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return None

    def _pack(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        self._weights.write(layer, slot, weights)

    def _weight_tensors(self) -> list[torch.Tensor]:
        return self._weights.tensors()

    def forward(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
    ) -> None:
        """See `ExpertKernel.forward`. The same bits for the same call."""
        self._check_call(layer, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD)
        shape, stacked = self.shape, self._weights
        M, N, D, I = rows_MD.shape[0], slots_N.shape[0], shape.hidden_size, shape.intermediate_size
        if N == 0:
            out_MD.zero_()
            return
        from experts.kernels import triton_jit

        block = choose_block(N, shape.num_slots)
        order_P, tiles_T3 = cut_tiles(slots_N.numpy(), shape.num_slots, block)
        row_N = np.repeat(np.arange(M, dtype=np.int32), np.diff(row_offsets_M1.numpy()))
        num_tiles = tiles_T3.shape[0]
        # one copy for all that the programs read of the pairs
        weight_P = weights_N.numpy()[order_P].view(np.int32)
        parts = (tiles_T3.ravel(), row_N[order_P], order_P, weight_P, row_offsets_M1.numpy())
        host = torch.from_numpy(np.concatenate(parts))
        if rows_MD.is_cuda:
            host = host.pin_memory()
        tiles, row_P, pair_P, weight_bits_P, offsets = host.to(rows_MD.device, non_blocking=True).split(
            [3 * num_tiles, N, N, N, M + 1]
        )
        weight_P_device = weight_bits_P.view(torch.float32)
        h_PI = torch.empty(N, I, dtype=shape.dtype, device=rows_MD.device)
        y_ND = torch.empty(N, D, dtype=torch.float32, device=rows_MD.device)
        w13, w2 = stacked.w13_LS2ID[layer], stacked.w2_LSDI[layer]
        b13 = w13 if stacked.b13_LS2I is None else stacked.b13_LS2I[layer]
        b2 = w2 if stacked.b2_LSD is None else stacked.b2_LSD[layer]
        wide = 64 if block <= 64 else 128
        options = {"num_warps": 8 if block == 128 else 4, "num_stages": 3}
        common = {"HAS_BIAS": shape.has_bias, "WEIGHT_ON_INPUT": shape.weight_on_input, "PRECISION": self._precision}
        triton_jit.gate_up[(-(-I // wide), num_tiles)](
            rows_MD, w13, b13, row_P, weight_P_device, tiles, h_PI,
            rows_MD.stride(0), D, I, shape.activation.alpha, self._limit,
            KIND=shape.activation.kind, BLOCK_P=block, BLOCK_I=wide, BLOCK_D=64, **common, **options,
        )  # fmt: skip
        triton_jit.down[(-(-D // wide), num_tiles)](
            h_PI, w2, b2, pair_P, weight_P_device, tiles, y_ND,
            D, I,
            BLOCK_P=block, BLOCK_D=wide, BLOCK_I=64, **common, **options,
        )  # fmt: skip
        triton_jit.sum_pairs[(-(-D // 256), M)](y_ND, offsets, out_MD, out_MD.stride(0), D, BLOCK_D=256)
