"""A shard without experts, for the transports' tests: it answers bytes with bytes, and misbehaves on request.

H_EPOCH of a request's header says what to do with it.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from experts.protocol.membership import ShardEndpoint, host_id
from experts.protocol.wire import H_EPOCH, H_ROWS, HEADER_BYTES, header_of
from experts.transports import atomics, control
from experts.transports.base import RouterLink, ShardChannel
from experts.transports.connect import connect, open_shard_channel
from experts.transports.control import Hello, LifeLine
from experts.transports.control_port.listener import ControlListener
from experts.transports.shm import ShmDoorbell
from tests.support import signals

ECHO, HOLD, DROP = 0, 1, 2
"""Values of H_EPOCH: answer the request; answer it when told to; close the pair instead."""

ROW_BYTES = 64
CAPACITY = 1 << 16
START_TIMEOUT_S = 60.0


def deadline_in(seconds: float) -> float:
    """The instant on time.monotonic() in `seconds` from now."""
    return time.monotonic() + seconds


atomics.warm_up()  # once in the fork server, not in every shard


def hello_for(transport: str, router_id: str = "router", capacity: int = CAPACITY) -> Hello:
    """The hello of a router in the tests, with buffers of at least `capacity` bytes."""
    return Hello(
        router_id=router_id,
        transport=transport,
        incarnation="1",
        dtype="float32",
        hidden_size=ROW_BYTES // 4,
        top_k=1,
        num_layers=1,
        max_rows=capacity // ROW_BYTES,
    )


class EchoLoop:
    """The shard's compute loop: it returns every request with 1 added to each byte of its body."""

    def __init__(self, bind_host: str, handshake_timeout_s: float, events: Any) -> None:
        self.bell = ShmDoorbell(spin_us=20)
        self.events = events
        self.held: list[tuple[ShardChannel, int]] = []
        self.channels: list[ShardChannel] = []
        self.listener = ControlListener(bind_host, self._open, self._add, self._remove, handshake_timeout_s)
        self.handshake_timeout_s = handshake_timeout_s

    def _open(self, hello: Hello, line: LifeLine) -> tuple[ShardChannel, dict[str, Any]]:
        return open_shard_channel(hello, line, self.bell, "cpu", time.monotonic() + self.handshake_timeout_s)

    def _add(self, channel: ShardChannel) -> None:
        self.channels = [*self.channels, channel]
        self.bell.ring()

    def _remove(self, channel: ShardChannel) -> None:
        self.channels = [c for c in self.channels if c is not channel]
        self.events.send(("left", channel.router_id))

    def run(self) -> None:
        """Serve forever."""
        while True:
            self.bell.wait(0.5)
            while sum(self._serve(channel) for channel in self.channels):
                continue

    def _serve(self, channel: ShardChannel) -> int:
        nbytes = channel.poll()
        if nbytes < 0 or any(channel is held for held, _ in self.held):
            return 0
        task = int(header_of(channel.recv_buffer)[H_EPOCH]) if nbytes >= HEADER_BYTES else ECHO
        if task == HOLD:
            self.held.append((channel, nbytes))
            self.events.send(("held", channel.router_id))
        elif task == DROP:
            channel.close()
        else:
            answer(channel, nbytes)
        return 1

    def release(self) -> None:
        """Answer the requests that were held."""
        held, self.held = self.held, []
        for channel, nbytes in held:
            answer(channel, nbytes)
        self.events.send(("released", len(held)))


def answer(channel: ShardChannel, nbytes: int) -> None:
    """Reply with the same header and 1 added to every byte of the body, also to rows that travel separately."""
    rows = getattr(channel, "recv_tensor", None)
    on_device = int(header_of(channel.recv_buffer)[H_ROWS]) * ROW_BYTES if rows is not None else 0
    host_bytes = nbytes - on_device
    channel.send_buffer[:HEADER_BYTES] = channel.recv_buffer[:HEADER_BYTES]
    np.add(
        channel.recv_buffer[HEADER_BYTES:host_bytes],
        np.uint8(1),
        out=channel.send_buffer[HEADER_BYTES:host_bytes],
    )
    if on_device:
        channel.send_tensor[:on_device] = rows[:on_device] + 1
    channel.reply(nbytes)


def serve(rank: int, bind_host: str, handshake_timeout_s: float, netns: str, keepalive_s: int, events: Any) -> None:
    """Process body: sends its endpoint, then events; runs the commands from the other end of the pipe."""
    if netns:
        from benchmarks.serving.hosts import enter

        enter(netns)
    if keepalive_s:
        control.KEEPALIVE = tuple((option, keepalive_s) for option, _ in control.KEEPALIVE)
    loop = EchoLoop(bind_host, handshake_timeout_s, events)
    events.send(ShardEndpoint(rank, "1", bind_host, loop.listener.port, host_id(), os.getpid()))
    threading.Thread(target=loop.run, daemon=True).start()
    while True:
        try:
            command = events.recv()
        except EOFError:
            return
        if command == "release":
            loop.release()
        elif command == "channels":
            events.send(("channels", len(loop.channels)))
        elif command == "stop":
            loop.listener.stop()
            return


@dataclass
class EchoShard:
    """A shard's process, seen from the tests."""

    process: Any
    endpoint: ShardEndpoint
    pipe: multiprocessing.connection.Connection

    def event(self, timeout_s: float = 20.0) -> Any:
        """The next event that the shard reports."""
        if not self.pipe.poll(timeout_s):
            raise TimeoutError("the shard reported nothing")
        return self.pipe.recv()

    def stop(self) -> None:
        """Send SIGSTOP and wait until all threads have stopped."""
        signals.stop(self.endpoint.pid)

    def resume(self) -> None:
        """Send SIGCONT."""
        os.kill(self.endpoint.pid, signal.SIGCONT)

    def connect(
        self, transport: str, router_id: str = "router", capacity: int = CAPACITY, timeout_s: float = 20.0
    ) -> RouterLink:
        """A link to this shard."""
        hello = hello_for(transport, router_id, capacity)
        return connect(self.endpoint, hello, "cpu", 20.0, deadline_in(timeout_s))


@functools.cache
def context() -> Any:
    """Processes forked from one that has imported everything: they start fast and inherit no threads."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["tests.support.echo_shard", "experts.transports.torch_pair"])
    # Python 3.11's fork server does not copy sys.path, and silently skips what it cannot import.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        multiprocessing.forkserver.ensure_running()
    return forkserver


@contextlib.contextmanager
def echo_shard(
    rank: int = 0,
    bind_host: str = "127.0.0.1",
    handshake_timeout_s: float = 20.0,
    netns: str = "",
    keepalive_s: int = 0,
) -> Iterator[EchoShard]:
    """A running echo shard, in network namespace `netns` if given; killed at the end."""
    ours, theirs = multiprocessing.Pipe()
    arguments = (rank, bind_host, handshake_timeout_s, netns, keepalive_s, theirs)
    process = context().Process(target=serve, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise TimeoutError(f"the echo shard did not start within {START_TIMEOUT_S} s")
        yield EchoShard(process, ours.recv(), ours)
    finally:
        process.kill()
        process.join(10)
        ours.close()


def post_body(link: RouterLink, body: bytes, task: int = ECHO, num_rows: int = 0) -> int:
    """Post a header and `body`, whose last `num_rows` rows travel as rows. Returns the message's length."""
    nbytes = HEADER_BYTES + len(body)
    header = header_of(link.send_buffer)
    header[:] = 0
    header[H_EPOCH], header[H_ROWS] = task, num_rows
    send_tensor = getattr(link, "send_tensor", None)
    on_device = num_rows * ROW_BYTES if send_tensor is not None else 0
    data = np.frombuffer(body, np.uint8)
    link.send_buffer[HEADER_BYTES : nbytes - on_device] = data[: len(data) - on_device]
    if on_device:
        send_tensor.numpy()[:on_device] = data[len(data) - on_device :]
    link.post(nbytes)
    return nbytes


def reply_body(link: RouterLink, nbytes: int) -> bytes:
    """The body of a reply of `nbytes`."""
    recv_tensor = getattr(link, "recv_tensor", None)
    on_device = int(header_of(link.recv_buffer)[H_ROWS]) * ROW_BYTES if recv_tensor is not None else 0
    host = link.recv_buffer[HEADER_BYTES : nbytes - on_device].tobytes()
    return host + (recv_tensor.numpy()[:on_device].tobytes() if on_device else b"")


def counted_up(body: bytes) -> bytes:
    """The echo shard's answer to `body`."""
    return (np.frombuffer(body, np.uint8) + np.uint8(1)).tobytes()
