"""What `plan_and_pack` writes, against slow definitions of the same.

Legend: T tokens, K top-k, E logical experts, R ranks; M rows and N pairs of one message.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.dispatch.rows.host_programs import request_header
from experts.protocol.wire import H_LAYER, H_SEQ, MAGIC, header_of, request_layout
from tests.support.planned_dispatch import POISON, Planned, run_plan


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


@settings(max_examples=300)
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
    header = request_header(11, torch.bfloat16, 16)
    header[H_LAYER], header[H_SEQ] = 3, 2**40
    planned = run_plan(x_TB, ids_TK, weights_TK, slots_ER, header=header)
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
