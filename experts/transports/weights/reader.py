"""The end that wants experts: fetches their bytes into slots that nobody uses yet."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from experts.protocol.membership import ShardEndpoint, host_id
from experts.protocol.secret import MeshSecret
from experts.transports.control import Control, open_control, shake_hands
from experts.transports.control_port.handshake import READER
from experts.transports.shared_region import FdMailbox, SharedRegion
from experts.transports.tls.identity import TlsIdentity
from experts.transports.weights import memory, ring
from experts.transports.weights.checksum import add_to_sums, new_sums
from experts.transports.weights.frames import ASK, HEAD, LOAN, PLACE, SENT, TAIL, WeightsHello
from experts.transports.weights.memory import LentSlot, MemoryOffer, PeerMemory, pid_namespace
from experts.transports.weights.pace import Pace
from experts.transports.weights.ring import RING_BYTES, RingEnd
from experts.transports.weights.staging import HostPieces

logger = logging.getLogger(__name__)

_CHECK_S = 0.05  # how often a wait looks whether the source is gone or the copy was called off


class SourceLostError(RuntimeError):
    """The source is gone or silent; nothing more will come over this connection."""


class NotCopiedError(RuntimeError):
    """This one expert did not come, or not whole; the connection is in order."""


class WeightsReader:
    """A connection to one shard that has experts. One thread uses it at a time."""

    def __init__(self, rank: int, connection: socket.socket, way: PeerMemory | RingEnd | None, stall_s: float) -> None:
        self.transport = "process" if isinstance(way, PeerMemory) else "shm" if way else "tcp"
        self._rank = rank
        self._connection = connection
        self._way = way
        self._stall_s = stall_s
        self._asked: deque[tuple[int, int]] = deque()
        self._untold = b""

    @classmethod
    def connect(
        cls,
        endpoint: ShardEndpoint,
        hello: WeightsHello,
        deadline_s: float,
        stall_s: float,
        secret: MeshSecret | None = None,
        tls: TlsIdentity | None = None,
    ) -> WeightsReader:
        """A connection to the shard at `endpoint`, before `deadline_s` (time.monotonic()).

        On one host "process", or "shm" if this process may not read the shard's; else "tcp". ShardError, OSError or
        ValueError says why there is none. After `stall_s` without a byte that was asked for, the source counts as lost.
        """
        warm_up()
        hello = replace(hello, incarnation=endpoint.incarnation)

        def opened() -> contextlib.AbstractContextManager[Control]:
            return _closed_on_error(open_control(endpoint, secret, deadline_s, READER, tls))

        if endpoint.host_id != host_id():
            with opened() as control:
                shake_hands(control, endpoint.rank, hello, deadline_s)
                return cls(endpoint.rank, control.socket, None, stall_s)
        with opened() as control:
            asking = replace(hello, pid=os.getpid(), pid_namespace=pid_namespace())
            offer = shake_hands(control, endpoint.rank, asking, deadline_s).get("memory")
            # The PID is the one that the controller knows, not one that an answer says.
            peer = PeerMemory(endpoint.pid, MemoryOffer(**offer)) if offer else None
            if peer is not None and peer.proven():
                return cls(endpoint.rank, control.socket, peer, stall_s)
        control.socket.close()
        logger.info("shard %d's memory cannot be read from here, so its experts come through a ring", endpoint.rank)
        with opened() as control, contextlib.closing(FdMailbox()) as mailbox:
            shake_hands(control, endpoint.rank, replace(hello, mailbox=mailbox.name), deadline_s)
            region = SharedRegion(mailbox.receive(deadline_s, count=1)[0], RING_BYTES)
            region.drop_descriptor()
            return cls(endpoint.rank, control.socket, RingEnd(region), stall_s)

    def ask(self, layer: int, expert: int) -> None:
        """Have an expert sent; `receive` takes them in the order asked, and first tells the source what was asked."""
        self._asked.append((layer, expert))
        self._untold += ASK.pack(layer, expert)

    def _tell(self) -> None:
        untold, self._untold = self._untold, b""
        try:
            self._connection.settimeout(self._stall_s)
            self._connection.sendall(untold)
        except OSError as error:
            raise SourceLostError(f"shard {self._rank}: {error}") from error

    def receive(self, views: list[torch.Tensor], pieces: HostPieces, pace: Pace) -> bytes:
        """Fill `views` with the expert asked for first; returns its digest, when what stands there has the right sum.

        NotCopiedError, SourceLostError, or CopyCancelledError, after which the connection is of no use either.
        """
        if self._untold:
            self._tell()
        asked, expected = self._asked.popleft(), sum(view.numel() for view in views)
        layer, expert, status, _, nbytes = HEAD.unpack(self._receive_exactly(HEAD.size, pace))
        if (layer, expert) != asked:
            raise SourceLostError(f"shard {self._rank} sent expert {expert} of layer {layer}, asked for {asked}")
        if status != SENT:
            raise NotCopiedError(f"shard {self._rank} does not hold it")
        if nbytes != expected:
            raise SourceLostError(f"shard {self._rank} sends {nbytes} bytes of an expert, expected {expected}")
        sums = new_sums()
        if isinstance(self._way, PeerMemory):
            (plain, weighted, digest), unchanged = self._read_lent(self._way, views, pieces, sums, pace)
        else:
            with contextlib.closing(pieces.incoming(views, pace.piece_bytes)) as incoming:
                for piece in incoming:
                    pace.take(len(piece))
                    self._fill(piece, sums, pace)
            status, _, plain, weighted, digest = TAIL.unpack(self._receive_exactly(TAIL.size, pace))
            unchanged = status == SENT
        if not unchanged:
            raise NotCopiedError(f"shard {self._rank} released it while it was copied")
        if (plain, weighted) != (int(sums[0]), int(sums[1])):
            raise NotCopiedError(f"what came from shard {self._rank} has another checksum")
        return bytes(digest)

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._connection.close()

    def _receive_exactly(self, nbytes: int, pace: Pace) -> bytes:
        data = np.empty(nbytes, np.uint8)
        self._fill_from_socket(data, pace)
        return data.tobytes()

    def _read_lent(
        self, peer: PeerMemory, views: list[torch.Tensor], pieces: HostPieces, sums: np.ndarray, pace: Pace
    ) -> tuple[tuple[int, int, bytes], bool]:
        """Fetch an expert out of the source's memory: what the source says of it, and whether it still stands there."""
        frames = self._receive_exactly(LOAN.size + PLACE.size * len(views), pace)
        counter, releases, count, _, *said = LOAN.unpack_from(frames)
        if count != len(views):
            raise SourceLostError(f"shard {self._rank} lends {count} views of an expert, expected {len(views)}")
        places = list(PLACE.iter_unpack(frames[LOAN.size :]))
        if [nbytes for _, nbytes in places] != [view.numel() for view in views]:
            raise SourceLostError(f"shard {self._rank} lends views of other sizes: {places}")
        lent = LentSlot(peer, places, counter, releases)
        try:
            with contextlib.closing(pieces.incoming(views, pace.piece_bytes)) as incoming:
                for piece in incoming:
                    pace.take(len(piece))
                    lent.read(piece, sums)
            unchanged = lent.unchanged()
        except OSError as error:
            raise SourceLostError(f"shard {self._rank}: {error}") from error
        if self.closed:
            raise SourceLostError(f"shard {self._rank} closed the connection")
        return (said[0], said[1], said[2]), unchanged

    def _fill(self, piece: np.ndarray, sums: np.ndarray, pace: Pace) -> None:
        if not isinstance(self._way, RingEnd):
            self._fill_from_socket(piece, pace)
            add_to_sums(int(piece.ctypes.data), len(piece), sums)
            return
        done, moved_s = 0, time.monotonic()
        while done < len(piece):
            got = self._way.read(piece[done:], sums, _CHECK_S)
            done += got
            if got:
                moved_s = time.monotonic()
            elif self.closed:
                raise SourceLostError(f"shard {self._rank} closed the connection")
            elif time.monotonic() > moved_s + self._stall_s:
                raise SourceLostError(f"nothing came from shard {self._rank} for {self._stall_s:g} s")
            pace.check()

    @property
    def closed(self) -> bool:
        """Whether the source has ended the connection. Never blocks."""
        poller = select.poll()
        poller.register(self._connection, select.POLLRDHUP)
        return bool(poller.poll(0))

    def _fill_from_socket(self, target: np.ndarray, pace: Pace) -> None:
        memory, done, moved_s = target.data, 0, time.monotonic()
        self._connection.settimeout(_CHECK_S)
        while done < len(target):
            try:
                got = self._connection.recv_into(memory[done:])
            except TimeoutError:
                if time.monotonic() > moved_s + self._stall_s:
                    raise SourceLostError(f"nothing came from shard {self._rank} for {self._stall_s:g} s") from None
                pace.check()
                continue
            except OSError as error:
                raise SourceLostError(f"shard {self._rank}: {error}") from error
            if not got:
                raise SourceLostError(f"shard {self._rank} closed the connection")
            done, moved_s = done + got, time.monotonic()


@contextlib.contextmanager
def _closed_on_error(control: Control) -> Iterator[Control]:
    try:
        yield control
    except BaseException:
        control.socket.close()
        raise


def warm_up() -> None:
    """Compile what copies use, or load it from the cache."""
    ring.warm_up()
    memory.warm_up()
