"""A shard's compute loop in this process: slots that change, kernels and pairs that break."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.kernels import KERNELS, ExpertKernel, KernelShape
from experts.protocol.wire import H_SEQ, H_STATUS, HEADER_BYTES, STATUS_OK, STATUS_REJECTED, error_text, header_of
from experts.shard.loop import ShardLoop
from experts.shard.slots import SlotTable
from experts.transports.base import ShardChannel
from experts.transports.shm import ShmDoorbell
from placement.placement import Placement
from tests.support.packed_request import HIDDEN, pack
from tests.support.small_mesh import write_checkpoint
from tests.support.waiting import await_true, join

NUM_LAYERS, NUM_EXPERTS = 2, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


class FakeChannel(ShardChannel):
    """A router in the same thread: one request at a time."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.recv_buffer = np.zeros(1 << 14, np.uint8)
        self.send_buffer = np.zeros(1 << 14, np.uint8)
        self.waiting = -1
        self.answers: list[int] = []
        self.broken: Exception | None = None

    def poll(self) -> int:
        nbytes, self.waiting = self.waiting, -1
        if nbytes >= 0 and self.broken is not None:
            raise self.broken
        return nbytes

    def reply(self, nbytes: int) -> None:
        self.answers.append(nbytes)

    def close(self) -> None:
        self.closed = True


class GatedKernel(ExpertKernel):
    """Writes the slot's stamp before and after a gate: two different stamps if the slot was refilled between them."""

    name = "gated"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        return None

    def __init__(self, shape: KernelShape) -> None:
        super().__init__(shape)
        self.stamps_LS = np.zeros((shape.num_layers, shape.num_slots))
        self.inside, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def _pack(self, layer: int, slot: int, weights: Any) -> None:
        self.stamps_LS[layer, slot] = float(weights.w13_2ID[0, 0])

    def _weight_tensors(self) -> list[torch.Tensor]:
        return []

    def forward(self, layer: int, rows_MD: Any, offsets: Any, slots_N: Any, weights_N: Any, out_MD: Any) -> None:
        if self.error is not None:
            raise self.error
        out_MD[:, 0] = self.stamps_LS[layer, slots_N[0]]
        self.inside.set()
        assert self.gate.wait(60)
        out_MD[:, 1] = self.stamps_LS[layer, slots_N[0]]


@pytest.fixture
def gated(model: Path) -> Iterator[tuple[ShardLoop, GatedKernel]]:
    """A loop with 3 slots in each layer, which hold experts 0 to 2."""
    checkpoint = ExpertCheckpoint.open(model)
    spec = checkpoint.spec
    shape = KernelShape(NUM_LAYERS, 3, HIDDEN, spec.intermediate_size, spec.activation)
    kernel = GatedKernel(shape)
    slots = SlotTable(checkpoint, kernel, 3, torch.float32)
    slots.load(Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2), 0)
    loop = ShardLoop(slots, kernel, ShmDoorbell(0), torch.float32, 1)
    loop.start()
    yield loop, kernel
    kernel.gate.set()
    loop.stop()


def post(loop: ShardLoop, channel: FakeChannel, seq: int, experts: list[int]) -> None:
    channel.waiting = pack(channel.recv_buffer, seq, experts)
    loop.bell.ring()


def test_a_slot_in_use_is_refilled_only_when_its_request_is_done(gated: tuple[ShardLoop, GatedKernel]) -> None:
    loop, kernel = gated
    channel = FakeChannel("router")
    loop.add(channel)
    kernel.inside.clear()
    kernel.gate.clear()
    stamp = kernel.stamps_LS[0, loop.slots.slot_of_expert_LE[0, 1]]
    post(loop, channel, 1, [1])
    assert kernel.inside.wait(60), "the request did not reach the kernel"
    other = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)
    assert loop.slots.release([(layer, expert) for layer in range(NUM_LAYERS) for expert in range(3)]) == 6
    loading = threading.Thread(target=loop.slots.load, args=(other, 1), daemon=True)
    loading.start()
    loading.join(0.05)
    assert loading.is_alive(), "the slot was refilled under the request"
    kernel.gate.set()
    join(loading, "the new placement to be loaded")
    await_true(lambda: channel.answers, "the answer")
    row = channel.send_buffer[HEADER_BYTES : HEADER_BYTES + 8].view(np.float32)
    np.testing.assert_array_equal(row, np.float32([stamp, stamp]))
    assert (loop.slots.slot_of_expert_LE >= 0).tolist() == [[False] * 3 + [True] * 3] * NUM_LAYERS


def test_a_kernel_that_fails_is_reported_to_the_sender_and_not_the_end(gated: tuple[ShardLoop, GatedKernel]) -> None:
    loop, kernel = gated
    channel = FakeChannel("router")
    loop.add(channel)
    kernel.error = RuntimeError("out of memory")
    post(loop, channel, 1, [0])
    await_true(lambda: len(channel.answers) == 1, "the error")
    assert header_of(channel.send_buffer)[H_STATUS] == STATUS_REJECTED
    assert error_text(channel.send_buffer) == "RuntimeError: out of memory"
    kernel.error = None
    post(loop, channel, 2, [0])
    await_true(lambda: len(channel.answers) == 2, "the answer")
    header = header_of(channel.send_buffer)
    assert (header[H_SEQ], header[H_STATUS]) == (2, STATUS_OK)


def test_failures_in_a_row_are_a_fault_until_a_request_succeeds(gated: tuple[ShardLoop, GatedKernel]) -> None:
    loop, kernel = gated
    channel = FakeChannel("router")
    loop.add(channel)

    def ask(experts: list[int], error: Exception | None) -> str | None:
        kernel.error = error
        count = len(channel.answers)
        post(loop, channel, count + 1, experts)
        await_true(lambda: len(channel.answers) > count, "the answer")
        return loop.fault

    broken = RuntimeError("CUDA error: an illegal memory access")
    for _ in range(4):
        assert ask([5], None) is None, "the router's mistake: expert 5 is not here"
    assert [ask([0], broken), ask([0], broken), ask([0], None)] == [None] * 3
    assert [ask([0], broken), ask([0], broken), ask([5], None)] == [None] * 3
    fault = ask([0], broken)
    assert fault is not None
    assert "RuntimeError: CUDA error: an illegal memory access" in fault
    assert ask([5], None) == fault
    assert ask([0], None) is None
    assert loop.alive


def test_a_lost_gpu_is_a_fault_at_once_whichever_call_meets_it(gated: tuple[ShardLoop, GatedKernel]) -> None:
    loop, _ = gated
    for error, is_fault in ((OSError("reset"), False), (torch.AcceleratorError("CUDA error: reset"), True)):
        channel = FakeChannel("router")
        channel.broken = error
        loop.add(channel)
        post(loop, channel, 1, [0])
        await_true(lambda channel=channel: channel.closed, "the pair's end")  # type: ignore[misc]
        assert (loop.fault is not None) == is_fault


def test_a_broken_pair_ends_its_own_service_alone(gated: tuple[ShardLoop, GatedKernel]) -> None:
    loop, _ = gated
    broken, sound = FakeChannel("broken"), FakeChannel("sound")
    broken.broken = OSError("connection reset")
    loop.add(broken)
    loop.add(sound)
    broken.waiting = 1
    post(loop, sound, 1, [0])
    await_true(lambda: sound.answers and broken.closed, "the sound router's answer")
    assert loop.alive
    assert "router broken: connection reset" in str(loop.counters.last_error)
    loop.remove(broken)
    assert loop.router_ids == ["sound"]


@pytest.mark.parametrize("held", [[0, 1, 2], []])
def test_an_empty_shard_is_warm_too(model: Path, held: list[int]) -> None:
    checkpoint = ExpertCheckpoint.open(model)
    kernel = KERNELS["torch_loop"](KernelShape(NUM_LAYERS, 3, HIDDEN, 40, checkpoint.spec.activation))
    slots = SlotTable(checkpoint, kernel, 3, torch.float32)
    row = held + [-1] * (3 - len(held))
    slots.load(Placement(1, 1, NUM_EXPERTS, np.array([row] * NUM_LAYERS, np.int32), partial=True), 0)
    ShardLoop(slots, kernel, ShmDoorbell(0), torch.float32, 1).warm_up()
    x_MD, one = torch.zeros(1, HIDDEN), torch.ones(1)
    arguments = (
        torch.tensor([0, 1], dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        one,
        torch.empty(1, HIDDEN),
    )
    with contextlib.nullcontext() if held else pytest.raises(ValueError, match="slot 0 holds no expert"):
        kernel.forward(0, x_MD, *arguments)


def test_the_digest_tells_other_weights_apart(model: Path, tmp_path: Path) -> None:
    def digest_of(folder: Path, rank: int = 0) -> str:
        placement = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)
        checkpoint = ExpertCheckpoint.open(folder)
        shape = KernelShape(NUM_LAYERS, 3, HIDDEN, 40, checkpoint.spec.activation)
        slots = SlotTable(checkpoint, GatedKernel(shape), 3, torch.float32)
        slots.load(placement, rank)
        return slots.digest()

    other = write_checkpoint(tmp_path / "other", seed=1)
    assert digest_of(model) == digest_of(model)
    assert len({digest_of(model), digest_of(model, 1), digest_of(other)}) == 3
