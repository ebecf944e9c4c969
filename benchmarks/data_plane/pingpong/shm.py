"""Sides of the ping-pong in shared memory: the barest exchange, from Python and without, and a link without Python."""

from __future__ import annotations

import ctypes

import numpy as np

from benchmarks.data_plane.pingpong.peers import CAPACITY, SPIN_US, Peer, Turn, timed
from experts.native.library import data_plane
from experts.transports import atomics
from experts.transports.base import RouterLink
from experts.transports.shared_region import SharedRegion
from placement.compiled import compiled

COMPILED = "shm c++"
_PAGE = 4096
# How far into their pages the bare side's buffers begin: the C library's copies between addresses that are equal but
# for a few bytes in their pages are ten times slower on some AMD processors.
_APART = 256
PING, PONG, PEER_SLEEPS, OWN_SLEEPS = 0, 64, 128, 192


@compiled()
def _shm_peer(address: int, spin_ns: int) -> None:
    """Answer pings 1, 2, 3, ... until 0xFFFFFFFF."""
    seen = 0
    while True:
        value = atomics.wait_while_equal(address + PING, address + PEER_SLEEPS, seen, spin_ns, 10_000_000_000)
        if value == 0xFFFFFFFF:
            return
        if value != seen:
            seen = value
            atomics.publish(address + PONG, seen, address + OWN_SLEEPS)


@compiled()
def _shm_turn(address: int, seq: int, spin_ns: int) -> None:
    """One ping and its pong."""
    atomics.publish(address + PING, seq, address + PEER_SLEEPS)
    atomics.wait_while_equal(address + PONG, address + OWN_SLEEPS, seq - 1, spin_ns, 60_000_000_000)


def answer(mode: str, descriptor: int) -> None:
    """A peer's part of the bare exchange, until it is killed."""
    region, library = SharedRegion(descriptor, _PAGE + 2 * CAPACITY), data_plane()
    spin_ns = int(SPIN_US * 1000)
    if mode != COMPILED:
        _shm_peer(region.address, spin_ns)
    elif library is not None:
        library.data_plane_answer(region.address, spin_ns)


def bare_shm_turns(prefix: list[str], host: str) -> tuple[Turn, Peer]:
    """Turns of two compiled loops."""
    region = SharedRegion.create(_PAGE + 2 * CAPACITY, "bench")
    peer = Peer("shm", prefix, host, region.descriptor)
    out, back = region.bytes[_PAGE + _APART :][:CAPACITY], region.bytes[_PAGE + _APART + CAPACITY :]
    payload, landing = np.ones(CAPACITY, np.uint8), np.zeros(CAPACITY, np.uint8)
    seq = 0

    def turn(nbytes: int, count: int) -> list[float]:
        def round_trip(last: bool) -> None:
            nonlocal seq
            seq += 1
            out[:nbytes] = payload[:nbytes]
            _shm_turn(region.address, seq, int(SPIN_US * 1000))
            landing[:nbytes] = back[:nbytes]

        return timed(round_trip, count)

    return turn, peer


def compiled_turns(link: RouterLink, peer: Peer, prefix: list[str], host: str) -> list[tuple[str, Turn, Peer]]:
    """Turns of a link and of the bare exchange, both without Python."""
    library = data_plane()
    assert library is not None, "the caller asks first"
    region = SharedRegion.create(_PAGE + 2 * CAPACITY, "bench")
    bare_peer = Peer(COMPILED, prefix, host, region.descriptor)
    payload, landing = np.ones(CAPACITY, np.uint8), np.zeros(CAPACITY, np.uint8)
    seq = 1

    def copies() -> tuple[int, int]:
        return payload.ctypes.data, landing.ctypes.data

    def over_link(nbytes: int, count: int) -> list[float]:
        times = np.zeros(count, np.int64)
        assert link.native is not None
        done = library.data_plane_ping_link(ctypes.addressof(link.native), *copies(), nbytes, count, times.ctypes.data)
        assert done == count, "a shard did not answer"
        return (times / 1000).tolist()

    def bare(nbytes: int, count: int) -> list[float]:
        nonlocal seq
        times = np.zeros(count, np.int64)
        out = region.address + _PAGE + _APART
        back = out + CAPACITY
        spin_ns = int(SPIN_US * 1000)
        library.data_plane_ping(region.address, out, back, seq, *copies(), nbytes, spin_ns, count, times.ctypes.data)
        seq += count
        return (times / 1000).tolist()

    return [("link", over_link, peer), ("bare", bare, bare_peer)]
