"""The store through which the two ends of a torch pair meet."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from experts.transports.rendezvous import Meeting, PairStore, connect_to_meeting
from tests.support.echo_shard import deadline_in
from tests.support.waiting import join

LONG_S = 30.0


def pair() -> tuple[PairStore, PairStore]:
    one, other = socket.socketpair()
    return PairStore(one, deadline_in(LONG_S)), PairStore(other, deadline_in(LONG_S))


def test_both_ends_have_what_either_sets() -> None:
    router, shard = pair()
    router.set("a", b"1")
    router.set("empty", b"")
    shard.set("b", "2")
    assert shard.get("empty") == b""
    assert (shard.get("a"), shard.get("b"), router.get("b"), router.get("a")) == (b"1", b"2", b"2", b"1")
    router.wait(["a", "b"])


def test_waits_end_at_the_deadline_and_when_the_other_end_leaves() -> None:
    one, other = socket.socketpair()
    store = PairStore(one, deadline_in(0.05))
    with pytest.raises(TimeoutError):
        store.get("never")
    router, shard = pair()
    shard.close()
    with pytest.raises(ConnectionError, match="left before it was open"):
        router.get("never")
    other.close()


def test_nonsense_is_an_error() -> None:
    one, other = socket.socketpair()
    other.sendall(b"\xff" * 8)
    with pytest.raises(ConnectionError, match="a rendezvous message of 4294967295"):
        PairStore(one, deadline_in(LONG_S)).get("a")


def test_strangers_are_passed_over() -> None:
    meeting = Meeting("127.0.0.1")
    details = meeting.details()
    stores: list[Any] = []
    accepting = threading.Thread(target=lambda: stores.append(meeting.accept(deadline_in(LONG_S))), daemon=True)
    accepting.start()
    socket.create_connection(("127.0.0.1", details["meeting_port"])).close()
    stranger = connect_to_meeting("127.0.0.1", {**details, "meeting_token": "0" * 32}, deadline_in(LONG_S))
    with pytest.raises(ConnectionError):
        stranger.get("anything")
    router = connect_to_meeting("127.0.0.1", details, deadline_in(LONG_S))
    join(accepting, "the router to be accepted")
    router.set("a", b"1")
    assert stores[0].get("a") == b"1"
    router.close()
    stores[0].close()


def test_closing_a_meeting_ends_the_wait_for_the_router() -> None:
    meeting = Meeting("127.0.0.1")
    errors: list[BaseException] = []

    def accept() -> None:
        try:
            meeting.accept(deadline_in(3600))
        except OSError as error:
            errors.append(error)

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    meeting.close()
    meeting.close()
    join(accepting, "the wait to end with the meeting")
    assert len(errors) == 1


def test_silent_strangers_do_not_keep_the_router_out() -> None:
    meeting = Meeting("127.0.0.1")
    details = meeting.details()
    stores: list[Any] = []
    accepting = threading.Thread(target=lambda: stores.append(meeting.accept(deadline_in(LONG_S))), daemon=True)
    accepting.start()
    silent = [socket.create_connection(("127.0.0.1", details["meeting_port"]), timeout=LONG_S) for _ in range(40)]
    for connection in silent[::3]:
        connection.sendall(b"half of a token")
    router = connect_to_meeting("127.0.0.1", details, deadline_in(LONG_S))
    router.set("a", b"1")
    join(accepting, "the router's coming")
    assert stores[0].get("a") == b"1"
    for connection in silent:
        assert connection.recv(1) == b"", "the meeting is over for them"


def test_a_meeting_that_nobody_comes_to_ends() -> None:
    meeting = Meeting("127.0.0.1")
    with socket.create_connection(("127.0.0.1", meeting.details()["meeting_port"]), timeout=LONG_S) as silent:
        with pytest.raises(TimeoutError, match="did not come to the meeting"):
            meeting.accept(deadline_in(0.05))
        assert silent.recv(1) == b""
    closed = Meeting("127.0.0.1")
    closed.close()
    with pytest.raises((OSError, ValueError)):
        closed.accept(deadline_in(LONG_S))
