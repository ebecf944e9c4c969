"""float16 through C++: the sums of a dispatch, and the conversions that they stand on, bit by bit.

Legend: T tokens, K top-k, D hidden size, M rows.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import loopback_dispatcher
from experts.dispatch.rows.native_mover import NativeFloat16Mover
from experts.native.build import compile_source, find_compiler
from experts.native.library import SOURCE, data_plane
from experts.protocol.wire import HEADER_BYTES

pytestmark = pytest.mark.skipif(data_plane() is None, reason="no C++ compiler")

CONVERSIONS = """
#include "float16.h"
extern "C" void widen_all(const uint16_t* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += FLOAT16_LANES) widen_float16(from + i, to + i);
}
extern "C" void round_all(const float* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; i += FLOAT16_LANES) round_float16(from + i, to + i);
}
"""


@pytest.mark.parametrize("hidden_size", [1, 24, 1100])
@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_sums_are_made_in_float32_in_the_order_of_experts_and_rounded_once(ranks: int, hidden_size: int) -> None:
    T, K, E = 7, 9, 18
    shape = LayerShape(1, E, K, hidden_size, torch.float16)
    dispatcher = loopback_dispatcher(shape, ranks, T)
    assert isinstance(dispatcher.mover, NativeFloat16Mover)
    generator = torch.Generator().manual_seed(hidden_size)
    replies = {}
    for rank, link in dispatcher.links.items():
        rows_MD = replies[rank] = (torch.randn(T, hidden_size, generator=generator) * 100).half()
        rows_MD[0, 0] = [torch.inf, torch.nan, 65504.0][rank % 3]
        data = rows_MD.view(torch.uint8).flatten().numpy()
        link.recv_buffer[HEADER_BYTES : HEADER_BYTES + len(data)] = data
    ids_TK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]).int()
    x_TD = torch.randn(T, hidden_size, generator=generator).half()
    pending = dispatcher.begin(0, x_TD, torch.rand(T, K), ids_TK)
    y_TD = dispatcher.finish(pending)
    for t in range(T):
        sum_D = None
        for k in range(K):
            row, rank = int(pending.plan.row_TK[t, k]), int(pending.plan.rank_TK[t, k])
            if row >= 0:
                part_D = replies[rank][row].float()
                sum_D = part_D if sum_D is None else sum_D + part_D
        assert sum_D is not None
        torch.testing.assert_close(y_TD[t], sum_D.half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("by_hand", [False, True])
def test_conversions_are_those_of_numpy(tmp_path: Path, by_hand: bool) -> None:
    """By the processor's instructions, if it has them, and without."""
    if by_hand and platform.machine() != "x86_64":
        pytest.skip("only x86 has instructions to leave out")
    source = tmp_path / "conversions.cpp"
    source.write_text(CONVERSIONS)
    flags = [f"-I{SOURCE.parent}", *(["-mno-f16c"] if by_hand else [])]
    compile_source(find_compiler(), source, tmp_path / "conversions.so", *flags)
    library = ctypes.CDLL(str(tmp_path / "conversions.so"))
    halves = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(len(halves), np.float32)
    library.widen_all(*map(ctypes.c_void_p, (halves.ctypes.data, wide.ctypes.data)), ctypes.c_int64(len(halves)))
    np.testing.assert_array_equal(wide, halves.view(np.float16).astype(np.float32))
    # Each value, what lies halfway to the next, a step to either side of that, and any bits.
    half_steps = wide.astype(np.float64) + np.diff(wide.astype(np.float64), append=np.inf) / 2
    with np.errstate(over="ignore", invalid="ignore"):
        middles = half_steps.astype(np.float32)
        beside = [np.nextafter(middles, np.float32(to)) for to in (-np.inf, np.inf)]
        any_bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint32).view(np.float32)
        values = np.concatenate([wide, middles, *beside, any_bits])
        expected = values.astype(np.float16)
    rounded = np.empty(len(values), np.uint16)
    library.round_all(*map(ctypes.c_void_p, (values.ctypes.data, rounded.ctypes.data)), ctypes.c_int64(len(values)))
    np.testing.assert_array_equal(rounded.view(np.float16), expected)
    signs = np.signbit(rounded.view(np.float16)) == np.signbit(expected)
    assert signs[~np.isnan(expected)].all()
