"""How two processes of a mesh prove to each other that they know its secret, before either tells or allocates anything.

    asks (router, or shard that wants weights)                    serves (shard)
    greeting: magic | version | role | nonce       ------------>
                                                   <------------  greeting, likewise
    proof: HMAC(secret, "asks" | both greetings)   ------------>
                                                   <------------  verdict | HMAC(secret, "serves" | greetings | proof)
    frame: its hello                               ------------>
                                                   <------------  frame: the answer
    frame: bytes of the JSON uint32 | JSON | HMAC(key of this session and direction, the rest of the frame)

Everything is in network byte order. The side that asks proves itself first, so a stranger gets nothing to guess the
secret by. Proofs cover both nonces and both roles: none can be used twice, or sent back to who made it. What is in the
hello (the incarnation meant, say) is covered by the session's key, which neither side has without the secret.

Nobody reads past the last frame, so the connection may carry anything afterwards. No input or output happens here, so
that one thread can serve many connections: bytes in, bytes out.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import struct
from abc import ABC, abstractmethod
from typing import Any

from experts.protocol.secret import MeshSecret

PROTOCOL_VERSION = 4
ROUTER, READER, SHARD = 1, 2, 3
"""Roles. A reader is a shard that wants weights of another."""

_GREETING = struct.Struct("!8sHBx32s")
_MAGIC = b"expmesh\0"
_TLS_MAGIC = b"expmTLS\0"
TLS_BEGINS = b"\x16"
"""First byte of whoever speaks TLS."""
WANTS_TLS = _GREETING.pack(_TLS_MAGIC, PROTOCOL_VERSION, SHARD, bytes(32))
"""What a shard with TLS answers to a greeting without."""
_NONCE_BYTES = _TAG_BYTES = 32
_WELCOME, _UNKNOWN = b"\1", b"\0"
_LENGTH = struct.Struct("!I")
MAX_ANSWER_BYTES = 1 << 16
MAX_NESTING = 1024
"""Brackets in a frame's JSON: no message of ours comes near, and no parser's stack is at risk."""


class HandshakeError(ConnectionError):
    """The other side said what no member of the mesh would; `parting` may be sent before the connection is closed."""

    def __init__(self, reason: str, parting: bytes = b"") -> None:
        super().__init__(reason)
        self.parting = parting


class OtherVersionError(HandshakeError):
    """The other side speaks another version of the protocol."""


class TlsMismatchError(OtherVersionError):
    """One of the two sides speaks TLS."""

    def __init__(self, who: str, parting: bytes = b"") -> None:
        super().__init__(f"{who}: set mesh.tls for the shards and transport.tls for the routers, or neither", parting)


class OtherSecretError(HandshakeError):
    """The two sides do not know the same secret."""


class Handshake(ABC):
    """What both sides have in common. Feed it exactly `wanted` bytes at a time."""

    def __init__(self, secret: MeshSecret, role: int) -> None:
        self._secret = secret
        self._greeting = _GREETING.pack(_MAGIC, PROTOCOL_VERSION, role, secrets.token_bytes(_NONCE_BYTES))
        self._keys = (b"", b"")
        self._limit = 0
        self._body_bytes = -1  # of the frame that arrives, once its length is known
        self._head = b""
        self.wanted = _GREETING.size
        """Bytes that the next `feed` takes."""
        self.proven = False
        """Whether the other side knows the secret."""
        self.peer_role = 0
        self.message: dict[str, Any] | None = None
        """What the other side's frame says, once it is there."""

    @abstractmethod
    def feed(self, data: bytes) -> bytes:
        """Take the next `wanted` bytes; returns what to send. HandshakeError to end the connection."""

    def seal(self, message: dict[str, Any]) -> bytes:
        """This side's frame."""
        body = json.dumps(message).encode()
        framed = _LENGTH.pack(len(body)) + body
        return framed + _tag(self._keys[0], framed)

    def _read_greeting(self, data: bytes) -> None:
        magic, version, role, _ = _GREETING.unpack(data)
        if magic == _TLS_MAGIC:
            raise TlsMismatchError("it wants TLS, and this side has none")
        if data[:1] == TLS_BEGINS:
            raise TlsMismatchError("it speaks TLS, and this side does not", self._greeting)
        if magic != _MAGIC:
            raise HandshakeError("it does not speak expertmesh's protocol")
        if version != PROTOCOL_VERSION:
            raise OtherVersionError(
                f"it speaks protocol version {version}, this side {PROTOCOL_VERSION}; run the same release on both",
                self._greeting,
            )
        self.peer_role = role

    def _agree(self, transcript: tuple[bytes, ...], mine: bytes, theirs: bytes, limit: int) -> None:
        """Both sides are known: from now on frames."""
        self._keys = (
            self._secret.sign(b"expertmesh session " + mine, *transcript),
            self._secret.sign(b"expertmesh session " + theirs, *transcript),
        )
        self.proven = True
        self._limit = limit
        self.wanted = _LENGTH.size

    def _read_frame(self, data: bytes) -> None:
        if self._body_bytes < 0:
            (length,) = _LENGTH.unpack(data)
            if length > self._limit:
                raise HandshakeError(f"it announces a message of {length} bytes, expected at most {self._limit}")
            self._head, self._body_bytes = data, length
            self.wanted = length + _TAG_BYTES
            return
        body, tag = data[: self._body_bytes], data[self._body_bytes :]
        if not hmac.compare_digest(tag, _tag(self._keys[1], self._head + body)):
            raise HandshakeError("its message was changed on the way")
        if body.count(b"[") + body.count(b"{") > MAX_NESTING:
            raise HandshakeError(f"its message has more than {MAX_NESTING} brackets")
        try:
            message = json.loads(body)
        except ValueError as error:
            raise HandshakeError("its message is no JSON") from error
        if not isinstance(message, dict):
            raise HandshakeError(f"its message is a JSON {type(message).__name__}, expected an object")
        self.wanted, self.message = 0, message


class AskingHandshake(Handshake):
    """The side that connects. Its first bytes are `greeting`; once `proven`, it sends `seal(hello)`."""

    def __init__(self, secret: MeshSecret, role: int) -> None:
        super().__init__(secret, role)
        self._transcript: tuple[bytes, ...] = ()

    @property
    def greeting(self) -> bytes:
        """What to send first."""
        return self._greeting

    def feed(self, data: bytes) -> bytes:
        if self.proven:
            self._read_frame(data)
        elif not self._transcript:
            self._read_greeting(data)
            if self.peer_role != SHARD:
                raise HandshakeError(f"it has role {self.peer_role}, expected that of a shard, {SHARD}")
            proof = self._secret.sign(b"expertmesh asks", self._greeting, data)
            self._transcript = (self._greeting, data, proof)
            self.wanted = len(_WELCOME) + _TAG_BYTES
            return proof
        elif data[:1] != _WELCOME:
            raise OtherSecretError("it does not know this side's secret of the mesh")
        elif not hmac.compare_digest(data[1:], self._secret.sign(b"expertmesh serves", *self._transcript)):
            raise HandshakeError("it does not know the mesh's secret, so it is another process than the shard")
        else:
            self._agree(self._transcript, b"asks", b"serves", MAX_ANSWER_BYTES)
        return b""


class ServingHandshake(Handshake):
    """The side that listens. `max_hello_bytes` bounds what even a member of the mesh may send."""

    def __init__(self, secret: MeshSecret, max_hello_bytes: int) -> None:
        super().__init__(secret, SHARD)
        self._max_hello_bytes = max_hello_bytes
        self._theirs = b""

    def feed(self, data: bytes) -> bytes:
        if self.proven:
            self._read_frame(data)
            return b""
        if not self._theirs:
            self._read_greeting(data)
            if self.peer_role not in (ROUTER, READER):
                raise HandshakeError(f"it has role {self.peer_role}, expected {ROUTER} or {READER}")
            self._theirs = data
            self.wanted = _TAG_BYTES
            return self._greeting
        if not hmac.compare_digest(data, self._secret.sign(b"expertmesh asks", self._theirs, self._greeting)):
            # As long as the welcome, and says nothing else.
            raise OtherSecretError("it does not know the mesh's secret", _UNKNOWN + bytes(_TAG_BYTES))
        transcript = (self._theirs, self._greeting, data)
        self._agree(transcript, b"serves", b"asks", self._max_hello_bytes)
        return _WELCOME + self._secret.sign(b"expertmesh serves", *transcript)


def _tag(key: bytes, framed: bytes) -> bytes:
    return hmac.digest(key, framed, hashlib.sha256)
