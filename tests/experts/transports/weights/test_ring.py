"""The ring of shared memory and the staging of GPUs: bytes arrive as they were, whatever the sizes and the timing."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.transports.shared_region import SharedRegion
from experts.transports.weights import ring as ring_module
from experts.transports.weights import staging
from experts.transports.weights.checksum import add_to_sums, new_sums
from experts.transports.weights.ring import CHUNK_BYTES, NUM_CHUNKS, RING_BYTES, RingEnd
from experts.transports.weights.staging import HostPieces, StagedPieces
from tests.support.waiting import join

CAPACITY = CHUNK_BYTES * NUM_CHUNKS


def two_ends() -> tuple[RingEnd, RingEnd]:
    region = SharedRegion.create(RING_BYTES, "test")
    return RingEnd(region), RingEnd(region)


def random_bytes(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


@pytest.mark.parametrize(
    "nbytes", [1, 7, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CAPACITY, 3 * CAPACITY + 5]
)
def test_what_is_read_is_what_was_written(nbytes: int) -> None:
    writer, reader = two_ends()
    sent, got = random_bytes(nbytes), np.zeros(nbytes, np.uint8)
    sent_sums, got_sums, expected = new_sums(), new_sums(), new_sums()
    thread = threading.Thread(target=writer.write, args=(sent, sent_sums, 60.0), daemon=True)
    thread.start()
    assert reader.read(got, got_sums, 60.0) == nbytes
    join(thread, "the writer")
    add_to_sums(int(sent.ctypes.data), nbytes, expected)
    np.testing.assert_array_equal(got, sent)
    assert sent_sums.tolist() == got_sums.tolist() == expected.tolist()


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 3 * CHUNK_BYTES), st.integers(1, 4)), max_size=8))
def test_views_one_after_the_other_with_pieces_of_any_chunks(views: list[tuple[int, int]]) -> None:
    """Writer and reader cut a view differently, but always after whole chunks."""
    writer, reader = two_ends()
    sent = [random_bytes(nbytes, seed) for seed, (nbytes, _) in enumerate(views)]

    def write() -> None:
        for view in sent:
            writer.write(view, new_sums(), 60.0)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    for view, (nbytes, chunks) in zip(sent, views, strict=True):
        got, step = np.zeros(nbytes, np.uint8), chunks * CHUNK_BYTES
        for at in range(0, nbytes, step):
            assert reader.read(got[at : at + step], new_sums(), 60.0) == len(got[at : at + step])
        np.testing.assert_array_equal(got, view)
    join(thread, "the writer")


def test_a_side_that_waits_in_vain_says_how_far_it_came_and_can_go_on() -> None:
    writer, reader = two_ends()
    sent = random_bytes(CAPACITY + 2 * CHUNK_BYTES + 3)
    sums = new_sums()
    assert reader.read(np.zeros(5, np.uint8), new_sums(), 0.001) == 0
    done = writer.write(sent, sums, 0.001)
    assert done == CAPACITY, "the ring is full"
    assert writer.write(sent[done:], sums, 0.001) == 0
    got, got_sums = np.zeros(len(sent), np.uint8), new_sums()
    read = reader.read(got, got_sums, 0.001)
    assert read == CAPACITY
    assert writer.write(sent[done:], sums, 0.001) == len(sent) - done
    assert reader.read(got[read:], got_sums, 0.001) == len(sent) - read
    np.testing.assert_array_equal(got, sent)
    assert sums.tolist() == got_sums.tolist()


def test_the_count_of_chunks_may_pass_32_bits() -> None:
    writer, reader = two_ends()
    for end in (writer, reader):
        end._count = 2**32 - 3
    words = writer._region.bytes[:4096].view(np.uint32)
    words[0] = words[16] = 2**32 - 3
    sent, got = random_bytes(7 * CHUNK_BYTES), np.zeros(7 * CHUNK_BYTES, np.uint8)
    assert writer.write(sent, new_sums(), 0.001) == len(sent)
    assert reader.read(got, new_sums(), 0.001) == len(sent)
    np.testing.assert_array_equal(got, sent)


@pytest.mark.parametrize("pieces", [HostPieces(), StagedPieces("cpu")], ids=["host", "staged"])
@pytest.mark.parametrize("piece_bytes", [CHUNK_BYTES, 4 * CHUNK_BYTES])
@pytest.mark.parametrize("sizes", [[1], [CHUNK_BYTES], [5, 4 * CHUNK_BYTES + 1, 3], [9 * CHUNK_BYTES, 2], []])
def test_views_go_out_and_come_in_as_pieces(
    monkeypatch: pytest.MonkeyPatch, pieces: HostPieces, piece_bytes: int, sizes: list[int]
) -> None:
    views = [torch.from_numpy(random_bytes(nbytes, seed)) for seed, nbytes in enumerate(sizes)]
    sent = [piece.copy() for piece in pieces.outgoing(views, piece_bytes)]
    whole = np.concatenate([view.numpy() for view in views]) if views else np.zeros(0, np.uint8)
    assert all(0 < len(piece) <= piece_bytes for piece in sent)
    np.testing.assert_array_equal(np.concatenate(sent) if sent else whole, whole)
    targets = [torch.zeros_like(view) for view in views]
    at = 0
    for piece in pieces.incoming(targets, piece_bytes):
        piece[:] = whole[at : at + len(piece)]
        at += len(piece)
    assert at == len(whole)
    assert all(torch.equal(target, view) for target, view in zip(targets, views, strict=True))


def test_every_piece_but_a_views_last_is_whole_chunks() -> None:
    """Or the two ends of a ring would not agree on where a chunk ends."""
    assert staging.PIECE_BYTES % ring_module.CHUNK_BYTES == 0
    views = [torch.zeros(staging.PIECE_BYTES + 7, dtype=torch.uint8)]
    for pieces in (HostPieces(), StagedPieces("cpu")):
        assert [len(piece) for piece in pieces.outgoing(views)] == [staging.PIECE_BYTES, 7]
