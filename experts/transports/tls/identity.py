"""A process's certificate, and the authority by which it judges those of others."""

from __future__ import annotations

import socket
import ssl
import time
from typing import TYPE_CHECKING

from experts.transports.control_port.handshake import TlsMismatchError
from experts.transports.tls.tunnel import Tunnel, open_tunnel

if TYPE_CHECKING:
    from experts.protocol.settings import TlsFiles  # needs pydantic

_REMEDY = "tls.ca_file has to be the authority of tls.cert_file, for servers and clients alike"


class TlsIdentity:
    """Mutual TLS 1.3. Any certificate of the mesh's authority will do, whatever name it bears: the secret is next."""

    def __init__(self, files: TlsFiles) -> None:
        """ValueError names the file that cannot be read or is of another kind, or says why they do not go together."""
        for name, path in files:
            try:
                with open(path, "rb") as file:
                    file.read(1)
            except OSError as error:
                raise ValueError(f"tls.{name}: {path}: cannot be read: {error.strerror}") from None
        self._serving = _context(ssl.PROTOCOL_TLS_SERVER, files)
        self._asking = _context(ssl.PROTOCOL_TLS_CLIENT, files)
        try:
            _shake_hands_with_itself(self._serving, self._asking)
        except ssl.SSLError as error:
            raise ValueError(f"tls.cert_file: {files.cert_file}: {_reason(error)}; {_REMEDY}") from None

    def serve(self, connection: socket.socket) -> tuple[socket.socket, Tunnel]:
        """Take over a connection that was accepted; returns a socket that carries what is in the tunnel.

        Does not wait: the peer's certificate is checked before the first byte comes out. OSError if the kernel refuses.
        """
        return open_tunnel(self._serving.wrap_socket(connection, server_side=True, do_handshake_on_connect=False))

    def connect(self, connection: socket.socket, deadline_s: float) -> tuple[socket.socket, Tunnel]:
        """The same for a connection that was made, once the server has proven itself. OSError, TimeoutError.

        The server checks this side's certificate afterwards: `Tunnel.problem` has its objection.
        """
        connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
        return open_tunnel(self._asking.wrap_socket(connection))


def problem_of(error: Exception) -> str:
    """Why TLS with the other side failed, in words that name the remedy."""
    if isinstance(error, TlsMismatchError):
        return str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message} (tls.ca_file)"
    if isinstance(error, ssl.SSLError):
        reason = _reason(error)
        if "wrong version number" in reason or "record layer failure" in reason:
            return str(TlsMismatchError("it does not speak TLS, and this side does"))
        if "alert" in reason:
            return f"it refuses this side's certificate: {reason} (tls.cert_file, or the other side's tls.ca_file)"
        return f"TLS failed: {reason}"
    return f"the connection ended during TLS's handshake: {error}"


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(files.cert_file, files.key_file, password=_no_password)
    except ssl.SSLError as error:
        raise ValueError(
            f"tls.cert_file {files.cert_file} and tls.key_file {files.key_file}: {_reason(error)}; expected PEM, "
            "and the certificate's own key"
        ) from None
    try:
        context.load_verify_locations(files.ca_file)
    except ssl.SSLError as error:
        raise ValueError(f"tls.ca_file: {files.ca_file}: {_reason(error)}; expected certificates in PEM") from None
    return context


def _no_password() -> str:
    raise ValueError("tls.key_file is encrypted; processes that start by themselves need it without a password")


def _shake_hands_with_itself(serving: ssl.SSLContext, asking: ssl.SSLContext) -> None:
    """Finds a key of another certificate, an authority that did not sign it, a purpose it is not for, or its end."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = asking.wrap_bio(back, there), serving.wrap_bio(there, back, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message)
    return (error.reason or str(error)).replace("_", " ").lower()
