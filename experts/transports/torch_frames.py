"""Headers of messages whose rows travel apart: in shared memory within a host, over gloo between hosts.

A header goes ahead of its rows, so what it takes comes on top of what they take; two TCP messages a layer are several
times the exchange of rows between GPUs of one host. Each direction has a region (`shm.SharedRegion`), written by one
side and read by the other:

    words (uint32, one cache line each): number of the last message | its reader sleeps | its bytes
    message

The shard makes both regions and leaves them in the router's mailbox; where it cannot reach that, it says so over the
pair's store, and gloo serves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.distributed import Store

from experts.transports import atomics
from experts.transports.shm import HandOver, SharedRegion
from experts.transports.torch_groups import ROUTER, GlooGroup, PairGroup, meet, seconds_left

logger = logging.getLogger(__name__)

_LINE = 64
_NUMBER, _SLEEPS, _BYTES = range(3)
_CONTROL_BYTES = 4096
_CLOSED = 0xFFFFFFFF  # as a length: its writer has closed the pair
_SPIN_NS = 50_000
_SLICE_NS = 20_000_000  # how often a sleeper looks whether the peer's process is still there
_SHM, _GLOO = b"shm", b"gloo"


class ShmFrames(PairGroup):
    """A message each way in memory that both processes map; each waits for an answer before it sends the next one."""

    def __init__(self, out: SharedRegion, into: SharedRegion, gone: Callable[[], str | None]) -> None:
        """`out` is written here, `into` by the peer; `gone` says why the peer is gone, or None while it lives."""
        atomics.warm_up()
        self._out, self._into = out, into
        self._gone = gone
        self._sent = self._seen = 0
        self._closed = False

    def send(self, data: torch.Tensor) -> None:
        """Copied: `data` is the caller's again."""
        nbytes = data.numel()
        if nbytes > len(self._out.bytes) - _CONTROL_BYTES:
            raise ValueError(f"a message of {nbytes} bytes does not fit into {len(self._out.bytes) - _CONTROL_BYTES}")
        self._out.bytes[_CONTROL_BYTES : _CONTROL_BYTES + nbytes] = data.numpy()
        self._publish(nbytes)

    def _publish(self, nbytes: int) -> None:
        self._sent = (self._sent + 1) & 0xFFFFFFFF
        _word(self._out, _BYTES)[0] = nbytes
        address = self._out.address
        atomics.publish(address + _NUMBER * _LINE, self._sent, address + _SLEEPS * _LINE)

    def recv(self, into: torch.Tensor) -> torch.Tensor:
        return into

    def wait(self, work: Any, deadline_s: float | None) -> None:
        address = self._into.address
        spin_ns = _SPIN_NS
        while True:
            left_ns = _SLICE_NS if deadline_s is None else int(deadline_s * 1e9) - time.monotonic_ns()
            number = atomics.wait_while_equal(
                address + _NUMBER * _LINE,
                address + _SLEEPS * _LINE,
                self._seen,
                spin_ns,
                max(min(left_ns, _SLICE_NS), 0),
            )
            if number != self._seen:
                self._take(work, number)
                return
            reason = "the pair was closed" if self._closed else self._gone()
            if reason is not None:
                raise ConnectionError(reason)
            if left_ns <= 0:
                raise TimeoutError("no message in shared memory before the deadline")
            spin_ns = 0

    def _take(self, into: torch.Tensor, number: int) -> None:
        nbytes = int(_word(self._into, _BYTES)[0])
        if nbytes == _CLOSED:
            raise ConnectionError("the peer closed the pair")
        if number != (self._seen + 1) & 0xFFFFFFFF or nbytes > into.numel():
            raise ConnectionError(f"message {number} of {nbytes} bytes, expected {self._seen + 1} of {into.numel()}")
        into.numpy()[:nbytes] = self._into.bytes[_CONTROL_BYTES : _CONTROL_BYTES + nbytes]
        self._seen = number

    def join(self, work: Any, deadline_s: float | None) -> None:
        self.wait(work, deadline_s)

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            self._publish(_CLOSED)


def _word(region: SharedRegion, index: int) -> np.ndarray:
    return region.bytes[index * _LINE : index * _LINE + 4].view(np.uint32)


def open_frames(
    store: Store,
    rank: int,
    address: str,
    send_bytes: int,
    recv_bytes: int,
    gone: Callable[[], str | None],
    deadline_s: float,
) -> PairGroup:
    """A group for messages of up to so many bytes, met in `store` before `deadline_s`. RuntimeError or OSError."""
    if rank == ROUTER:
        regions = _offer(store, send_bytes, recv_bytes, deadline_s)
    else:
        regions = _accept(store, send_bytes, recv_bytes)
    if regions is None:
        return GlooGroup(meet(store, "frames"), rank, address, seconds_left(deadline_s))
    return ShmFrames(*regions, gone)


Regions = tuple[SharedRegion, SharedRegion]
"""To write to, to read from."""


def _offer(store: Store, send_bytes: int, recv_bytes: int, deadline_s: float) -> Regions | None:
    """The router's side; None if the shard cannot hand its memory over."""
    with contextlib.closing(HandOver()) as mailbox:
        store.set("mailbox", mailbox.name)
        if store.get("frames by") != _SHM:
            return None
        requests, replies = mailbox.receive(deadline_s)
    try:
        out = SharedRegion(requests, _CONTROL_BYTES + send_bytes)
    except BaseException:
        os.close(replies)
        raise
    into = SharedRegion(replies, _CONTROL_BYTES + recv_bytes)
    for region in (out, into):
        region.drop_descriptor()
    return out, into


def _accept(store: Store, send_bytes: int, recv_bytes: int) -> Regions | None:
    """The shard's side, likewise."""
    mailbox = store.get("mailbox").decode()
    made: list[SharedRegion] = []
    try:
        for nbytes, label in ((recv_bytes, "requests"), (send_bytes, "replies")):
            made.append(SharedRegion.create(_CONTROL_BYTES + nbytes, label))
        HandOver.send(mailbox, [region.descriptor for region in made], timeout_s=5.0)
    except (OSError, ValueError) as error:
        logger.info("headers go over gloo: %s", error)
        store.set("frames by", _GLOO)
        return None
    finally:
        for region in made:
            region.drop_descriptor()
    store.set("frames by", _SHM)
    into, out = made
    return out, into
