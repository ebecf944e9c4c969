"""Refills of slots beside requests, on a made-up GPU that runs what was launched only when somebody waits for it.

And then it runs the stream first that was waited for, whatever else was launched before: the worst there may be.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from experts.shard.device_order import DeviceOrder, GpuOrder, order_on
from experts.shard.slots import SlotTable
from tests.support.noted_slots import HALVES, NotingKernel, Weights, table


class Stream:
    """Launched and not run yet."""

    def __init__(self) -> None:
        self.launched: list[Callable[[], None]] = []
        self.done = 0

    def run_to(self, end: int) -> None:
        while self.done < end:
            self.launched[self.done]()
            self.done += 1

    def synchronize(self) -> None:
        self.run_to(len(self.launched))


class LazyGpu:
    """What `GpuOrder` uses of torch.cuda."""

    def __init__(self) -> None:
        self.default = Stream()
        self.streams = [self.default]
        self.now = threading.local()

    def Stream(self, device: Any) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def Event(self) -> Any:
        class Event:
            def record(self, stream: Stream) -> None:
                self.stream, self.end = stream, len(stream.launched)

            def synchronize(self) -> None:
                self.stream.run_to(self.end)

        return Event()

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self.now, "stream", self.default)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.now.stream = before

    def launch(self, step: Callable[[], None]) -> None:
        self.current_stream().launched.append(step)


class LazyKernel(NotingKernel):
    """Slots in the memory of that GPU."""

    def __init__(self, gpu: LazyGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.memory: dict[tuple[int, int], float] = {}

    def set_slot(self, layer: int, slot: int, weights: Any) -> None:
        super().set_slot(layer, slot, weights)
        value = float(weights.w13_2ID.flatten()[0])
        self.gpu.launch(lambda: self.memory.__setitem__((layer, slot), value))


@pytest.fixture
def gpu() -> LazyGpu:
    return LazyGpu()


@pytest.fixture
def kernel(gpu: LazyGpu) -> LazyKernel:
    return LazyKernel(gpu)


@pytest.fixture
def slots(gpu: LazyGpu, kernel: LazyKernel) -> SlotTable:
    slots = table(kernel=kernel, weights=Weights({(0, 5): ("w13", 0)}))
    slots.order = GpuOrder("cuda", gpu)
    return slots


def test_a_request_that_the_gpu_has_yet_to_run_keeps_its_weights(
    gpu: LazyGpu, kernel: LazyKernel, slots: SlotTable
) -> None:
    slots.load(HALVES, 0)
    slot = int(slots.slot_of_expert_LE[0, 0])
    before = kernel.memory[0, slot]
    read: list[float] = []
    slots.begin_request()
    gpu.launch(lambda: read.append(kernel.memory[0, slot]))
    slots.end_request()  # the host is done with it, the GPU has not begun
    assert not read
    slots.release([(0, 0)])
    assert slots.reserve(0, 5) == slot
    slots.publish(0, 5, slot, slots.install(0, 5, slot))
    gpu.default.synchronize()
    assert read == [before]
    assert kernel.memory[0, slot] != before


def test_an_expert_is_in_its_slot_before_requests_can_find_it(
    gpu: LazyGpu, kernel: LazyKernel, slots: SlotTable
) -> None:
    found: list[bool] = []
    publish = slots.publish

    def looked_at(layer: int, expert: int, slot: int, digest: bytes) -> None:
        found.append((layer, slot) in kernel.memory)
        publish(layer, expert, slot, digest)

    slots.publish = looked_at  # type: ignore[method-assign]
    slots.load(HALVES, 0, num_threads=2)
    assert found == [True] * 6
    assert not gpu.default.launched, "requests wait for no copy"


def test_slots_are_not_written_before_they_were_zeroed(gpu: LazyGpu) -> None:
    steps: list[str] = []
    gpu.launch(lambda: steps.append("zeroed"))
    order = GpuOrder("cuda", gpu)
    order.await_noted()
    with order.writing():
        gpu.launch(lambda: steps.append("written"))
    assert steps == ["zeroed", "written"]


def test_a_write_that_fails_has_ended_before_the_slot_is_free(gpu: LazyGpu) -> None:
    order, steps = GpuOrder("cuda", gpu), []

    def fail() -> None:
        with order.writing():
            gpu.launch(lambda: steps.append("half"))
            raise OSError("the file ends here")

    with pytest.raises(OSError, match="ends here"):
        fail()
    assert steps == ["half"]


def test_a_gpu_that_fails_leaves_the_slot_free_and_the_request_ended(slots: SlotTable) -> None:
    class BrokenOrder(DeviceOrder):
        def note(self) -> None:
            raise RuntimeError("an illegal memory access")

        def await_noted(self) -> None:
            raise RuntimeError("an illegal memory access")

    free = slots.num_free
    slots.order = BrokenOrder()
    with pytest.raises(RuntimeError, match="illegal"):
        slots.reserve(0, 0)
    slots.begin_request()
    with pytest.raises(RuntimeError, match="illegal"):
        slots.end_request()
    assert (slots.num_free, slots.words.in_request, slots.requests_ended) == (free, 0, 1)


def test_a_cpu_needs_none_of_it() -> None:
    assert type(order_on("cpu")) is DeviceOrder
