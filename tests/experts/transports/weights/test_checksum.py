"""The checksum against its definition in whole numbers, and what it must notice."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.transports.weights.checksum import add_to_sums, new_sums


def sums_of(*pieces: bytes) -> list[int]:
    sums = new_sums()
    for piece in pieces:
        data = np.frombuffer(piece, np.uint8)
        add_to_sums(int(data.ctypes.data), len(data), sums)
    return [int(value) for value in sums]


def by_definition(data: bytes) -> list[int]:
    padded = data + bytes(-len(data) % 8)
    words = [int.from_bytes(padded[at : at + 8], "little") for at in range(0, len(padded), 8)]
    halves = [int.from_bytes(padded[at : at + 4], "little") for at in range(0, len(padded), 4)]
    weighted = sum(half * ((2 * number + 1) % 2**32) for number, half in enumerate(halves))
    return [sum(words) % 2**64, weighted % 2**64, len(words)]


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_the_sums_are_what_they_are_said_to_be(data: bytes) -> None:
    assert sums_of(data) == by_definition(data)


@settings(max_examples=100)
@given(
    st.lists(st.binary(min_size=8, max_size=64).map(lambda data: data[: len(data) // 8 * 8]), max_size=5), st.binary()
)
def test_pieces_add_up_to_the_whole(pieces: list[bytes], rest: bytes) -> None:
    assert sums_of(*pieces, rest) == sums_of(b"".join(pieces) + rest)


@settings(max_examples=200)
@given(st.binary(min_size=1, max_size=200), st.data())
def test_one_changed_byte_is_noticed(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    other = draw.draw(st.integers(0, 255).filter(lambda value: value != data[at]))
    assert sums_of(data) != sums_of(data[:at] + bytes([other]) + data[at + 1 :])


@settings(max_examples=200)
@given(st.lists(st.binary(min_size=8, max_size=8), min_size=2, max_size=40), st.data())
def test_two_words_in_each_others_place_are_noticed(words: list[bytes], draw: st.DataObject) -> None:
    first = draw.draw(st.integers(0, len(words) - 2))
    second = draw.draw(st.integers(first + 1, len(words) - 1))
    swapped = list(words)
    swapped[first], swapped[second] = words[second], words[first]
    assert (sums_of(*words) == sums_of(*swapped)) == (words == swapped)


def test_a_lost_or_repeated_chunk_is_noticed() -> None:
    chunks = [np.random.default_rng(number).bytes(4096) for number in range(4)]
    whole = sums_of(*chunks)
    assert whole[:2] != sums_of(*chunks[:3])[:2]
    assert whole[:2] != sums_of(chunks[0], chunks[0], *chunks[2:])[:2]
    assert whole[:2] != sums_of(*chunks, chunks[3])[:2]
