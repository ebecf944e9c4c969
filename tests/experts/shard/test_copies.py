"""Copies between real shards: sources in processes that are killed, stopped, altered on the way; float64 decides."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from experts.protocol.membership import ShardEndpoint
from experts.protocol.orders import CopyResult
from experts.shard import mover as mover_module
from experts.shard.mover import ASKED_AHEAD
from experts.shard.server import ShardServer
from tests.support.copying_shards import (
    ALL,
    EXPERT_BYTES,
    PAIRS,
    SLOW,
    WAYS,
    check_right,
    copy,
    orders,
    server,
    ways_to,
)
from tests.support.small_mesh import (
    Shard,
    start_shards,
)
from tests.support.waiting import await_true


@pytest.mark.parametrize("transport", [*WAYS, "checkpoint"])
def test_an_empty_shard_is_filled_and_serves(
    model: Path, sources: dict[int, Shard], target: ShardServer, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert target.status().loaded_experts == 0
    source = ways_to(monkeypatch, transport)(sources[0].endpoint)
    given = () if transport == "checkpoint" else (source,)
    before = sources[0].status()
    results = copy(target, orders(*given))
    assert {(r.source, r.size_bytes, r.error) for r in results} == {(transport, EXPERT_BYTES, "")}
    status, after = target.status(), sources[0].status()
    assert (status.copies, status.copies_failed, status.copies_in_flight) == ({transport: len(PAIRS)}, 0, 0)
    assert status.copied_bytes == {transport: len(PAIRS) * EXPERT_BYTES}
    sent = 0 if transport == "checkpoint" else len(PAIRS)
    assert after.handed_out - before.handed_out == sent
    assert after.handed_out_bytes - before.handed_out_bytes == sent * EXPERT_BYTES
    assert status.weights_digest == after.weights_digest
    check_right(target, model)


def test_connections_are_kept_and_made_anew_when_the_source_ended_them(
    model: Path, target: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(model, 0) as source:
        assert source.endpoint is not None
        copy(target, orders(source.endpoint, pairs=PAIRS[:2]))
        assert target._mover is not None
        (first,) = target._mover._readers.values()
        copy(target, orders(source.endpoint, pairs=PAIRS[2:3]))
        assert list(target._mover._readers.values()) == [first]
        first._connection.shutdown(socket.SHUT_WR)  # which the source answers by ending it
        await_true(lambda: first.closed, "the connection's end")
        results = copy(target, orders(source.endpoint, pairs=PAIRS[3:]))
        assert {r.source for r in results} == {"process"}
    check_right(target, model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_source_that_dies_or_stops_in_mid_copy_is_followed_by_the_next(
    model: Path,
    sources: dict[int, Shard],
    target: ShardServer,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    fault: int,
) -> None:
    monkeypatch.setattr(mover_module, "STALL_S", 1.0)
    place = ways_to(monkeypatch, way)
    victim = start_shards(model, ALL, [0])[0]
    try:
        results: list[CopyResult] = []

        def strike(result: CopyResult) -> None:
            results.append(result)
            if len(results) == 2:
                victim.signal(fault)

        both = ASKED_AHEAD + 2  # more than can be under way, so the other source is needed
        wanted = orders(place(victim.endpoint), sources[1].endpoint, pairs=PAIRS[:both])
        wanted += orders(place(victim.endpoint), pairs=PAIRS[both:])
        target.copy(wanted, strike, max_bytes_per_s=20e6)
        assert [r.error for r in results] == [""] * len(PAIRS)
        assert {r.source for r in results[:2]} == {way}
        by_pair = {(r.layer, r.expert): r.source for r in results[2:]}
        # What was under way at that moment may have come still.
        assert {by_pair[pair] for pair in PAIRS[both:]} == {"checkpoint"}
        assert ("shm" if way == "shm" else "process") in {by_pair[pair] for pair in PAIRS[:both] if pair in by_pair}
    finally:
        victim.end()
    check_right(target, model)


class Flipper:
    """Stands between two shards and changes one bit of what the source sends, `at` bytes after the start."""

    def __init__(self, endpoint: ShardEndpoint, at: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._source = (endpoint.host, endpoint.port)
        self._at = at
        self.endpoint = dataclasses.replace(
            endpoint, host="127.0.0.1", port=self._server.getsockname()[1], host_id="elsewhere"
        )
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            reader, _ = self._server.accept()
            source = socket.create_connection(self._source)
            threading.Thread(target=self._pump, args=(reader, source, None), daemon=True).start()
            self._pump(source, reader, self._at)

    @staticmethod
    def _pump(from_: socket.socket, to: socket.socket, at: int | None) -> None:
        with contextlib.suppress(OSError):
            done = 0
            while data := bytearray(from_.recv(1 << 16)):
                if at is not None and done <= at < done + len(data):
                    data[at - done] ^= 16
                to.sendall(data)
                done += len(data)
            to.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._server.close()


@pytest.mark.parametrize("at", [200_000, EXPERT_BYTES + 300_000])
def test_a_bit_that_changes_on_the_way_is_noticed_and_the_expert_read_elsewhere(
    model: Path, sources: dict[int, Shard], target: ShardServer, at: int
) -> None:
    flipper = Flipper(sources[0].endpoint, at)
    try:
        results = copy(target, orders(flipper.endpoint))
    finally:
        flipper.close()
    spoiled = at // EXPERT_BYTES
    assert [r.source for r in sorted(results, key=lambda r: (r.layer, r.expert))] == [
        "checkpoint" if number == spoiled else "tcp" for number in range(len(PAIRS))
    ]
    check_right(target, model)


def test_a_source_that_gave_the_expert_up_is_followed_by_the_checkpoint(model: Path, target: ShardServer) -> None:
    with server(model, 0) as source:
        assert source.endpoint is not None
        assert source.release([(0, 1), (1, 4)]) == 2
        results = copy(target, orders(source.endpoint))
    expected = {pair: "checkpoint" if pair in ((0, 1), (1, 4)) else "process" for pair in PAIRS}
    assert {(r.layer, r.expert): r.source for r in results} == expected
    check_right(target, model)


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_is_released_and_overwritten_while_it_is_copied_is_not_taken(
    model: Path, target: ShardServer, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ways_to(monkeypatch, way)
    with server(model, 0) as source:
        assert source.endpoint is not None
        assert source._hand_out is not None
        lent: list[tuple[int, int]] = []
        lend = source._hand_out._lend

        def note(layer: int, expert: int) -> object:
            lent.append((layer, expert))
            return lend(layer, expert)

        source._hand_out._lend = note  # type: ignore[method-assign, assignment]
        overwritten = False

        def overwrite() -> bool:
            nonlocal overwritten
            if lent and not overwritten:
                overwritten = True
                slot = int(np.flatnonzero(source.held_Ls()[0] == 2)[0])
                assert source.release([(0, 2)]) == 1
                source._loop.slots.kernel.slot_views(0, slot)[0].fill_(7)  # type: ignore[union-attr]
            return False

        results: list[CopyResult] = []
        wanted = orders(place(source.endpoint), pairs=[(0, 2)])
        target.copy(wanted, results.append, max_bytes_per_s=SLOW, cancelled=overwrite)
        assert overwritten
        # TCP's buffers may have held all of it before.
        taken = {"checkpoint", "tcp"} if way == "tcp" else {"checkpoint"}
        assert {r.source for r in results} <= taken
        copy(target, orders(source.endpoint))
    check_right(target, model)


def test_a_slot_that_is_filled_anew_has_another_checksum(model: Path, target: ShardServer) -> None:
    """The source sums up a slot once for all readers that read its memory."""
    with server(model, 0) as source, server(model, 2) as other:
        assert source.endpoint is not None
        pairs = [(0, 1), (0, 2)]
        wanted = orders(source.endpoint, pairs=pairs)
        assert {r.source for r in copy(other, wanted)} == {"process"}
        before = source.held_Ls()[0].tolist()
        source.release(pairs)
        copy(source, orders(pairs=pairs[::-1]))
        assert source.held_Ls()[0].tolist() != before, "they stand in each other's slots"
        assert {r.source for r in copy(target, wanted)} == {"process"}
        copy(target, orders())
    check_right(target, model)


def test_a_slot_that_changes_without_a_release_is_noticed(model: Path, target: ShardServer) -> None:
    with server(model, 0) as source, server(model, 2) as other:
        assert source.endpoint is not None
        wanted = orders(source.endpoint, pairs=[(0, 2)])
        assert {r.source for r in copy(other, wanted)} == {"process"}
        slot = int(np.flatnonzero(source.held_Ls()[0] == 2)[0])
        source._loop.slots.kernel.slot_views(0, slot)[0][12345] ^= 4  # type: ignore[union-attr]
        assert {r.source for r in copy(target, wanted)} == {"checkpoint"}
        copy(target, orders())
    check_right(target, model)
