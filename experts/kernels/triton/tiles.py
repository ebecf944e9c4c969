"""Pairs cut into tiles for Triton programs, and the base of the kernels that run three programs over them.

Legend: N (row, slot) pairs, P pairs sorted by slot, D hidden size, I expert intermediate size.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from experts.kernels.base import ExpertKernel, KernelShape
from experts.native.library import data_plane


def interpreted() -> bool:
    """Whether Triton runs its programs in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cut_tiles(slots_N: np.ndarray, num_slots: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Order that sorts the pairs by slot, int32 [N], and tiles of `block` pairs, int32 [T, 3]: slot, first pair, end.

    `end` is the end of the slot's pairs, inside or beyond the tile. Slots [0, 2, 0] and block 2 give the order
    [0, 2, 1] and the tiles [0, 0, 2] and [2, 2, 3].
    """
    order_P = np.argsort(slots_N, kind="stable").astype(np.int32)
    counts_S = np.bincount(slots_N, minlength=num_slots)
    tiles_S = -(-counts_S // block)
    ends_S = np.cumsum(counts_S)
    slot_T = np.repeat(np.arange(num_slots), tiles_S)
    index_T = np.arange(slot_T.shape[0]) - np.repeat(np.cumsum(tiles_S) - tiles_S, tiles_S)
    first_T = (ends_S - counts_S)[slot_T] + index_T * block
    return order_P, np.stack([slot_T, first_T, ends_S[slot_T]], axis=1).astype(np.int32)


def choose_block(num_pairs: int, num_slots: int, most: int = 128) -> int:
    """Pairs of a tile: the smallest power of two from 16 to `most` that holds an average slot's pairs, and 64 up to 192
    of them: so measured on an H100."""
    average = num_pairs / num_slots
    return min(next((block for block, pairs in ((16, 16), (32, 32), (64, 192)) if average <= pairs), 128), most)


@dataclass(frozen=True)
class TiledPairs:
    """The pairs of a call in the form that the programs read, on the rows' device."""

    block: int  # pairs of a tile
    num_tiles: int
    tiles: torch.Tensor  # int32 [3 tiles], and room behind them
    row_P: torch.Tensor  # int32
    pair_P: torch.Tensor  # int32: index of a sorted pair in the call
    offsets_M1: torch.Tensor  # int32
    weight_P: torch.Tensor  # float32


def tile_pairs(
    row_offsets_M1: torch.Tensor,
    slots_N: torch.Tensor,
    weights_N: torch.Tensor,
    shape: KernelShape,
    block: int | None = None,
) -> TiledPairs:
    """Sort the pairs, cut them into tiles, and send all to the device in one copy that nothing waits for.

    `block`: pairs of a tile; None for what suits their number.
    """
    num_slots, device = shape.num_slots, torch.device(shape.device)
    M, N = row_offsets_M1.shape[0] - 1, slots_N.shape[0]
    block = block or choose_block(N, num_slots, most_pairs(shape.dtype))
    # Each part starts at a multiple of 16 bytes: Triton compiles a second version for other addresses.
    sizes = (3 * (N // block + min(num_slots, N)), N, N, M + 1, N)
    starts = list(itertools.accumulate((-(-size // 4) * 4 for size in sizes), initial=0))
    host = torch.empty(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    num_tiles = _fill(host, starts, block, num_slots, row_offsets_M1, slots_N, weights_N)
    sent = host.to(device, non_blocking=True)
    tiles, row_P, pair_P, offsets_M1, weight_bits_P = (
        sent[start : start + size] for start, size in zip(starts, sizes, strict=False)
    )
    return TiledPairs(block, num_tiles, tiles, row_P, pair_P, offsets_M1, weight_bits_P.view(torch.float32))


def _fill(
    host: torch.Tensor,
    starts: Sequence[int],
    block: int,
    num_slots: int,
    row_offsets_M1: torch.Tensor,
    slots_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> int:
    """Write the five parts of `TiledPairs`, from `starts` on; returns the number of tiles."""
    M, N = row_offsets_M1.shape[0] - 1, slots_N.shape[0]
    library = data_plane()
    if library is not None:
        address = host.data_ptr()
        parts = (ctypes.c_int64 * 5)(*(address + 4 * start for start in starts[:5]))
        return int(
            library.data_plane_cut_tiles(
                slots_N.data_ptr(), N, num_slots, block, row_offsets_M1.data_ptr(), M, weights_N.data_ptr(), parts
            )
        )
    order_P, tiles_T3 = cut_tiles(slots_N.numpy(), num_slots, block)
    row_N = np.repeat(np.arange(M, dtype=np.int32), np.diff(row_offsets_M1.numpy()))
    weight_P = weights_N.numpy()[order_P].view(np.int32)
    words = host.numpy()
    for start, part in zip(
        starts, (tiles_T3.ravel(), row_N[order_P], order_P, row_offsets_M1.numpy(), weight_P), strict=False
    ):
        words[start : start + part.size] = part
    return len(tiles_T3)


def each_block(pairs: TiledPairs, dtype: torch.dtype) -> list[TiledPairs]:
    """The same pairs with every tile size, to compile them all early: no request should wait for a compiler."""
    return [replace(pairs, block=block) for block in (16, 32, 64, 128) if block <= most_pairs(dtype)]


def most_pairs(dtype: torch.dtype) -> int:
    """Most pairs of a tile: two float32 accumulators of 128 x 128 and float32 operands do not fit into registers."""
    return 64 if dtype == torch.float32 else 128


def run_program(program: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a Triton program."""
    program[grid](*arguments, **options)


def compile_program(program: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Compile a Triton program for these kinds of arguments."""
    program.warmup(*arguments, grid=grid, **options)


def triton_misfit(shape: KernelShape) -> str | None:
    """Why Triton programs cannot run on the device of `shape`; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted() and shape.device_type == "cpu":
        return "Triton's interpreter cannot multiply bfloat16" if shape.dtype == torch.bfloat16 else None
    if shape.device_type != "cuda":
        return f"it runs on CUDA, not on {shape.device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of Triton's dot: no TF32 for float32, because float32 is served for exactness."""
    return "ieee" if dtype == torch.float32 else "tf32"


class ThreePrograms(ExpertKernel):
    """A kernel of three programs: gate and up with the activation, down with the weight, sum over a row's pairs."""

    def __init__(self, shape: KernelShape) -> None:
        super().__init__(shape)
        self._limit = math.inf if shape.activation.limit is None else shape.activation.limit
        self._compiled = False

    @abstractmethod
    def _matmuls(
        self,
        run: Callable[..., None],
        layer: int,
        rows_MD: torch.Tensor,
        pairs: TiledPairs,
        h_PI: torch.Tensor,
        y_ND: torch.Tensor,
    ) -> None:
        """The first two programs: y = weight * MLP(row) of each pair. `run` is `run_program` or `compile_program`."""

    def forward(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
    ) -> None:
        """See `ExpertKernel.forward`. Equal calls give equal bits."""
        self._check_call(layer, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD)
        shape, N = self.shape, slots_N.shape[0]
        if N == 0:
            out_MD.zero_()
            return
        from experts.kernels.triton import mlp_programs

        with torch.cuda.device_of(rows_MD):  # Triton launches on the thread's device
            pairs = tile_pairs(row_offsets_M1, slots_N, weights_N, shape)
            h_PI = torch.empty(N, shape.intermediate_size, dtype=shape.dtype, device=rows_MD.device)
            y_ND = torch.empty(N, shape.hidden_size, dtype=torch.float32, device=rows_MD.device)
            if not (self._compiled or interpreted()):
                for other in each_block(pairs, shape.dtype):
                    self._matmuls(compile_program, layer, rows_MD, other, h_PI, y_ND)
            self._compiled = True
            self._matmuls(run_program, layer, rows_MD, pairs, h_PI, y_ND)
            M, D = rows_MD.shape
            mlp_programs.sum_pairs[(M, -(-D // 256))](y_ND, pairs.offsets_M1, out_MD, out_MD.stride(0), D, BLOCK_D=256)
