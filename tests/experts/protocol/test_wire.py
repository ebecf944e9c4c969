"""The bytes of a message, against layouts worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.protocol.wire import (
    ALIGN,
    DTYPE_CODES,
    H_MAGIC,
    H_SEQ,
    H_STATUS,
    H_TEXT,
    HEADER_BYTES,
    MAGIC,
    STATUS_REJECTED,
    aligned,
    error_reply,
    error_text,
    header_of,
    reply_capacity,
    request_capacity,
    request_layout,
)


def test_hand_worked_layouts() -> None:
    # 128 header | 4 * 3 offsets -> 64 | 4 * 5 experts -> 64 | 4 * 5 weights -> 64 | 2 rows of 96
    assert request_layout(2, 5, 96) == (128, 192, 256, 320, 320 + 192)
    # the 16 offsets of 15 rows fill a line, the 17th starts another
    assert request_layout(15, 16, 4) == (128, 192, 256, 320, 380)
    assert request_layout(16, 17, 4) == (128, 256, 384, 512, 576)
    # no rows: a header and the one offset that is always there
    assert request_layout(0, 0, 96) == (128, 192, 192, 192, 192)


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 64), (63, 64), (64, 64), (65, 128)])
def test_sections_start_on_lines(nbytes: int, expected: int) -> None:
    assert aligned(nbytes) == expected


@given(st.integers(0, 300), st.integers(1, 16), st.integers(1, 500), st.data())
def test_any_message_up_to_the_maximum_fits(max_rows: int, top_k: int, row_bytes: int, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(0, max_rows))
    num_pairs = data.draw(st.integers(0, num_rows * top_k))
    offsets_at, experts_at, weights_at, rows_at, nbytes = request_layout(num_rows, num_pairs, row_bytes)
    assert nbytes <= request_capacity(max_rows, top_k, row_bytes)
    assert HEADER_BYTES + num_rows * row_bytes <= reply_capacity(max_rows, row_bytes)
    assert all(at % ALIGN == 0 for at in (offsets_at, experts_at, weights_at, rows_at))
    assert offsets_at == HEADER_BYTES
    assert experts_at - offsets_at >= 4 * (num_rows + 1)
    assert weights_at - experts_at >= 4 * num_pairs
    assert rows_at - weights_at >= 4 * num_pairs
    assert nbytes - rows_at == num_rows * row_bytes


def test_every_dtype_has_a_code_of_its_own() -> None:
    assert len(set(DTYPE_CODES.values())) == len(DTYPE_CODES) == 3


def test_an_error_comes_back_as_it_was_said() -> None:
    buffer = np.full(reply_capacity(0, 4), 0xAB, np.uint8)
    text = "expert 7 of layer 3 has no slot on this shard; größer als erwartet"
    nbytes = error_reply(buffer, 41, text)
    header = header_of(buffer)
    assert nbytes == HEADER_BYTES + len(text.encode())
    assert (header[H_MAGIC], header[H_SEQ], header[H_STATUS]) == (MAGIC, 41, STATUS_REJECTED)
    assert error_text(buffer) == text
    assert (buffer[nbytes:] == 0xAB).all()


def test_a_long_error_is_cut_to_the_buffer_even_within_a_character() -> None:
    buffer = np.zeros(HEADER_BYTES + 5, np.uint8)
    assert error_reply(buffer, 1, "abcdö" * 100) == len(buffer)
    assert error_text(buffer) == "abcd\ufffd"


def test_a_length_that_lies_does_not_read_past_the_buffer() -> None:
    buffer = np.zeros(HEADER_BYTES + 3, np.uint8)
    error_reply(buffer, 1, "abc")
    header_of(buffer)[H_TEXT] = 1 << 40
    assert error_text(buffer) == "abc"
