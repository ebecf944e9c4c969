"""Somebody at a shard's control port who says what no router would."""

from __future__ import annotations

import socket

from experts.protocol.membership import ShardEndpoint
from experts.protocol.secret import MeshSecret
from experts.transports.control_port.handshake import ROUTER, AskingHandshake

OTHER_SECRET = MeshSecret("another mesh's secret, not this one's")
GREETING = AskingHandshake(OTHER_SECRET, ROUTER).greeting
LONG_S = 30.0


def stranger_at(endpoint: ShardEndpoint) -> socket.socket:
    """A connection that has said nothing yet."""
    connection = socket.create_connection((endpoint.host, endpoint.port), timeout=LONG_S)
    connection.settimeout(LONG_S)
    return connection


def all_from(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    data = b""
    try:
        while more := connection.recv(4096):
            data += more
    except ConnectionResetError:  # what was sent last had not been read
        pass
    return data
