"""Pairs over NCCL, between GPUs.

One message each way:

    frame (over gloo): int64 host bytes | int64 device bytes | pad to 64 | host part
    rows (over NCCL): device part

The rows, which end a message (`experts.protocol.wire`), travel as a CUDA tensor; the rest, which both hosts read
anyway, travels over gloo. `send_buffer` and `recv_buffer` hold the host part, `send_tensor` and `recv_tensor` the rows.

On the shard, one thread for each pair blocks in the receive and rings the doorbell. Transport "gloo_split" is for tests
without a GPU: the protocol of NCCL pairs, with gloo in NCCL's place.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

import numpy as np
import torch
from torch.distributed import PrefixStore, Store

from experts.protocol.errors import ShardLostError, ShardRejectedError, ShardTimeoutError
from experts.protocol.membership import ShardEndpoint
from experts.protocol.wire import H_ROWS, header_of
from experts.transports.base import Doorbell, RouterLink, ShardChannel
from experts.transports.control import Control, Hello, LifeLine, shake_hands
from experts.transports.devices import identity_of
from experts.transports.nccl_sharing import gpus_are_shared
from experts.transports.rendezvous import Meeting, connect_to_meeting
from experts.transports.torch_groups import (
    ROUTER,
    SHARD,
    GlooGroup,
    NcclGroup,
    PairGroup,
    seconds_left,
)

logger = logging.getLogger(__name__)

_FRAME_BYTES = 64
_HOST, _DEVICE = 0, 1
# For rows whose frame has come: shards are waited for in turn, and one that is silent uses up the time of the next.
_ROWS_GRACE_S = 1.0


class _Frame:
    """The buffer of one gloo message: frame words, then the host part."""

    def __init__(self, capacity: int) -> None:
        self.tensor = torch.zeros(_FRAME_BYTES + capacity, dtype=torch.uint8)
        everything = self.tensor.numpy()
        self.words: np.ndarray = everything[:_FRAME_BYTES].view(np.int64)
        self.buffer: np.ndarray = everything[_FRAME_BYTES:]

    def seal(self, host_bytes: int, device_bytes: int) -> torch.Tensor:
        """Write the frame words; returns the bytes to send."""
        self.words[_HOST], self.words[_DEVICE] = host_bytes, device_bytes
        return self.tensor[: _FRAME_BYTES + host_bytes]


class _Pair:
    """What both ends have in common: frame, send, receive."""

    def __init__(self, hello: Hello, device: str, send_capacity: int, recv_capacity: int) -> None:
        self.out, self.into = _Frame(send_capacity), _Frame(recv_capacity)
        self._row_bytes = hello.hidden_size * getattr(torch, hello.dtype).itemsize
        where = device if hello.transport == "nccl" else "cpu"
        self.send_tensor = torch.zeros(send_capacity, dtype=torch.uint8, device=where)
        self.recv_tensor = torch.zeros(recv_capacity, dtype=torch.uint8, device=where)
        self._frames: PairGroup | None = None
        self._rows: PairGroup | None = None
        self._arriving: Any = None
        self._sending: list[Any] = []

    def open(self, store: Store, rank: int, hello: Hello, device: str, line: LifeLine, deadline_s: float) -> None:
        """Build the groups. RuntimeError or OSError if the other end does not join before `deadline_s`."""
        address = line.local_address()
        frames = GlooGroup(PrefixStore("frames", store), rank, address, seconds_left(deadline_s))
        rows_store = PrefixStore("rows", store)
        if hello.transport == "nccl":
            self._rows = NcclGroup(rows_store, rank, device, seconds_left(deadline_s), line.gone)
        else:
            self._rows = GlooGroup(rows_store, rank, address, seconds_left(deadline_s))
        self._frames = frames

    def expect(self) -> None:
        """Start to receive the next message."""
        assert self._frames is not None
        self._arriving = self._frames.recv(self.into.tensor)

    def send(self, nbytes: int) -> None:
        """Start to send a message of `nbytes` and to receive the next one; waits for neither."""
        if nbytes > len(self.out.buffer):
            raise ValueError(f"a message of {nbytes} bytes does not fit into {len(self.out.buffer)}")
        assert self._frames is not None
        on_device = int(header_of(self.out.buffer)[H_ROWS]) * self._row_bytes
        if not 0 <= on_device <= nbytes:
            raise ValueError(
                f"the header announces {on_device} bytes of rows, expected 0 to the message's {nbytes} bytes"
            )
        self.expect()  # first: gloo sends immediately to a peer that already waits, and asks it otherwise
        # Keep the works until the next message: by then the peer has all of this one.
        self._sending = [self._frames.send(self.out.seal(nbytes - on_device, on_device))]
        if on_device:
            assert self._rows is not None
            self._sending.append(self._rows.send(self.send_tensor[:on_device]))

    def receive(self, deadline_s: float | None, rows_timeout_s: float = 0.0) -> int:
        """Wait for the message that `expect` started to receive; returns its length. TimeoutError, ConnectionError.

        Without a deadline (an idle shard), the rows must follow their frame within `rows_timeout_s`; with one that has
        passed, within a second.
        """
        assert self._frames is not None
        self._frames.wait(self._arriving, deadline_s)
        host_bytes, device_bytes = int(self.into.words[_HOST]), int(self.into.words[_DEVICE])
        if not 0 <= host_bytes <= len(self.into.buffer) or not 0 <= device_bytes <= len(self.recv_tensor):
            raise ConnectionError(
                f"the peer announced {host_bytes} bytes and {device_bytes} bytes of rows, expected at most "
                f"{len(self.into.buffer)} and {len(self.recv_tensor)}"
            )
        if device_bytes:
            assert self._rows is not None
            now_s = time.monotonic()
            rows_deadline_s = now_s + rows_timeout_s if deadline_s is None else max(deadline_s, now_s + _ROWS_GRACE_S)
            self._rows.wait(self._rows.recv(self.recv_tensor[:device_bytes]), rows_deadline_s)
        return host_bytes + device_bytes

    def abort(self) -> None:
        """Break the pair; waits on it fail now."""
        for group in (self._frames, self._rows):
            if group is not None:
                group.abort()


class TorchRouterLink(RouterLink):
    """The router's end. `send_tensor` and `recv_tensor` (uint8) hold the rows."""

    def __init__(self, rank: int, transport: str, pair: _Pair, line: LifeLine) -> None:
        self.rank = rank
        self.transport = transport
        self.send_buffer, self.recv_buffer = pair.out.buffer, pair.into.buffer
        self.send_tensor, self.recv_tensor = pair.send_tensor, pair.recv_tensor
        self._pair = pair
        self._line = line
        self._closed = False

    def post(self, nbytes: int) -> None:
        if self._closed:
            raise ShardLostError(self.rank, "the link is closed")
        try:
            self._pair.send(nbytes)
        except ConnectionError as error:
            raise ShardLostError(self.rank, self._line.gone() or str(error)) from error

    def wait(self, deadline_s: float) -> int:
        try:
            return self._pair.receive(deadline_s)
        except TimeoutError as error:
            raise ShardTimeoutError(
                self.rank, f"no reply over {self.transport} before the dispatch deadline"
            ) from error
        except ConnectionError as error:
            raise ShardLostError(self.rank, self._line.gone() or str(error)) from error

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._line.close()
            self._pair.abort()


class TorchShardChannel(ShardChannel):
    """The shard's end. A thread builds the groups, then blocks in receives; poll() and reply() never block."""

    def __init__(
        self, hello: Hello, line: LifeLine, bell: Doorbell, device: str, meeting: Meeting, deadline_s: float
    ) -> None:
        self.router_id = hello.router_id
        self._pair = _Pair(hello, device, hello.reply_capacity, hello.request_capacity)
        self.recv_buffer, self.send_buffer = self._pair.into.buffer, self._pair.out.buffer
        self._line = line
        self._bell = bell
        self._meeting = meeting
        self._rows_timeout_s = seconds_left(deadline_s)
        self._ready = -1
        self._expecting = threading.Semaphore(0)
        threading.Thread(
            target=self._run, args=(hello, device, deadline_s), name=f"pair-{hello.router_id}", daemon=True
        ).start()

    @property
    def send_tensor(self) -> torch.Tensor | None:
        return self._pair.send_tensor

    @property
    def recv_tensor(self) -> torch.Tensor | None:
        return self._pair.recv_tensor

    def _run(self, hello: Hello, device: str, deadline_s: float) -> None:
        try:
            with contextlib.closing(self._meeting.accept(deadline_s)) as store:
                self._pair.open(store, SHARD, hello, device, self._line, deadline_s)
            self._pair.expect()
            while not self.closed:
                self._ready = self._pair.receive(None, self._rows_timeout_s)
                self._bell.ring()
                self._expecting.acquire()
        except (RuntimeError, OSError) as error:
            if not self.closed:
                logger.info("pair with router %s ended: %s", self.router_id, self._line.gone() or error)
        finally:
            self.close()

    def poll(self) -> int:
        return -1 if self.closed else self._ready

    def reply(self, nbytes: int) -> None:
        self._ready = -1
        try:
            self._pair.send(nbytes)
        except ConnectionError:
            self.close()
        else:
            self._expecting.release()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._line.close()
            self._meeting.close()
            self._pair.abort()
            self._expecting.release()


def connect_torch(
    endpoint: ShardEndpoint, hello: Hello, line: LifeLine, control: Control, device: str, deadline_s: float
) -> RouterLink:
    """The router's end of an NCCL pair, ready to post. Raises a ShardError."""
    rank = endpoint.rank
    try:
        _check_device(hello.transport, device)
        _check_two_gpus(hello.transport, device, endpoint.device)
    except ValueError as error:
        raise ShardRejectedError(rank, str(error)) from error
    answer = shake_hands(control, rank, hello, deadline_s)
    pair = _Pair(hello, device, hello.request_capacity, hello.reply_capacity)
    try:
        with contextlib.closing(connect_to_meeting(endpoint.host, answer, deadline_s)) as store:
            pair.open(store, ROUTER, hello, device, line, deadline_s)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        pair.abort()
        if time.monotonic() >= deadline_s:
            raise ShardTimeoutError(rank, f"no {hello.transport} pair before the connect deadline") from error
        raise ShardLostError(rank, line.gone() or f"no {hello.transport} pair: {error}") from error
    return TorchRouterLink(rank, hello.transport, pair, line)


def open_torch_channel(
    hello: Hello, line: LifeLine, bell: Doorbell, device: str, deadline_s: float
) -> tuple[ShardChannel, dict[str, Any]]:
    """The shard's end of an NCCL pair, with the fields of the answer. It finishes opening after the answer is
    sent. ValueError refuses the router."""
    _check_device(hello.transport, device)
    meeting = Meeting(line.local_address())
    return TorchShardChannel(hello, line, bell, device, meeting, deadline_s), meeting.details()


def _check_two_gpus(transport: str, device: str, theirs: str) -> None:
    """ValueError if both ends are on one GPU, where NCCL would fail with less to go by."""
    if transport == "nccl" and not gpus_are_shared() and identity_of(device) == theirs:
        raise ValueError(
            f"transport nccl: router and shard are both on GPU {theirs}, and NCCL refuses two ranks on one GPU; use "
            "cuda_ipc, or give each a GPU of its own"
        )


def _check_device(transport: str, device: str) -> None:
    if transport == "nccl" and not device.startswith("cuda"):
        raise ValueError(f"transport nccl joins GPUs, this end computes on {device!r}; use auto, shm or tcp")
    if transport == "nccl" and not torch.distributed.is_nccl_available():
        raise ValueError("transport nccl: this build of torch has no NCCL; use tcp")
