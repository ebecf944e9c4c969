"""Bytes through two tunnels: all of them, in order, whatever waits for whom, and whoever leaves."""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.transports.tls.identity import TlsIdentity
from tests.support.certificates import Authority
from tests.support.echo_shard import deadline_in

LIMIT_S = 60.0
Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    """The local ends of a client's and a server's tunnel."""
    identity = TlsIdentity(Authority(tmp_path, "ours").issue("any"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        asking = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    theirs, _ = identity.serve(accepted)
    ours, _ = identity.connect(asking, deadline_in(LIMIT_S))
    for end in (ours, theirs):
        end.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def exchange(sent: dict[socket.socket, bytes], reads: dict[socket.socket, int]) -> dict[socket.socket, bytes]:
    """Send all at once, and read from each end so many bytes at a time: what came out of each, once all has."""
    left = {end: memoryview(data) for end, data in sent.items()}
    came = {end: bytearray() for end in sent}
    expected = {end: sum(len(data) for other, data in sent.items() if other is not end) for end in sent}
    deadline_s = time.monotonic() + LIMIT_S
    while any(len(came[end]) < expected[end] for end in sent):
        assert time.monotonic() < deadline_s, {end: len(data) for end, data in came.items()}
        readable, writable, _ = select.select(list(sent), [end for end in sent if left[end]], [], 1.0)
        for end in writable:
            left[end] = left[end][end.send(left[end]) :]
        for end in readable:
            came[end] += end.recv(reads[end])
    return {end: bytes(data) for end, data in came.items()}


@pytest.mark.parametrize("read_bytes", [(1 << 20, 1 << 20), (1 << 20, 3000), (3000, 3000)])
def test_both_ways_are_full_at_once(ends: Ends, read_bytes: tuple[int, int]) -> None:
    """Neither way waits for the other: each tunnel holds bytes for an end that does not read them yet."""
    ours, theirs = ends
    sent = {ours: random.Random(1).randbytes(8 << 20), theirs: random.Random(2).randbytes(8 << 20)}
    came = exchange(sent, dict(zip(ends, read_bytes, strict=True)))
    assert came[theirs] == sent[ours]
    assert came[ours] == sent[theirs]


@pytest.mark.parametrize("nbytes", [1, (1 << 14) - 1, 1 << 14, (1 << 14) + 1, 1 << 16, (1 << 16) + 1])
def test_a_message_arrives_whole_without_another_to_push_it(ends: Ends, nbytes: int) -> None:
    """Around the sizes of TLS's records and of a read."""
    ours, theirs = ends
    for turn in range(3):
        data = random.Random(turn).randbytes(nbytes)
        assert exchange({ours: data, theirs: b""}, {ours: 1, theirs: 1 << 20})[theirs] == data
        assert exchange({ours: b"", theirs: data}, {ours: 1 << 20, theirs: 1})[ours] == data


@pytest.mark.parametrize("leaver", [0, 1], ids=["client", "server"])
def test_what_was_sent_before_the_end_arrives_and_then_the_end(ends: Ends, leaver: int) -> None:
    """As the reason of a shard that refuses a hello and closes."""
    exchange({ends[0]: b"hello", ends[1]: b"welcome"}, {ends[0]: 9, ends[1]: 9})
    left, stayed = ends[leaver], ends[1 - leaver]
    data = random.Random(3).randbytes(100_000)
    left.settimeout(LIMIT_S)
    left.sendall(data)
    left.close()
    stayed.settimeout(LIMIT_S)
    came = bytearray()
    while part := stayed.recv(1 << 20):
        came += part
    assert bytes(came) == data
