"""Numbers that both ends must agree on, and sizes of whole messages, worked out by hand."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from experts.protocol import wire


def test_the_words_of_the_header_stand_where_other_builds_expect_them() -> None:
    words = (
        "MAGIC",
        "SEQ",
        "EPOCH",
        "LAYER",
        "ROWS",
        "PAIRS",
        "DTYPE",
        "HIDDEN",
        "STATUS",
        "TEXT",
        "NO_SLOT_LAYER",
        "NO_SLOT_EXPERT",
        "COMPUTE_NS",
    )
    assert [getattr(wire, f"H_{word}") for word in words] == list(range(13))
    assert (wire.HEADER_WORDS, wire.HEADER_BYTES, wire.ALIGN) == (16, 128, 64)
    assert struct.pack("<q", wire.MAGIC) == b"1MXE\0\0\0\0"
    assert (wire.STATUS_OK, wire.STATUS_REJECTED, wire.STATUS_NO_SLOT) == (0, 1, 2)
    assert {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3} == wire.DTYPE_CODES


@pytest.mark.parametrize(
    ("max_rows", "top_k", "row_bytes", "expected"),
    [
        (2, 3, 96, 512),  # 128 header | 64 offsets | 64 experts | 64 weights | 192 rows
        (1, 1, 4, 384),  # 324, rounded up
        (16, 4, 64, 128 + 128 + 256 + 256 + 1024),
        (0, 8, 96, 192),
    ],
)
def test_the_largest_request(max_rows: int, top_k: int, row_bytes: int, expected: int) -> None:
    assert wire.request_capacity(max_rows, top_k, row_bytes) == expected


@pytest.mark.parametrize(
    ("max_rows", "row_bytes", "expected"),
    [(0, 4, 4096), (31, 128, 4096), (32, 128, 4224), (41, 100, 4288), (100, 96, 9728)],
)
def test_the_largest_reply(max_rows: int, row_bytes: int, expected: int) -> None:
    assert wire.reply_capacity(max_rows, row_bytes) == expected


@pytest.mark.parametrize(
    ("num_rows", "num_pairs", "row_bytes", "expected"),
    [(2, 5, 96, 512 + 128 + 192), (15, 16, 4, 380 + 128 + 60), (0, 0, 96, 192 + 128)],
)
def test_bytes_of_a_request_and_its_reply(num_rows: int, num_pairs: int, row_bytes: int, expected: int) -> None:
    assert wire.exchange_bytes(num_rows, num_pairs, row_bytes) == expected


def test_an_error_reply_byte_by_byte() -> None:
    buffer = np.full(256, 0xAB, np.uint8)
    assert wire.error_reply(buffer, 41, "no slot") == 135
    header = struct.pack("<16q", wire.MAGIC, 41, 0, 0, 0, 0, 0, 0, 1, 7, *[0] * 6)
    assert bytes(buffer) == header + b"no slot" + b"\xab" * (256 - 135)
    assert wire.error_text(buffer) == "no slot"


def test_a_no_slot_reply_byte_by_byte() -> None:
    buffer = np.full(256, 0xAB, np.uint8)
    assert wire.no_slot_reply(buffer, 41, "no slot", 3, 5) == 135
    header = struct.pack("<16q", wire.MAGIC, 41, 0, 0, 0, 0, 0, 0, 2, 7, 3, 5, *[0] * 4)
    assert bytes(buffer) == header + b"no slot" + b"\xab" * (256 - 135)
    assert wire.error_text(buffer) == "no slot"


def test_a_header_is_a_view_of_the_first_sixteen_words() -> None:
    buffer = np.zeros(256, np.uint8)
    header = wire.header_of(buffer)
    assert (header.dtype, header.shape) == (np.int64, (16,))
    header[15] = -1
    assert bytes(buffer[120:136]) == b"\xff" * 8 + b"\0" * 8
