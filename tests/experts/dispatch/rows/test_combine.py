"""The sum of partial rows against a float64 sum, and its rounding against torch's.

Legend: T tokens, K top-k, E logical experts, R ranks, D hidden size; M rows of one message.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from experts.dispatch.rows import host_programs as plan
from experts.dispatch.rows.host_programs import BFLOAT16, FLOAT32
from experts.protocol.wire import HEADER_BYTES
from tests.support.planned_dispatch import POISON, Planned, run_plan

D = 17  # no multiple of a vector's width
CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


@dataclass
class Replies:
    """Random answers to a plan."""

    planned: Planned
    rows: dict[int, torch.Tensor]  # rank: [M, D]
    buffers: dict[int, np.ndarray]

    def combine(self, y_TD: torch.Tensor, answered_R: np.ndarray, *, accumulate: bool = False) -> torch.Tensor:
        address_R = np.zeros(len(answered_R), np.int64)
        for rank, buffer in self.buffers.items():
            address_R[rank] = buffer.ctypes.data
        scratch_D = np.full(D, np.nan, np.float32)
        replies = (self.planned.rank_TK, self.planned.row_TK, answered_R, address_R, CODES[y_TD.dtype])
        plan.combine(*replies, scratch_D, y_TD.data_ptr(), accumulate)
        return y_TD

    def parts(self, answered_R: np.ndarray) -> list[list[torch.Tensor]]:
        """Of each token, the rows that are added up, in the order of its experts."""
        found: list[list[torch.Tensor]] = []
        for rank_K, row_K in zip(self.planned.rank_TK.tolist(), self.planned.row_TK.tolist(), strict=True):
            pairs = zip(rank_K, row_K, strict=True)
            found.append([self.rows[rank][row] for rank, row in pairs if row >= 0 and answered_R[rank]])
        return found


def replies_for(dtype: torch.dtype, num_tokens: int = 9, num_ranks: int = 4, top_k: int = 4, seed: int = 0) -> Replies:
    random = np.random.default_rng(seed)
    ids_TK = random.random((num_tokens, 8)).argsort(1)[:, :top_k].astype(np.int32)
    ids_TK[random.random(ids_TK.shape) < 0.2] = -1
    slots_ER = np.where(np.arange(8)[:, None] % num_ranks == np.arange(num_ranks), 0, -1).astype(np.int32)
    x_TB = np.zeros((num_tokens, D * dtype.itemsize), np.uint8)
    planned = run_plan(x_TB, ids_TK, np.ones(ids_TK.shape, np.float32), slots_ER)
    generator = torch.Generator().manual_seed(seed)
    rows, buffers = {}, {}
    for rank, num_rows in enumerate(planned.rows_R.tolist()):
        rows[rank] = (torch.randn(num_rows, D, generator=generator) * 10).to(dtype)
        buffers[rank] = np.full(HEADER_BYTES + num_rows * D * dtype.itemsize, POISON, np.uint8)
    replies = Replies(planned, rows, buffers)
    fill(replies)
    return replies


def fill(replies: Replies) -> None:
    for rank, rows_MD in replies.rows.items():
        replies.buffers[rank][HEADER_BYTES:] = rows_MD.view(torch.uint8).flatten().numpy()


def poisoned(dtype: torch.dtype, num_tokens: int = 9) -> torch.Tensor:
    return torch.full((num_tokens, D), torch.nan, dtype=dtype)


@pytest.mark.parametrize("seed", range(5))
def test_float32_is_the_float64_sum(seed: int) -> None:
    replies, answered_R = replies_for(torch.float32, seed=seed), np.ones(4, np.bool_)
    y_TD = replies.combine(poisoned(torch.float32), answered_R)
    for y_D, parts in zip(y_TD, replies.parts(answered_R), strict=True):
        expected_D = sum((part.double() for part in parts), torch.zeros(D, dtype=torch.float64))
        # At most 3 roundings of partial sums below 4 * 50.
        torch.testing.assert_close(y_D.double(), expected_D, rtol=0, atol=3 * 200 * 2**-24)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("accumulate", [False, True])
def test_bfloat16_is_added_in_float32_and_rounded_once(seed: int, accumulate: bool) -> None:
    replies, answered_R = replies_for(torch.bfloat16, seed=seed), np.ones(4, np.bool_)
    y_TD = torch.randn(9, D, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    before_TD = y_TD.clone()
    replies.combine(y_TD, answered_R, accumulate=accumulate)
    for y_D, before_D, parts in zip(y_TD, before_TD, replies.parts(answered_R), strict=True):
        sum_D = before_D.float() if accumulate else torch.zeros(D)
        for part in parts:
            sum_D = sum_D + part.float()
        assert torch.equal(y_D, sum_D.to(torch.bfloat16))  # torch rounds to nearest even, too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_a_part_are_zero_and_poison_is_overwritten(dtype: torch.dtype) -> None:
    replies = replies_for(dtype)
    y_TD = replies.combine(poisoned(dtype), np.zeros(4, np.bool_))
    assert torch.equal(y_TD, torch.zeros(9, D, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_halves_accumulate_to_the_whole(dtype: torch.dtype) -> None:
    replies, first_R = replies_for(dtype), np.array([True, False, True, False])
    whole_TD = replies.combine(poisoned(dtype), np.ones(4, np.bool_))
    y_TD = replies.combine(poisoned(dtype), first_R)
    replies.combine(y_TD, ~first_R, accumulate=True)
    # The halves are rounded once more in between.
    torch.testing.assert_close(y_TD, whole_TD, rtol=0, atol=200 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulating_nothing_changes_nothing(dtype: torch.dtype) -> None:
    before_TD = torch.randn(9, D).to(dtype)
    y_TD = replies_for(dtype).combine(before_TD.clone(), np.zeros(4, np.bool_), accumulate=True)
    assert torch.equal(y_TD, before_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_come_through(dtype: torch.dtype, special: float) -> None:
    replies, answered_R = replies_for(dtype), np.ones(4, np.bool_)
    replies.rows[1][0, 3] = special
    fill(replies)
    y_TD = replies.combine(torch.zeros(9, D, dtype=dtype), answered_R)
    for y_D, parts in zip(y_TD, replies.parts(answered_R), strict=True):
        hit = any(not torch.isfinite(part).all() for part in parts)
        expected_D = torch.zeros(D)
        expected_D[3] = special if hit else 0
        assert torch.equal(y_D.isnan(), expected_D.isnan())
        assert torch.equal(y_D.isinf(), expected_D.isinf())


def test_bfloat16_overflow_and_signaling_nan() -> None:
    replies, answered_R = replies_for(torch.bfloat16), np.ones(4, np.bool_)
    largest = torch.finfo(torch.bfloat16).max
    for rows_MD in replies.rows.values():
        rows_MD[:, 0] = largest
        rows_MD.view(torch.int16)[:, 1] = 0x7F81  # signaling, all of its payload in the last bit
    fill(replies)
    y_TD = replies.combine(poisoned(torch.bfloat16), answered_R)
    for y_D, parts in zip(y_TD, replies.parts(answered_R), strict=True):
        assert y_D[0].item() == (0 if not parts else largest if len(parts) == 1 else torch.inf)
        assert bool(y_D[1].isnan()) == bool(parts)


def test_no_tokens_is_no_work() -> None:
    replies = replies_for(torch.float32, num_tokens=0)
    replies.combine(torch.zeros(0, D), np.ones(4, np.bool_))
