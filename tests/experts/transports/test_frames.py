"""Headers in shared memory: what one side sends the other gets, a peer that is gone or silent is noticed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from experts.transports import torch_frames
from experts.transports.shm import HandOver
from experts.transports.torch_frames import ShmFrames, open_frames
from experts.transports.torch_groups import ROUTER, SHARD, GlooGroup, PairGroup

REQUEST_BYTES, REPLY_BYTES = 5000, 300


class Peer:
    """What a life line says."""

    reason: str | None = None


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def open_pair(gone: Callable[[], str | None]) -> tuple[PairGroup, PairGroup]:
    """(router's end, shard's end)."""
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        ends = [
            pool.submit(open_frames, store, rank, "127.0.0.1", *sizes, gone, soon())
            for rank, sizes in ((ROUTER, (REQUEST_BYTES, REPLY_BYTES)), (SHARD, (REPLY_BYTES, REQUEST_BYTES)))
        ]
        return ends[0].result(30), ends[1].result(30)


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def pair(peer: Peer) -> Iterator[tuple[PairGroup, PairGroup]]:
    ends = open_pair(lambda: peer.reason)
    yield ends
    for end in ends:
        end.abort()


def random_bytes(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def check_traffic(router: PairGroup, shard: PairGroup) -> None:
    for turn, size in enumerate([0, 1, 64, REQUEST_BYTES, 17]):
        for sender, receiver, most in ((router, shard, REQUEST_BYTES), (shard, router, REPLY_BYTES)):
            message = random_bytes(min(size, most), turn)
            into = torch.full((most,), 7, dtype=torch.uint8)
            arriving = receiver.recv(into)
            sent = message.clone()
            work = sender.send(sent)
            receiver.wait(arriving, soon())
            assert torch.equal(into[: len(message)], message)
            assert (into[len(message) :] == 7).all()
            del work


def test_messages_arrive_in_turn(pair: tuple[PairGroup, PairGroup]) -> None:
    assert all(isinstance(end, ShmFrames) for end in pair)
    check_traffic(*pair)


def test_gloo_serves_where_memory_cannot_be_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, descriptors: list[int], timeout_s: float) -> None:
        raise ValueError("is this another host?")

    monkeypatch.setattr(HandOver, "send", staticmethod(refuse))
    router, shard = open_pair(lambda: None)
    assert isinstance(router, GlooGroup)
    assert isinstance(shard, GlooGroup)
    check_traffic(router, shard)
    router.abort()
    shard.abort()


def test_a_message_that_is_late_costs_the_deadline(pair: tuple[PairGroup, PairGroup]) -> None:
    router, _ = pair
    with pytest.raises(TimeoutError, match="before the deadline"):
        router.wait(router.recv(torch.zeros(REPLY_BYTES, dtype=torch.uint8)), time.monotonic() + 0.05)


def test_a_peer_that_dies_is_noticed_without_a_deadline(peer: Peer, pair: tuple[PairGroup, PairGroup]) -> None:
    _, shard = pair
    timer = threading.Timer(0.05, lambda: setattr(peer, "reason", "its process closed the connection"))
    timer.start()
    with pytest.raises(ConnectionError, match="its process closed the connection"):
        shard.wait(shard.recv(torch.zeros(REQUEST_BYTES, dtype=torch.uint8)), None)
    timer.join()


@pytest.mark.parametrize("own", [False, True], ids=["peer's", "own"])
def test_an_abort_ends_a_wait(pair: tuple[PairGroup, PairGroup], own: bool) -> None:
    router, shard = pair
    timer = threading.Timer(0.05, (shard if own else router).abort)
    timer.start()
    with pytest.raises(ConnectionError, match="closed"):
        shard.wait(shard.recv(torch.zeros(REQUEST_BYTES, dtype=torch.uint8)), None)
    timer.join()
    (shard if own else router).abort()  # twice is once


def test_the_last_word_of_a_peer_is_that_it_closes(pair: tuple[PairGroup, PairGroup]) -> None:
    """A message that nobody read before is not delivered any more."""
    router, shard = pair
    router.send(random_bytes(10, 0))
    router.abort()
    with pytest.raises(ConnectionError, match="the peer closed the pair"):
        shard.wait(shard.recv(torch.zeros(REQUEST_BYTES, dtype=torch.uint8)), soon())


def test_what_does_not_fit_is_refused(pair: tuple[PairGroup, PairGroup]) -> None:
    router, shard = pair
    with pytest.raises(ValueError, match=f"{REQUEST_BYTES + 1} bytes does not fit into {REQUEST_BYTES}"):
        router.send(random_bytes(REQUEST_BYTES + 1, 0))
    router.send(random_bytes(100, 0))
    with pytest.raises(ConnectionError, match="message 1 of 100 bytes, expected 1 of 50"):
        shard.wait(shard.recv(torch.zeros(50, dtype=torch.uint8)), soon())


def test_numbers_wrap(pair: tuple[PairGroup, PairGroup]) -> None:
    for sender, receiver in (pair, pair[::-1]):
        assert isinstance(sender, ShmFrames)
        assert isinstance(receiver, ShmFrames)
        sender._sent = receiver._seen = 0xFFFFFFFE
        torch_frames._word(sender._out, torch_frames._NUMBER)[0] = 0xFFFFFFFE
    check_traffic(*pair)
