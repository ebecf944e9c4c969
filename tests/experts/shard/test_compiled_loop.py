"""A shard's loop in C++ against its Python form: the same requests, the same bytes, whatever a router writes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.checkpoint import ExpertCheckpoint
from experts.kernels import KernelShape
from experts.kernels.native.kernel import NativeKernel
from experts.protocol.wire import (
    DTYPE_CODES,
    H_DTYPE,
    H_EPOCH,
    H_HIDDEN,
    H_LAYER,
    H_MAGIC,
    H_PAIRS,
    H_ROWS,
    H_SEQ,
    MAGIC,
    header_of,
    reply_capacity,
    request_capacity,
    request_layout,
)
from experts.shard.compiled import SERVED
from experts.shard.loop import ShardLoop
from experts.shard.slots import SlotTable
from experts.shard.turns import MAX_PASSED_OVER
from experts.transports.shm import ShmDoorbell, ShmRouterLink, ShmShardChannel
from placement.placement import Placement
from tests.support.kernel_cases import BASE
from tests.support.shm_fakes import shm_pair
from tests.support.small_mesh import write_checkpoint
from tests.support.waiting import AWAIT_S, await_true

pytestmark = pytest.mark.skipif(NativeKernel.supports(BASE) is not None, reason=str(NativeKernel.supports(BASE)))

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, MAX_ROWS = 2, 6, 3, 24, 300
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@dataclass
class Shard:
    """A loop that is not started yet, and routers."""

    loop: ShardLoop
    links: list[ShmRouterLink]
    channels: list[ShmShardChannel]

    def answers(self, requests: list[np.ndarray]) -> list[bytes]:
        """Of one request from each router, all posted before the loop looks."""
        for link, request in zip(self.links, requests, strict=False):
            link.send_buffer[: len(request)] = request
            link.post(len(request))
        if not self.loop.alive:
            self.loop.start()
        found = []
        for link, _ in zip(self.links, requests, strict=False):
            nbytes = link.wait(time.monotonic() + AWAIT_S)
            words = header_of(link.recv_buffer)[:10].tolist()
            # Words that a reply of this status does not write keep what was there.
            kept = (words[H_MAGIC], words[H_SEQ], words[8], words[H_ROWS] if words[8] == 0 else words[9])
            found.append(repr(kept).encode() + link.recv_buffer[128:nbytes].tobytes())
        return found


@contextlib.contextmanager
def shard_of(model: Path, dtype: torch.dtype, num_routers: int, compiled: bool = True) -> Iterator[Shard]:
    """It holds all experts but number 5."""
    checkpoint = ExpertCheckpoint.open(model)
    spec = checkpoint.spec
    kernel = NativeKernel(KernelShape(NUM_LAYERS, 5, HIDDEN, spec.intermediate_size, spec.activation, dtype=dtype))
    slots = SlotTable(checkpoint, kernel, 5, dtype)
    held = np.array([[0, 1, 2, 3, 4]] * NUM_LAYERS, np.int32)
    slots.load(Placement(1, 1, NUM_EXPERTS, held, partial=True), 0)
    bell = ShmDoorbell(0)
    loop = ShardLoop(slots, kernel, bell, dtype, 1, compiled)
    assert (loop._compiled is not None) == compiled
    row_bytes = HIDDEN * dtype.itemsize
    sizes = request_capacity(MAX_ROWS, TOP_K, row_bytes), reply_capacity(MAX_ROWS, row_bytes)
    pairs = [shm_pair(rank, bell, *sizes) for rank in range(num_routers)]
    for _, channel in pairs:
        loop.add(channel)
    try:
        yield Shard(loop, [link for link, _ in pairs], [channel for _, channel in pairs])
    finally:
        if loop.alive:
            loop.stop()
        for link, channel in pairs:
            link.close()
            channel.close()


def request_of(seq: int, layer: int, num_rows: int, dtype: torch.dtype, seed: int, experts: int = 5) -> np.ndarray:
    """Rows with 0 to 3 experts each, of the first `experts`."""
    random = np.random.default_rng(seed)
    counts = random.integers(0, TOP_K + 1, num_rows)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    num_pairs = int(offsets[-1])
    row_bytes = HIDDEN * dtype.itemsize
    offsets_at, experts_at, weights_at, rows_at, nbytes = request_layout(num_rows, num_pairs, row_bytes)
    buffer = np.zeros(nbytes, np.uint8)
    header = header_of(buffer)
    header[H_MAGIC], header[H_SEQ], header[H_LAYER], header[H_EPOCH] = MAGIC, seq, layer, 7
    header[H_ROWS], header[H_PAIRS], header[H_DTYPE], header[H_HIDDEN] = (
        num_rows, num_pairs, DTYPE_CODES[dtype], HIDDEN,
    )  # fmt: skip
    buffer[offsets_at : offsets_at + 4 * (num_rows + 1)].view(np.int32)[:] = offsets
    buffer[experts_at : experts_at + 4 * num_pairs].view(np.int32)[:] = random.integers(0, experts, num_pairs)
    buffer[weights_at : weights_at + 4 * num_pairs].view(np.float32)[:] = random.random(num_pairs)
    rows_MD = torch.from_numpy(random.standard_normal((num_rows, HIDDEN))).to(dtype)
    buffer[rows_at:] = rows_MD.flatten().view(torch.uint8).numpy()
    return buffer


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.sampled_from([0, 1, 2, 8, 40, 257]),
        st.sampled_from([5, 5, 5, 6]),
        # a word of the header, or an int32 of what follows, that is overwritten
        st.one_of(st.none(), st.tuples(st.integers(0, 63), st.sampled_from([-1, 0, 1, 2, 5, 6, 2**31 - 1, -(2**31)]))),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=REQUESTS, dtype=st.sampled_from([FLOAT32, BFLOAT16]), seed=st.integers(0, 1000))
def test_both_forms_answer_with_the_same_bytes(model: Path, drawn: list, dtype: torch.dtype, seed: int) -> None:
    requests = []
    for number, (layer, num_rows, experts, spoiled) in enumerate(drawn):
        request = request_of(number + 1, layer, num_rows, dtype, seed + number, experts)
        if spoiled is not None:
            word, value = spoiled
            if word < 16:
                header_of(request)[word] = value
            else:
                words = request[: len(request) // 4 * 4].view(np.int32)
                words[16 + word if 16 + word < len(words) else -1] = value
        requests.append(request)
    found, counted = [], []
    for compiled in (False, True):
        with shard_of(model, dtype, len(requests), compiled) as shard:
            found.append(shard.answers(requests))
            counters = shard.loop.counters
            counted.append((counters.requests, counters.rows, counters.pairs, counters.errors))
            assert shard.loop.fault is None
    assert found[1] == found[0]
    assert counted[1] == counted[0]


@pytest.mark.parametrize("compiled", [True, False])
def test_requests_that_wait_for_one_layer_are_computed_together(model: Path, compiled: bool) -> None:
    with shard_of(model, FLOAT32, 6, compiled) as shard:
        requests = [request_of(n + 1, layer, 8, FLOAT32, n) for n, layer in enumerate([0, 1, 0, 0, 1, 0])]
        shard.answers(requests)
        await_true(lambda: shard.loop.counters.requests == 6, "the counts")
        assert shard.loop.slots.requests_ended == 2, "one call of the kernel a layer"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_small_request_does_not_wait_for_many_rows_of_others(
    model: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 rows and 8: both alone, since together they are over the limit."""
    with shard_of(model, FLOAT32, 2, compiled) as shard:
        rows: list[int] = []
        forward = shard.loop.kernel.forward
        monkeypatch.setattr(shard.loop.kernel, "forward", lambda *a: (rows.append(len(a[1])), forward(*a)))
        shard.answers([request_of(1, 0, 300, FLOAT32, 1), request_of(2, 0, 8, FLOAT32, 2)])
        assert shard.loop.slots.requests_ended == 2 if compiled else rows == [300, 8]


def one_batch(shard: Shard, requests: list[np.ndarray]) -> list[int]:
    """Post what is not posted yet, answer one batch in this thread, and say whose requests were in it."""
    for link, channel, request in zip(shard.links, shard.channels, requests, strict=True):
        if channel.poll() < 0:
            link.send_buffer[: len(request)] = request
            link.post(len(request))
    loop = shard.loop
    if loop._compiled is None:
        loop._serve(loop._channels)
    else:
        loop._compiled.attend()
        assert loop._compiled.begin(loop._channels) == {}
        assert loop._compiled.serve(0) == SERVED
    answered = [number for number, channel in enumerate(shard.channels) if channel.poll() < 0]
    for number in answered:
        shard.links[number].wait(time.monotonic() + AWAIT_S)
    return answered


@pytest.mark.parametrize("compiled", [True, False])
def test_prompts_wait_for_routers_that_generate_but_not_for_ever(model: Path, compiled: bool) -> None:
    """All requests are for one layer; those of the two kinds are never computed together."""
    with shard_of(model, FLOAT32, 4, compiled) as shard:
        requests = [request_of(n + 1, 0, 8, FLOAT32, n) for n in range(4)]
        for number in (0, 2):
            shard.channels[number].defer()
        batches = [one_batch(shard, requests) for _ in range(2 * MAX_PASSED_OVER + 2)]
        assert batches == [*[[1, 3]] * MAX_PASSED_OVER, [0, 2]] * 2
        for number in (1, 3):
            shard.loop.remove(shard.channels[number])
        shard.links, shard.channels = shard.links[::2], shard.channels[::2]
        assert one_batch(shard, requests[::2]) == [0, 1], "nobody else is there to wait for"


@pytest.mark.parametrize("compiled", [True, False])
def test_without_pools_all_are_computed_together(model: Path, compiled: bool) -> None:
    with shard_of(model, FLOAT32, 3, compiled) as shard:
        requests = [request_of(n + 1, 0, 8, FLOAT32, n) for n in range(3)]
        assert [one_batch(shard, requests) for _ in range(3)] == [[0, 1, 2]] * 3


def test_a_call_for_several_that_fails_is_made_for_each(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with shard_of(model, FLOAT32, 3, compiled=False) as shard:
        requests = [request_of(n + 1, 0, rows, FLOAT32, n) for n, rows in enumerate([4, 5, 4])]
        expected = [shard.answers([request])[0] for request in requests[:1]]
        forward = shard.loop.kernel.forward

        def picky(layer: int, rows_MD: torch.Tensor, *rest: torch.Tensor) -> None:
            if len(rows_MD) > 4:
                raise RuntimeError(f"{len(rows_MD)} rows are too many")
            forward(layer, rows_MD, *rest)

        monkeypatch.setattr(shard.loop.kernel, "forward", picky)
        first, bad, last = shard.answers(requests)
        assert first == expected[0]
        assert b"5 rows are too many" in bad
        assert last.startswith(repr((MAGIC, 3, 0, 4)).encode())
        assert shard.loop.counters.errors == 1


def test_a_bad_request_does_not_spoil_those_beside_it(model: Path) -> None:
    with shard_of(model, FLOAT32, 3) as shard:
        requests = [request_of(n + 1, 0, 4, FLOAT32, n) for n in range(3)]
        alone = [shard.answers([requests[0]])[0]]
        header_of(requests[1])[H_LAYER] = NUM_LAYERS
        for _ in range(20):
            first, bad, last = shard.answers(requests)
            assert first == alone[0]
            assert b"this model has MoE layers 0 to 1" in bad
            assert last.startswith(repr((MAGIC, 3, 0, 4)).encode())
        assert shard.loop.counters.errors == 20


def test_a_router_that_leaves_and_one_that_comes(model: Path) -> None:
    with shard_of(model, FLOAT32, 2) as shard:
        requests = [request_of(n + 1, 0, 4, FLOAT32, n) for n in range(2)]
        expected = shard.answers(requests)
        shard.loop.remove(shard.channels[0])
        shard.channels[0].close()
        shard.links.pop(0)
        assert shard.answers(requests[1:]) == expected[1:]
        bell = shard.loop.bell
        assert isinstance(bell, ShmDoorbell)
        link, channel = shm_pair(9, bell, *(len(buffer) for buffer in (shard.links[0].send_buffer, requests[0])))
        del link
        shard.loop.add(channel)
        assert shard.answers(requests[1:]) == expected[1:]
        assert shard.loop.router_ids == ["router-1", "router-9"]
