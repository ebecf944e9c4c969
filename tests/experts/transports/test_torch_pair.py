"""How long a router waits for rows whose frame has come."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from experts.protocol.wire import HEADER_BYTES
from experts.transports.control import Hello
from experts.transports.torch_groups import PairGroup
from experts.transports.torch_pair import _Pair


class Frames(PairGroup):
    """A message is there as soon as somebody waits for it."""

    def send(self, data: torch.Tensor) -> Any:
        return data

    def recv(self, into: torch.Tensor) -> Any:
        return into

    def wait(self, work: Any, deadline_s: float | None) -> None:
        return

    def join(self, work: Any, deadline_s: float | None) -> None:
        return

    def abort(self) -> None:
        return


class Rows(Frames):
    """Needs some time from the start of a receive on."""

    needs_s = 0.1

    def wait(self, work: Any, deadline_s: float | None) -> None:
        if deadline_s is not None and time.monotonic() + self.needs_s > deadline_s:
            raise TimeoutError


@pytest.mark.parametrize(("needs_s", "come"), [(0.1, True), (5.0, False)])
def test_rows_may_come_although_others_used_up_the_time(needs_s: float, come: bool) -> None:
    """The frame came in time, while the router still waited for a silent shard."""
    hello = Hello("r", "gloo_split", "x", "float32", 8, 2, 1, 4)
    pair = _Pair(hello, "cpu", 4096, 4096)
    frames, rows = Frames(), Rows()
    rows.needs_s = needs_s
    pair._frames, pair._rows = frames, rows
    pair.into.words[0], pair.into.words[1] = HEADER_BYTES, 64
    passed_s = time.monotonic() - 1.0
    if come:
        assert pair.receive(passed_s) == HEADER_BYTES + 64
    else:
        with pytest.raises(TimeoutError):
            pair.receive(passed_s)
