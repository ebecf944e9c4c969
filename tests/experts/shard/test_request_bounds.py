"""A shard's checks at their edges: the last value that is believed and the first that is not."""

from __future__ import annotations

import numpy as np
import pytest

from experts.protocol.wire import (
    H_DTYPE,
    H_EPOCH,
    H_HIDDEN,
    H_LAYER,
    H_MAGIC,
    H_PAIRS,
    H_ROWS,
    H_SEQ,
    HEADER_BYTES,
    MAGIC,
    header_of,
    request_layout,
)
from experts.shard.request import BadRequestError, Request, read_request, warm_up

# Layer 0 holds experts 1 and 3 in the slots 1 and 0, layer 1 none, layer 2 expert 0 in slot 0.
SLOTS_LE = np.array([[-1, 1, -1, 0], [-1] * 4, [0, -1, -1, -1]], np.int32)


def message(
    offsets: list[int], experts: list[int], layer: int = 0, dtype_code: int = 1, hidden: int = 3
) -> tuple[np.ndarray, int]:
    """(buffer of just that length, length)."""
    row_bytes = hidden * (4 if dtype_code == 1 else 2)
    at = request_layout(len(offsets) - 1, len(experts), row_bytes)
    buffer = np.zeros(at[4], np.uint8)
    header = header_of(buffer)
    header[H_MAGIC], header[H_SEQ], header[H_EPOCH], header[H_LAYER] = MAGIC, 2**40, 2**41, layer
    header[H_ROWS], header[H_PAIRS] = len(offsets) - 1, len(experts)
    header[H_DTYPE], header[H_HIDDEN] = dtype_code, hidden
    buffer[at[0] : at[0] + 4 * len(offsets)].view(np.int32)[:] = offsets
    buffer[at[1] : at[1] + 4 * len(experts)].view(np.int32)[:] = experts
    buffer[at[2] : at[2] + 4 * len(experts)].view(np.float32)[:] = 0.5 + np.arange(len(experts))
    return buffer, at[4]


@pytest.mark.parametrize("dtype_code", [1, 2, 3])
def test_rows_of_every_dtype_have_their_size(dtype_code: int) -> None:
    buffer, nbytes = message([0, 1, 2], [3, 1], dtype_code=dtype_code)
    request = read_request(buffer, nbytes, SLOTS_LE, dtype_code, 3)
    assert request == Request(
        seq=2**40,
        epoch=2**41,
        layer=0,
        row_offsets_M1=request.row_offsets_M1,
        slots_N=request.slots_N,
        weights_N=request.weights_N,
        rows_at=nbytes - 2 * 3 * (4 if dtype_code == 1 else 2),
        num_rows=2,
    )
    assert request.row_offsets_M1.tolist() == [0, 1, 2]
    assert request.slots_N.tolist() == [0, 1]
    assert request.weights_N.tolist() == [0.5, 1.5]
    assert (request.row_offsets_M1.dtype, request.slots_N.dtype, request.weights_N.dtype) == (
        np.int32,
        np.int32,
        np.float32,
    )
    with pytest.raises(BadRequestError, match="this shard serves"):
        read_request(buffer, nbytes, SLOTS_LE, dtype_code % 3 + 1, 3)


def test_the_first_and_the_last_layer_are_served_by_their_own_tables() -> None:
    buffer, nbytes = message([0, 1], [0], layer=2)
    assert read_request(buffer, nbytes, SLOTS_LE, 1, 3).slots_N.tolist() == [0]
    for layer in (0, 1):
        header_of(buffer)[H_LAYER] = layer
        with pytest.raises(BadRequestError, match=f"expert 0 of layer {layer} has no slot"):
            read_request(buffer, nbytes, SLOTS_LE, 1, 3)
    header_of(buffer)[H_LAYER] = 3
    with pytest.raises(BadRequestError, match="layer 3, this model has MoE layers 0 to 2"):
        read_request(buffer, nbytes, SLOTS_LE, 1, 3)


@pytest.mark.parametrize(("expert", "served"), [(-1, False), (0, False), (1, True), (2, False), (3, True), (4, False)])
def test_an_expert_is_served_where_it_has_a_slot(expert: int, served: bool) -> None:
    buffer, nbytes = message([0, 2], [3, expert])
    if served:
        assert read_request(buffer, nbytes, SLOTS_LE, 1, 3).slots_N.tolist() == [0, SLOTS_LE[0, expert]]
    else:
        why = "has no slot" if 0 <= expert < 4 else "this model has experts 0 to 3"
        with pytest.raises(BadRequestError, match=f"expert {expert} of layer 0,? {why}"):
            read_request(buffer, nbytes, SLOTS_LE, 1, 3)


def test_the_first_pair_that_is_not_served_is_the_one_that_is_named() -> None:
    with pytest.raises(BadRequestError, match="expert 0 of layer 0"):
        read_request(*message([0, 3], [0, 2, 1]), SLOTS_LE, 1, 3)


def test_rows_without_pairs_stand_anywhere() -> None:
    request = read_request(*message([0, 0, 2, 2], [1, 3]), SLOTS_LE, 1, 3)
    assert request.row_offsets_M1.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    "offsets", [[0, 2, 1, 2], [1, 1, 2, 2], [0, 1, 1, 1], [0, 1, 3, 2], [0, -1, 1, 2], [2, 2, 2, 2]]
)
def test_offsets_that_do_not_count_up_to_the_pairs_are_refused(offsets: list[int]) -> None:
    with pytest.raises(BadRequestError, match="row offsets do not count up from 0 to 2"):
        read_request(*message(offsets, [1, 3]), SLOTS_LE, 1, 3)


def test_a_message_is_as_long_as_its_buffer_or_shorter() -> None:
    buffer, nbytes = message([0, 1], [1])
    larger = np.concatenate([buffer, np.zeros(1, np.uint8)])
    assert read_request(larger, nbytes, SLOTS_LE, 1, 3).num_rows == 1
    for wrong in (nbytes - 1, nbytes + 1):
        with pytest.raises(BadRequestError, match=f"need {nbytes} bytes, the message has {wrong}"):
            read_request(larger, wrong, SLOTS_LE, 1, 3)
    with pytest.raises(BadRequestError, match=f"a message of {nbytes + 2} bytes, expected 128 to {nbytes + 1}"):
        read_request(larger, nbytes + 2, SLOTS_LE, 1, 3)
    with pytest.raises(BadRequestError, match="a message of 127 bytes, expected 128 to"):
        read_request(larger, HEADER_BYTES - 1, SLOTS_LE, 1, 3)
    with pytest.raises(BadRequestError, match=r"magic number 0x0, expected 0x45584d31"):
        read_request(np.zeros(HEADER_BYTES, np.uint8), HEADER_BYTES, SLOTS_LE, 1, 3)


@pytest.mark.parametrize("word", [H_ROWS, H_PAIRS])
def test_counts_beyond_the_message_are_refused_before_any_sum_is_made(word: int) -> None:
    buffer, nbytes = message([0, 1], [1])
    for value, text in ((-1, "in a message of"), (nbytes, "need"), (nbytes + 1, "in a message of")):
        header_of(buffer)[word] = value
        with pytest.raises(BadRequestError, match=text):
            read_request(buffer, nbytes, SLOTS_LE, 1, 3)


def test_warming_up_reads_a_request_that_is_in_order() -> None:
    warm_up.cache_clear()
    warm_up()
    assert warm_up.cache_info().currsize == 1
