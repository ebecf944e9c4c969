"""Slots in pinned host memory, with a made-up GPU that notes what its streams are asked for and copies at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from experts.kernels.offload import PinnedBacking

VIEW_BYTES = [24, 5]
SLOTS = [(0, 1), (1, 2), (1, 0)]


class Gpu:
    """What `PinnedBacking` uses of torch.cuda."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.current = "default"

    def Stream(self, device: Any) -> Any:
        gpu = self

        class Stream:
            def wait_event(self, event: Any) -> None:
                gpu.asked.append(("wait", event.noted))

            def synchronize(self) -> None:
                gpu.asked.append(("synchronize", self))

        return Stream()

    def Event(self) -> Any:
        class Event:
            noted = 0

            def record(self, stream: Any) -> None:
                assert stream == "default", "where the kernel is launched"
                self.noted += 1

        return Event()

    def current_stream(self, device: Any) -> Any:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.current = stream
        try:
            yield
        finally:
            self.current = "default"


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def backing(gpu: Gpu) -> PinnedBacking:
    backing = PinnedBacking("cuda", 2, 3, VIEW_BYTES, cuda=gpu)
    for number, (layer, slot) in enumerate(SLOTS):
        for view in backing.views(layer, slot):
            view.copy_(torch.arange(len(view)) + 10 * number)
    return backing


def places(count: int) -> list[list[torch.Tensor]]:
    return [[torch.zeros(nbytes, dtype=torch.uint8) for nbytes in VIEW_BYTES] for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_copies_are_queued_behind_the_last_call_and_awaited_once(gpu: Gpu, backing: PinnedBacking, count: int) -> None:
    targets = places(count)
    backing.note()
    backing.copy(SLOTS[:count], targets)
    assert [what for what, _ in gpu.asked] == ["wait", "synchronize"]
    assert gpu.asked[0] == ("wait", 2), "the start is noted, too"
    for slot, views in zip(SLOTS, targets, strict=False):
        assert all(map(torch.equal, views, backing.views(*slot)))
    backing.close()


def test_what_was_queued_before_an_error_has_ended_after_it(gpu: Gpu, backing: PinnedBacking) -> None:
    """Else a place that is given away would be written to."""
    targets = places(2)
    targets[1][0] = torch.zeros(VIEW_BYTES[0] + 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size"):
        backing.copy(SLOTS[:2], targets)
    assert gpu.asked[-1][0] == "synchronize"
    assert gpu.current == "default"


def test_threads_have_streams_of_their_own(gpu: Gpu, backing: PinnedBacking) -> None:
    backing.copy(SLOTS[:1], places(1))
    thread = threading.Thread(target=backing.copy, args=(SLOTS[1:2], places(1)))
    thread.start()
    thread.join(60)
    backing.copy(SLOTS[2:], places(1))
    first, other, again = (stream for what, stream in gpu.asked if what == "synchronize")
    assert first is again is not other
