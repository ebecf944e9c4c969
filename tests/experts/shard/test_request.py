"""What a shard makes of a request: a good one is read as packed, any other is refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

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
    HEADER_WORDS,
    MAGIC,
    header_of,
    request_layout,
)
from experts.shard.request import BadRequestError, NoSlotError, read_request

HIDDEN, FLOAT32 = 4, 1
# Layer 0 holds experts 0 to 3 in slots 3 to 0, layer 1 only expert 2.
SLOTS_LE = np.array([[3, 2, 1, 0, -1], [-1, -1, 0, -1, -1]], np.int32)


def message(
    offsets: list[int], experts: list[int], layer: int = 0, row_bytes: int = 4 * HIDDEN, capacity: int = 4096
) -> tuple[np.ndarray, int]:
    """(buffer, length) of a valid request, for tests to spoil."""
    num_rows = len(offsets) - 1
    offsets_at, experts_at, weights_at, rows_at, nbytes = request_layout(num_rows, len(experts), row_bytes)
    buffer = np.full(capacity, 0xEE, np.uint8)
    header = header_of(buffer)
    header[:] = 0
    header[H_MAGIC], header[H_SEQ], header[H_EPOCH], header[H_LAYER] = MAGIC, 5, 6, layer
    header[H_ROWS], header[H_PAIRS], header[H_DTYPE], header[H_HIDDEN] = num_rows, len(experts), FLOAT32, HIDDEN
    buffer[offsets_at : offsets_at + 4 * len(offsets)].view(np.int32)[:] = offsets
    buffer[experts_at : experts_at + 4 * len(experts)].view(np.int32)[:] = experts
    buffer[weights_at : weights_at + 4 * len(experts)].view(np.float32)[:] = np.arange(len(experts))
    buffer[rows_at:nbytes] = 0
    return buffer, nbytes


def read(buffer: np.ndarray, nbytes: int) -> object:
    return read_request(buffer, nbytes, SLOTS_LE, FLOAT32, HIDDEN)


def test_a_good_request() -> None:
    request = read_request(*message([0, 2, 2, 3], [0, 3, 1]), SLOTS_LE, FLOAT32, HIDDEN)
    assert (request.seq, request.epoch, request.layer, request.num_rows) == (5, 6, 0, 3)
    assert request.row_offsets_M1.tolist() == [0, 2, 2, 3]
    assert request.slots_N.tolist() == [3, 0, 2]
    assert request.weights_N.tolist() == [0, 1, 2]
    assert request.rows_at == request_layout(3, 3, 16)[3]


def test_no_rows_and_no_pairs() -> None:
    request = read_request(*message([0], []), SLOTS_LE, FLOAT32, HIDDEN)
    assert (request.num_rows, len(request.slots_N)) == (0, 0)


@pytest.mark.parametrize(
    ("word", "value", "text"),
    [
        (H_MAGIC, 0xBAD, r"magic number 0xbad, expected 0x45584d31"),
        (H_MAGIC, -1, r"magic number -0x1, expected"),
        (H_LAYER, 2, r"layer 2, this model has MoE layers 0 to 1"),
        (H_LAYER, -1, r"layer -1, this"),
        (H_DTYPE, 2, r"dtype code 2 and hidden size 4, this shard serves 1 and 4"),
        (H_HIDDEN, 8, r"dtype code 1 and hidden size 8, this shard serves 1 and 4"),
        (H_ROWS, -1, r"-1 rows and 3 pairs"),
        (H_ROWS, 2**62, rf"{2**62} rows"),
        (H_ROWS, 4, r"4 rows and 3 pairs need \d+ bytes, the message has"),
        (H_PAIRS, -5, r"-5 pairs"),
        (H_PAIRS, 2**62, rf"{2**62} pairs"),
        (H_PAIRS, 900, r"3 rows and 900 pairs in a message of 368 bytes"),
        (H_PAIRS, 90, r"3 rows and 90 pairs need"),
        (H_PAIRS, 2, r"row offsets do not count up from 0 to 2"),
    ],
)
def test_a_wrong_header_is_named(word: int, value: int, text: str) -> None:
    buffer, nbytes = message([0, 1, 2, 3], [0, 1, 2])
    header_of(buffer)[word] = value
    with pytest.raises(BadRequestError, match=text):
        read(buffer, nbytes)


@pytest.mark.parametrize(
    ("offsets", "experts", "layer", "text"),
    [
        ([0, 1], [5], 0, r"expert 5 of layer 0, this model has experts 0 to 4"),
        ([0, 1], [-1], 0, r"expert -1 of layer 0, this model has"),
        ([0, 1], [2**31 - 1], 0, r"expert 2147483647"),
        ([0, 3], [0, 2, 7], 1, r"expert 7 of layer 1, this model has"),  # rather than that expert 0 has no slot
        ([1, 1], [0], 0, r"row offsets do not count up from 0 to 1"),
        ([0, 2, 1], [0], 0, r"row offsets do not count up from 0 to 1"),
        ([0, -4, 1], [0], 0, r"row offsets"),
        ([0, 0], [0], 0, r"row offsets"),
        ([0, 2**31 - 1, 1], [0], 0, r"row offsets"),
    ],
)
def test_wrong_pairs_are_named(offsets: list[int], experts: list[int], layer: int, text: str) -> None:
    with pytest.raises(BadRequestError, match=text):
        read(*message(offsets, experts, layer))


@pytest.mark.parametrize(
    ("experts", "layer", "named", "text"),
    [
        ([4], 0, 4, r"^expert 4 of layer 0 has no slot on this shard$"),
        ([2, 0, 2, 0], 1, 0, r"^expert 0 of layer 1 has no slot on this shard$"),
        ([4, 2, 1, 1], 1, 1, r"^expert 1 of layer 1 has no slot on this shard, nor have 1 more of the request$"),
    ],
)
def test_a_missing_slot_is_told_from_a_bad_request(experts: list[int], layer: int, named: int, text: str) -> None:
    with pytest.raises(NoSlotError, match=text) as caught:
        read(*message([0, len(experts)], experts, layer))
    assert (caught.value.layer, caught.value.expert) == (layer, named)


@pytest.mark.parametrize("nbytes", [-1, 0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 64, 4097, 2**32])
def test_a_length_that_does_not_fit_is_named(nbytes: int) -> None:
    with pytest.raises(BadRequestError, match=f"a message of {nbytes} bytes|the message has {nbytes}"):
        read(message([0, 1], [0])[0], nbytes)


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, HEADER_WORDS - 1), st.integers(-(2**63), 2**63 - 1)), max_size=3),
    st.lists(st.tuples(st.integers(HEADER_BYTES, 600), st.integers(0, 255)), max_size=6),
    st.integers(-2, 4200),
)
@example([(H_ROWS, 2**63 - 1)], [], 400)
@example([(H_PAIRS, 2**63 - 1), (H_ROWS, -(2**63))], [], 400)
def test_whatever_comes_is_in_order_or_refused(
    words: list[tuple[int, int]], data: list[tuple[int, int]], nbytes: int
) -> None:
    buffer, good = message([0, 1, 3, 6], [0, 1, 2, 3, 0, 1])
    for word, value in words:
        header_of(buffer)[word] = value
    for at, value in data:
        buffer[at] = value
    try:
        request = read_request(buffer, good if nbytes < 0 else nbytes, SLOTS_LE, FLOAT32, HIDDEN)
    except BadRequestError:
        return
    offsets = request.row_offsets_M1.tolist()
    assert offsets == sorted(offsets)
    assert (offsets[0], offsets[-1]) == (0, len(request.slots_N))
    assert len(offsets) == request.num_rows + 1
    assert len(request.weights_N) == len(request.slots_N)
    assert set(request.slots_N.tolist()) <= set(SLOTS_LE[request.layer].tolist()) - {-1}
    assert request.rows_at + request.num_rows * 4 * HIDDEN <= len(buffer)
