"""A pair in shared memory whose ends are C++ or Numba, in every combination: they agree on words and waits."""

from __future__ import annotations

import threading
import time

import pytest

from experts.native.library import data_plane
from experts.protocol.errors import ShardLostError, ShardTimeoutError
from experts.transports import shm
from experts.transports.shm import ShmDoorbell
from tests.support.shm_fakes import shm_pair
from tests.support.waiting import AWAIT_S, join

needs_compiler = pytest.mark.skipif(data_plane() is None, reason="no C++ compiler")
FORMS = [pytest.param("c++", marks=needs_compiler), "numba"]


@pytest.fixture(params=FORMS)
def router_form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FORMS)
def shard_form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("start", [0, 2**32 - 3])
def test_both_forms_speak_to_each_other(router_form: str, shard_form: str, start: int) -> None:
    """Past the end of the 32 bits of a request's number, too."""
    shm.warm_up()
    bell = ShmDoorbell(0)
    link, channel = shm_pair(0, bell, 4096, 4096)
    for end, form in ((link, router_form), (channel, shard_form)):
        if form == "numba":
            end._library = None
    link.native.seq = start
    channel.native.answered = channel.native.current = start
    link.region.bytes[:128].view("uint32")[[0, 16]] = start
    lengths: list[int] = []

    def serve() -> None:
        while len(lengths) < 8:
            bell.wait(1)
            nbytes = channel.poll()
            if nbytes >= 0:
                lengths.append(nbytes)
                channel.reply(nbytes + 1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    for number in range(8):
        link.post(100 + number)
        for _ in range(2):  # a reply that came is there as often as one asks
            assert link.wait(time.monotonic() + AWAIT_S) == 101 + number
    join(thread, "the shard's end")
    assert lengths == list(range(100, 108))
    link.post(1)
    with pytest.raises(ShardTimeoutError):
        link.wait(time.monotonic())
    channel.close()
    with pytest.raises(ShardLostError, match="closed the connection"):
        link.wait(time.monotonic() + AWAIT_S)
    link.close()
    for call in (lambda: link.post(1), lambda: link.wait(time.monotonic() + AWAIT_S)):
        with pytest.raises(ShardLostError, match="the link is closed"):
            call()
