"""Plan, pack and combine against slow definitions of the same.

Legend: T tokens, K top-k, E logical experts, R ranks, D hidden size; M rows and N pairs of one message.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts import plan
from experts.plan import BFLOAT16, FLOAT32
from experts.wire import HEADER_BYTES, MAGIC, header_of, request_capacity, request_layout

POISON = 0xA5
CANARY_BYTES = 64


@dataclass
class Planned:
    """What `plan_and_pack` wrote."""

    unserved: int
    rank_TK: np.ndarray
    row_TK: np.ndarray
    rows_R: np.ndarray
    pairs_R: np.ndarray
    nbytes_R: np.ndarray
    buffers: list[np.ndarray]
    load_R: np.ndarray


def run_plan(
    x_TB: np.ndarray,
    ids_TK: np.ndarray,
    weights_TK: np.ndarray,
    slots_ER: np.ndarray,
    *,
    num_nodes: int = 1,
    load_R: np.ndarray | None = None,
    head: tuple[int, int, int, int, int] = (7, 2, 99, 1, 0),
    with_rows: bool = True,
) -> Planned:
    """`x_TB` is uint8 [T, bytes of a row]. Buffers are poisoned and end in a canary that must survive."""
    (num_tokens, top_k), num_ranks = ids_TK.shape, slots_ER.shape[1]
    row_bytes = x_TB.shape[1]
    capacity = request_capacity(num_tokens, top_k, row_bytes)
    buffers = [np.full(capacity + CANARY_BYTES, POISON, np.uint8) for _ in range(num_ranks)]
    planned = Planned(
        unserved=-1,
        rank_TK=np.full(ids_TK.shape, -77, np.int32),
        row_TK=np.full(ids_TK.shape, -77, np.int32),
        rows_R=np.full(num_ranks, -77, np.int32),
        pairs_R=np.full(num_ranks, -77, np.int32),
        nbytes_R=np.full(num_ranks, -77, np.int64),
        buffers=buffers,
        load_R=np.zeros(num_ranks, np.int64) if load_R is None else load_R,
    )
    planned.unserved = plan.plan_and_pack(
        x_TB.ctypes.data,
        row_bytes,
        ids_TK,
        weights_TK,
        slots_ER,
        (np.arange(num_ranks) * num_nodes // num_ranks).astype(np.int32),
        num_nodes,
        planned.load_R,
        np.array([buffer.ctypes.data for buffer in buffers], np.int64),
        np.array(head, np.int64),
        with_rows,
        planned.rank_TK,
        planned.row_TK,
        planned.rows_R,
        planned.pairs_R,
        planned.nbytes_R,
    )
    for buffer, nbytes in zip(buffers, planned.nbytes_R, strict=True):
        assert (buffer[max(int(nbytes), 0) :] == POISON).all(), "written past the end of the message"
    return planned


def sections(buffer: np.ndarray, row_bytes: int) -> tuple[list[int], list[int], np.ndarray, np.ndarray]:
    """(row offsets, experts, weights, rows as uint8 [M, bytes]) of a message, read as wire.py describes it."""
    num_rows, num_pairs = header_of(buffer)[4:6].tolist()
    offsets_at, experts_at, weights_at, rows_at, nbytes = request_layout(num_rows, num_pairs, row_bytes)
    return (
        buffer[offsets_at : offsets_at + 4 * (num_rows + 1)].view(np.int32).tolist(),
        buffer[experts_at : experts_at + 4 * num_pairs].view(np.int32).tolist(),
        buffer[weights_at : weights_at + 4 * num_pairs].view(np.float32),
        buffer[rows_at:nbytes].reshape(num_rows, row_bytes),
    )


def check_plan(
    planned: Planned, x_TB: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray, slots_ER: np.ndarray
) -> None:
    """Everything that a plan promises, by brute force."""
    (num_tokens, top_k), (num_experts, num_ranks) = ids_TK.shape, slots_ER.shape
    unserved = 0
    for token in range(num_tokens):
        for k in range(top_k):
            expert, rank = int(ids_TK[token, k]), int(planned.rank_TK[token, k])
            known = 0 <= expert < num_experts
            if known and (slots_ER[expert] >= 0).any():
                assert slots_ER[expert, rank] >= 0, "sent to a rank that does not hold the expert"
                assert rank >= 0
            else:
                assert rank == -1
                unserved += expert >= 0
        for k in range(top_k):
            same = [j for j in range(top_k) if ids_TK[token, j] == ids_TK[token, k]]
            assert len({int(planned.rank_TK[token, j]) for j in same}) == 1, "a repeated expert on two ranks"
    assert planned.unserved == unserved
    for rank in range(num_ranks):
        tokens = [token for token in range(num_tokens) if (planned.rank_TK[token] == rank).any()]
        pairs = [[k for k in range(top_k) if planned.rank_TK[token, k] == rank] for token in tokens]
        assert planned.rows_R[rank] == len(tokens)
        assert planned.pairs_R[rank] == sum(map(len, pairs))
        for row, (token, of_token) in enumerate(zip(tokens, pairs, strict=True)):
            assert planned.row_TK[token, of_token[0]] == row
            assert all(planned.row_TK[token, k] == -1 for k in of_token[1:])
        if not tokens:
            assert planned.nbytes_R[rank] == 0
            continue
        assert planned.nbytes_R[rank] == request_layout(len(tokens), sum(map(len, pairs)), x_TB.shape[1])[-1]
        offsets, experts, weights, rows = sections(planned.buffers[rank], x_TB.shape[1])
        assert offsets == np.cumsum([0, *map(len, pairs)]).tolist()
        assert experts == [int(ids_TK[t, k]) for t, ks in zip(tokens, pairs, strict=True) for k in ks]
        expected = [weights_TK[t, k] for t, ks in zip(tokens, pairs, strict=True) for k in ks]
        np.testing.assert_array_equal(weights.view(np.uint32), np.array(expected, np.float32).view(np.uint32))
        np.testing.assert_array_equal(rows, x_TB[tokens])
    assert (planned.row_TK[planned.rank_TK < 0] == -1).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """(x, ids, weights, slots, nodes): repeated experts, -1 ids, ids that are no expert, experts without a rank."""
    num_tokens, top_k = draw(st.integers(0, 7)), draw(st.integers(1, 5))
    num_experts, num_ranks = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    holds = random.random((num_experts, num_ranks)) < draw(st.sampled_from([0.2, 0.5, 1.0]))
    slots_ER = np.where(holds, random.integers(0, 9, holds.shape), -1).astype(np.int32)
    if draw(st.booleans()):
        slots_ER[:, random.integers(num_ranks)] = -1  # a lost rank
    ids_TK = random.integers(draw(st.sampled_from([-1, 0])), num_experts, (num_tokens, top_k)).astype(np.int32)
    if draw(st.booleans()):
        ids_TK[random.random(ids_TK.shape) < 0.1] = draw(st.sampled_from([num_experts, 2**31 - 1, -(2**31)]))
    x_TB = random.integers(0, 256, (num_tokens, draw(st.integers(1, 70))), np.uint8)
    weights_TK = random.standard_normal((num_tokens, top_k)).astype(np.float32)
    num_nodes = draw(st.sampled_from([n for n in range(1, num_ranks + 1) if num_ranks % n == 0]))
    return x_TB, ids_TK, weights_TK, slots_ER, num_nodes


@settings(max_examples=300, deadline=None)
@given(problems())
def test_every_wanted_pair_lands_once_where_its_expert_is(problem: tuple) -> None:
    x_TB, ids_TK, weights_TK, slots_ER, num_nodes = problem
    planned = run_plan(x_TB, ids_TK, weights_TK, slots_ER, num_nodes=num_nodes)
    check_plan(planned, x_TB, ids_TK, weights_TK, slots_ER)


def simple(num_tokens: int, top_k: int, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    ids_TK = random.random((num_tokens, num_experts)).argsort(1)[:, :top_k].astype(np.int32)
    weights_TK = random.random((num_tokens, top_k), np.float32)
    return random.integers(0, 256, (num_tokens, 32), np.uint8), ids_TK, weights_TK


def test_header_says_what_is_in_the_message() -> None:
    x_TB, _, weights_TK = simple(2, 2, 2)
    ids_TK, slots_ER = np.array([[0, 1], [0, -1]], np.int32), np.array([[3], [4]], np.int32)
    planned = run_plan(x_TB, ids_TK, weights_TK, slots_ER, head=(11, 3, 2**40, 2, 16))
    # magic, seq, epoch, layer, rows, pairs, dtype, hidden, status, and zeros
    assert header_of(planned.buffers[0]).tolist() == [MAGIC, 2**40, 11, 3, 2, 3, 2, 16, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_zero_and_one_token(num_tokens: int) -> None:
    x_TB, ids_TK, weights_TK = simple(num_tokens, 3, 6)
    slots_ER = np.where(np.arange(6)[:, None] % 2 == np.arange(2), 0, -1).astype(np.int32)
    planned = run_plan(x_TB, ids_TK, weights_TK, slots_ER)
    check_plan(planned, x_TB, ids_TK, weights_TK, slots_ER)
    assert planned.pairs_R.sum() == 3 * num_tokens


def test_all_tokens_on_one_shard_leave_the_others_alone() -> None:
    x_TB, ids_TK, weights_TK = simple(50, 2, 4)
    slots_ER = np.full((4, 3), -1, np.int32)
    slots_ER[:, 1] = range(4)
    planned = run_plan(x_TB, ids_TK, weights_TK, slots_ER)
    check_plan(planned, x_TB, ids_TK, weights_TK, slots_ER)
    assert planned.rows_R.tolist() == [0, 50, 0]
    assert all((planned.buffers[rank] == POISON).all() for rank in (0, 2))


def test_an_expert_on_every_shard_spreads_the_tokens_evenly() -> None:
    x_TB, _, weights_TK = simple(90, 1, 1)
    planned = run_plan(x_TB, np.zeros((90, 1), np.int32), weights_TK, np.zeros((1, 3), np.int32))
    assert planned.rows_R.tolist() == [30, 30, 30]


def test_a_token_visits_one_shard_where_one_holds_all_it_wants() -> None:
    x_TB, _, weights_TK = simple(1, 4, 4)
    slots_ER = np.array([[0, 0, -1], [1, -1, 0], [-1, 1, 1], [2, 2, 2]], np.int32)
    slots_ER[:, 2] = range(4)
    planned = run_plan(x_TB, np.array([[3, 1, 0, 2]], np.int32), weights_TK, slots_ER)
    assert planned.rows_R.tolist() == [0, 0, 1]


def test_no_rank_alive_leaves_everything_unserved() -> None:
    x_TB, ids_TK, weights_TK = simple(5, 2, 4)
    planned = run_plan(x_TB, ids_TK, weights_TK, np.full((4, 3), -1, np.int32))
    assert planned.unserved == 10
    assert not planned.nbytes_R.any()


def test_load_is_aged_and_breaks_ties_over_calls() -> None:
    x_TB, _, weights_TK = simple(1, 1, 1)
    load_R = np.array([100, 0], np.int64)
    slots_ER = np.zeros((1, 2), np.int32)
    first = run_plan(x_TB, np.zeros((1, 1), np.int32), weights_TK, slots_ER, load_R=load_R)
    assert first.rank_TK.tolist() == [[1]]
    assert load_R.tolist() == [50, 1]


def test_rows_that_travel_apart_are_left_out_of_the_message() -> None:
    x_TB, ids_TK, weights_TK = simple(4, 2, 4)
    slots_ER = np.zeros((4, 1), np.int32)
    planned = run_plan(x_TB, ids_TK, weights_TK, slots_ER, with_rows=False)
    offsets, experts, _, rows = sections(planned.buffers[0], 32)
    assert offsets == [0, 2, 4, 6, 8]
    assert experts == ids_TK.flatten().tolist()
    assert (rows == POISON).all()


# --- combine ------------------------------------------------------------------------------------------------------

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
