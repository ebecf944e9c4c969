"""One pair's round trip against a bare ping-pong of the same bytes on the same transport.

    python -m benchmarks.data_plane.transport_pingpong [--quick]
        [--peer-prefix "ip netns exec HOST" --peer-host ADDRESS]

Both sides copy N bytes into their buffer, send them, and copy the N bytes of the answer out; peers answer without
reading. Turns are interleaved; medians are over all round trips. Goals: 1.5 times in shared memory, 1.3 over TCP. TLS,
which has no goal, takes turns with TCP: `over_tcp` is what it costs a link.

    link    `RouterLink.post` and `wait` against a doorbell, poll and reply, with the length in the message; the peer's
            side is compiled where the transport has a compiled form, as in a shard
    bare    shm: two compiled loops on a shared page and a futex
            tcp: two blocking sockets, lengths known in advance
            tls: the same two with TLS 1.3, without the tunnels that a link takes
    shm c++ both sides of shared memory without Python, as a dispatch posts and waits (experts/native/exchange.h)
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import shlex
import socket
import ssl
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import median, print_table, save
from benchmarks.data_plane.pingpong.peers import CAPACITY, LIMIT_S, SPIN_US, Peer, Turn, timed
from benchmarks.data_plane.pingpong.shm import COMPILED, answer, bare_shm_turns, compiled_turns
from experts.native.library import data_plane
from experts.protocol.membership import ShardEndpoint, host_id
from experts.protocol.settings import TlsFiles
from experts.transports.base import RouterLink
from experts.transports.connect import connect, open_shard_channel
from experts.transports.control import Hello
from experts.transports.control_port.listener import ControlListener
from experts.transports.shm import ShmDoorbell
from experts.transports.tls.identity import TlsIdentity
from tests.support.certificates import Authority

GOALS = {COMPILED: 1.5, "tcp": 1.3}
SIZES = (128, 8 << 10, 64 << 10, 256 << 10, 1 << 20)


def _hello(transport: str) -> Hello:
    return Hello("bench", transport, "1", "float32", 16, 1, 1, CAPACITY // 64)


def serve(mode: str, host: str, argument: int, tls: TlsFiles | None) -> None:
    """Body of a peer process. It prints the facts the other side needs as JSON, and ends with its standard input."""
    if mode == "link":
        _serve_links(host, tls)
    elif mode in ("shm", COMPILED):
        _report({})
        answer(mode, argument)
    else:
        _serve_tcp(host, tls)


def _report(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


def _serve_links(host: str, tls: TlsFiles | None) -> None:
    bell = ShmDoorbell(SPIN_US)
    channels: list[Any] = []
    listener = ControlListener(
        host,
        lambda hello, line: open_shard_channel(hello, line, bell, "cpu", time.monotonic() + LIMIT_S),
        channels.append,
        channels.remove,
        LIMIT_S,
        tls=None if tls is None else TlsIdentity(tls),
    )
    _report({"port": listener.port, "host_id": host_id()})
    start_s = time.monotonic()
    library = data_plane()
    while channels or time.monotonic() < start_s + LIMIT_S:
        native = [channel.native for channel in channels if channel.native is not None]
        if library is not None and native and len(native) == len(channels):
            table = (ctypes.c_void_p * len(native))(*map(ctypes.addressof, native))
            where = bell.region.address, bell.native_sockets
            library.data_plane_echo(*where, table, len(native), bell.spin_ns, 200_000_000)
            continue
        bell.wait(0.2)
        for channel in list(channels):
            nbytes = channel.poll()
            if nbytes >= 0:
                channel.reply(nbytes)


def _bare_tls(connection: socket.socket, files: TlsFiles, server: bool) -> ssl.SSLSocket:
    """The connection with TLS as routers and shards have it, both certificates checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(files.cert_file, files.key_file)
    context.load_verify_locations(files.ca_file)
    return context.wrap_socket(connection, server_side=server)


def _receive_all(connection: socket.socket, data: memoryview) -> None:
    if not isinstance(connection, ssl.SSLSocket):
        connection.recv_into(data, len(data), socket.MSG_WAITALL)
        return
    while len(data):
        data = data[connection.recv_into(data) :]


def _serve_tcp(host: str, tls: TlsFiles | None) -> None:
    with socket.create_server((host, 0)) as server:
        _report({"port": server.getsockname()[1]})
        connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is not None:
        connection = _bare_tls(connection, tls, server=True)
    view = memoryview(bytearray(CAPACITY))
    while length := int(sys.stdin.readline() or 0):
        _report({"ready": length})
        data, last = view[:length], False
        while not last:
            _receive_all(connection, data)
            last = bool(data[0])
            connection.sendall(data)


def open_link(transport: str, prefix: list[str], host: str, tls: TlsFiles | None) -> tuple[RouterLink, Peer]:
    """A link to a peer of its own."""
    peer = Peer("link", prefix, host, tls=tls)
    endpoint = ShardEndpoint(0, "1", host, peer.facts["port"], peer.facts["host_id"], 0)
    identity = None if tls is None else TlsIdentity(tls)
    return connect(endpoint, _hello(transport), "cpu", SPIN_US, time.monotonic() + LIMIT_S, tls=identity), peer


def link_turns(transport: str, prefix: list[str], host: str, tls: TlsFiles | None) -> tuple[Turn, Peer]:
    """Turns of our link, called from Python."""
    link, peer = open_link(transport, prefix, host, tls)
    payload, landing = np.ones(CAPACITY, np.uint8), np.zeros(CAPACITY, np.uint8)

    def turn(nbytes: int, count: int) -> list[float]:
        def round_trip(last: bool) -> None:
            link.send_buffer[:nbytes] = payload[:nbytes]
            link.post(nbytes)
            link.wait(time.monotonic() + LIMIT_S)
            landing[:nbytes] = link.recv_buffer[:nbytes]

        return timed(round_trip, count)

    return turn, peer


def bare_tcp_turns(prefix: list[str], host: str, tls: TlsFiles | None) -> tuple[Turn, Peer]:
    """Turns of a blocking socket."""
    peer = Peer("tcp", prefix, host, tls=tls)
    connection = socket.create_connection((host, peer.facts["port"]))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is not None:
        connection = _bare_tls(connection, tls, server=False)
    out, back = np.zeros(CAPACITY, np.uint8), np.zeros(CAPACITY, np.uint8)
    payload, landing = np.zeros(CAPACITY, np.uint8), np.zeros(CAPACITY, np.uint8)

    def turn(nbytes: int, count: int) -> list[float]:
        sent, received = memoryview(out)[:nbytes], memoryview(back)[:nbytes]

        def round_trip(last: bool) -> None:
            payload[0] = last
            out[:nbytes] = payload[:nbytes]
            connection.sendall(sent)
            _receive_all(connection, received)
            landing[:nbytes] = back[:nbytes]

        peer.write(str(nbytes))
        assert peer.read() == {"ready": nbytes}
        return timed(round_trip, count)

    return turn, peer


def measure(
    transports: tuple[str, ...], sizes: tuple[int, ...], turns: int, count: int, prefix: list[str], host: str
) -> list[dict[str, Any]]:
    """The table's rows for transports that take turns with each other."""
    rows = []
    with contextlib.ExitStack() as stack:
        sides: dict[tuple[str, str], Turn] = {}
        for name in transports:
            tls = None
            if name == COMPILED:
                link, link_peer = open_link("shm", prefix, host, None)
                stack.callback(link_peer.end)
                for side, turn, peer in compiled_turns(link, link_peer, prefix, host):
                    stack.callback(peer.end)
                    sides[name, side] = turn
                continue
            if name == "tls":
                tls = Authority(Path(stack.enter_context(tempfile.TemporaryDirectory())), "bench").issue("any")
            bare = bare_shm_turns(prefix, host) if name == "shm" else bare_tcp_turns(prefix, host, tls)
            for side, (turn, peer) in {
                "link": link_turns("tcp" if name == "tls" else name, prefix, host, tls),
                "bare": bare,
            }.items():
                stack.callback(peer.end)
                sides[name, side] = turn
        for nbytes in sizes:
            times: dict[tuple[str, str], list[float]] = {key: [] for key in sides}
            for number in range(turns + 1):
                for key, turn in sides.items():
                    measured = turn(nbytes, count)
                    if number:  # the first turn warms up
                        times[key] += measured
            medians = {key: median(values) for key, values in times.items()}
            for name in transports:
                link_us, bare_us = medians[name, "link"], medians[name, "bare"]
                row = {"transport": name, "bytes": nbytes, "link_us": link_us, "bare_us": bare_us}
                over_tcp = link_us / medians["tcp", "link"] if name == "tls" else None
                rows.append(row | {"ratio": link_us / bare_us, "goal": GOALS.get(name), "over_tcp": over_tcp})
    return rows


def main() -> None:
    """Print the table and write bench-results/transport_pingpong.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes and turns")
    parser.add_argument("--peer-prefix", default="", help="command that starts peers elsewhere on this machine")
    parser.add_argument("--peer-host", default="127.0.0.1", help="address of the peers there")
    parser.add_argument("--serve", choices=["link", "shm", COMPILED, "tcp"], help=argparse.SUPPRESS)
    parser.add_argument("--argument", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--tls", type=TlsFiles.model_validate_json, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.serve:
        serve(args.serve, args.peer_host, args.argument, args.tls)
        return
    turns, count = (5, 100) if args.quick else (11, 400)
    sizes = (128, 64 << 10) if args.quick else SIZES
    prefix = shlex.split(args.peer_prefix)
    groups: list[tuple[str, ...]] = [("tcp", "tls")]
    if not prefix:
        groups = [("shm",) if data_plane() is None else ("shm", COMPILED), *groups]
    rows = [row for group in groups for row in measure(group, sizes, turns, count, prefix, args.peer_host)]
    print_table("A pair's round trip against a bare ping-pong", list(rows[0]), [list(row.values()) for row in rows])
    suffix = "_across_hosts" if prefix else ""
    save(f"transport_pingpong{suffix}", {"rows": rows, "turns": turns, "round_trips_a_turn": count})


if __name__ == "__main__":
    main()
