"""A pair whose headers are in the host's shared memory (`shm`) and whose rows are in memory of the shard's GPU.

    router                                       shard
    pack kernel writes rows          ------->    the rows' memory
    settle, post: header, bell       ------->    poll, kernel reads rows and writes its sums beside them
    wait, combine kernel reads sums  <-------    settle, reply: header

Each end waits for its own stream before it tells the other one. So no stream ever waits for another process, which
could die and leave it waiting for good: deadlines and lifelines hold as they do over shared memory.

The shard makes the memory and frees it when the router has unmapped it or is gone: the router holds one end of a socket
pair, the leash, for as long as it has it mapped. Transport "shm_split" is for tests without a GPU: the same, with rows
in host memory.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import torch

from experts.protocol.errors import ShardLostError, ShardRejectedError, ShardTimeoutError
from experts.protocol.membership import ShardEndpoint, host_id
from experts.protocol.wire import H_ROWS, header_of
from experts.transports.base import Doorbell, RouterLink, ShardChannel
from experts.transports.control import Control, Hello, LifeLine, shake_hands
from experts.transports.cuda_ipc.cudart import CudaError
from experts.transports.cuda_ipc.rows import PairRows, make_rows, map_rows
from experts.transports.shared_region import FdMailbox
from experts.transports.shm import ShmDoorbell, ShmRouterLink, ShmShardChannel

_MAILBOX_TIMEOUT_S = 5.0
_ALIGN = 256  # as cudaMalloc aligns


def _row_bytes(hello: Hello) -> int:
    """Bytes of the rows of one direction, so that both begin where GPUs like it."""
    return -(-hello.max_rows * hello.row_bytes // _ALIGN) * _ALIGN


class CudaIpcRouterLink(RouterLink):
    """The router's end. `send_tensor` and `recv_tensor` are the shard's memory."""

    send_tensor: torch.Tensor
    recv_tensor: torch.Tensor

    def __init__(self, headers: ShmRouterLink, rows: PairRows, leash: socket.socket, hello: Hello) -> None:
        self.rank, self.transport = headers.rank, hello.transport
        self.send_buffer, self.recv_buffer = headers.send_buffer, headers.recv_buffer
        self.native = headers.native  # for who has the rows settled before it posts
        half, used = _row_bytes(hello), hello.max_rows * hello.row_bytes
        self.send_tensor, self.recv_tensor = rows.tensor[:used], rows.tensor[half : half + used]
        self._headers, self._rows, self._leash = headers, rows, leash
        self._row_bytes = hello.row_bytes
        self._closed = False

    def post(self, nbytes: int) -> None:
        if self._closed:
            raise ShardLostError(self.rank, "the link is closed")
        on_device = int(header_of(self.send_buffer)[H_ROWS]) * self._row_bytes
        if not 0 <= on_device <= min(nbytes, len(self.send_tensor)):
            raise ValueError(
                f"the header announces {on_device} bytes of rows, expected 0 to "
                f"{min(nbytes, len(self.send_tensor))} in a message of {nbytes} bytes"
            )
        if on_device:
            self._rows.settle()
        self._headers.post(nbytes)

    def wait(self, deadline_s: float) -> int:
        return self._headers.wait(deadline_s)

    def trim(self) -> None:
        if not self._closed:
            self._headers.trim()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._headers.close()
            # In a thread, because a GPU has to come to the end of what uses the memory.
            threading.Thread(target=self._let_go, name="rows-unmap", daemon=True).start()

    def _let_go(self) -> None:
        try:
            self._rows.close()
        finally:
            self._leash.close()


class CudaIpcShardChannel(ShardChannel):
    """The shard's end, which makes the memory."""

    def __init__(self, hello: Hello, line: LifeLine, bell: ShmDoorbell, device: str) -> None:
        self.router_id = hello.router_id
        half, used = _row_bytes(hello), hello.max_rows * hello.row_bytes
        self._rows = make_rows(2 * half, device)
        self._recv_tensor, self._send_tensor = self._rows.tensor[:used], self._rows.tensor[half : half + used]
        ours, theirs = socket.socketpair()
        try:
            FdMailbox.send(str(hello.details.get("leash", "")), [theirs.fileno()], _MAILBOX_TIMEOUT_S)
            mailbox = str(hello.details.get("mailbox", ""))
            self._headers = ShmShardChannel(
                hello.router_id, mailbox, bell, hello.request_capacity, hello.reply_capacity, line
            )
        except BaseException:
            ours.close()
            self._rows.close()  # the router was not told how to map it
            raise
        finally:
            theirs.close()
        self._leash = ours
        self.recv_buffer, self.send_buffer = self._headers.recv_buffer, self._headers.send_buffer

    @property
    def send_tensor(self) -> torch.Tensor:
        return self._send_tensor

    @property
    def recv_tensor(self) -> torch.Tensor:
        return self._recv_tensor

    def details(self) -> dict[str, Any]:
        """What the router needs to map the memory."""
        return {"rows": self._rows.handle.hex()}

    def poll(self) -> int:
        if self.closed:
            return -1
        nbytes = self._headers.poll()
        if self._headers.closed:
            self.close()
        return nbytes

    def reply(self, nbytes: int) -> None:
        self._rows.settle()
        self._headers.reply(nbytes)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._headers.close()
            threading.Thread(target=self._free, name="rows-free", daemon=True).start()

    def _free(self) -> None:
        """Once the router has unmapped it, or is gone."""
        poller = select.poll()
        poller.register(self._leash, select.POLLRDHUP)
        poller.poll()
        self._leash.close()
        self._rows.close()


def connect_cuda_ipc(
    endpoint: ShardEndpoint,
    hello: Hello,
    line: LifeLine,
    control: Control,
    device: str,
    spin_us: float,
    deadline_s: float,
) -> RouterLink:
    """The router's end, ready to post. A ShardError, or CannotMapError if this end cannot reach the shard's memory."""
    rank = endpoint.rank
    if endpoint.host_id != host_id():
        raise ShardRejectedError(rank, f"transport {hello.transport} works within one host; use nccl, or auto")
    mailbox, leashes = FdMailbox(), FdMailbox()
    descriptors: list[int] = []
    try:
        _check_device(hello.transport, device)
        answer = shake_hands(
            control, rank, replace(hello, details={"mailbox": mailbox.name, "leash": leashes.name}), deadline_s
        )
        leash = socket.socket(fileno=leashes.receive(deadline_s, 1)[0])
        try:
            descriptors = mailbox.receive(deadline_s)
            headers = ShmRouterLink.attach(
                rank, (descriptors[0], descriptors[1]), hello.request_capacity, hello.reply_capacity, spin_us, line
            )
            rows = map_rows(bytes.fromhex(str(answer["rows"])), 2 * _row_bytes(hello), device)
        except BaseException:
            leash.close()
            raise
        return CudaIpcRouterLink(headers, rows, leash, hello)
    except TimeoutError as error:
        raise ShardTimeoutError(rank, f"no {hello.transport} pair before the connect deadline") from error
    except (OSError, ValueError, KeyError) as error:
        if time.monotonic() >= deadline_s:
            raise ShardTimeoutError(rank, f"no {hello.transport} pair before the connect deadline") from error
        raise ShardRejectedError(rank, f"no {hello.transport} pair: {error}") from error
    finally:
        mailbox.close()
        leashes.close()


def open_cuda_ipc_channel(
    hello: Hello, line: LifeLine, bell: Doorbell, device: str
) -> tuple[ShardChannel, dict[str, Any]]:
    """The shard's end, with the fields of the answer. ValueError refuses the router."""
    _check_device(hello.transport, device)
    if not isinstance(bell, ShmDoorbell):
        raise ValueError("this shard has no shared memory; use transport nccl")
    where = device if hello.transport == "cuda_ipc" else "cpu"
    try:
        channel = CudaIpcShardChannel(hello, line, bell, where)
    except CudaError as error:
        raise ValueError(f"transport {hello.transport}: {error}; free memory of the GPU, or use nccl") from error
    return channel, channel.details()


def _check_device(transport: str, device: str) -> None:
    if transport == "cuda_ipc" and not device.startswith("cuda"):
        raise ValueError(f"transport cuda_ipc joins GPUs, this end computes on {device!r}; use auto, shm or tcp")
