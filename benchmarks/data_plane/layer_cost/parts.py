"""The parts of a layer, each timed alone, and shards to time whole layers on: for `benchmarks.data_plane.layer_cost`.

T tokens, M rows of a call, K experts of a token, L layers, E experts.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import loopback_dispatcher
from experts.kernels import KernelShape
from experts.kernels.native.kernel import NativeKernel
from experts.model.spec import ActivationSpec, ExpertWeights
from experts.native.library import data_plane
from experts.native.structs import NativeSlotWords
from experts.protocol.membership import Membership, ShardEndpoint, host_id
from experts.shard.loop import ShardLoop
from experts.transports.base import RouterLink
from experts.transports.connect import connect, open_shard_channel
from experts.transports.control import Hello
from experts.transports.control_port.listener import ControlListener
from experts.transports.shm import ShmDoorbell
from placement.placement import Placement
from placement.topology import Link

LIMIT_S = 30.0
SPIN_US = 50.0
BLOCKS = 4
KERNEL_CALLS = ((1, 4), (2, 4), (4, 4), (8, 1), (8, 4), (32, 4), (64, 1), (128, 2), (256, 4))  # rows, experts of a row
ROUTER_CALLS = ((1, 1), (1, 4), (8, 1), (8, 4), (32, 1), (32, 4), (128, 1), (128, 4))  # tokens, shards
DRAWS = 6  # sets of tokens that take turns, so that no cache has the weights of a few experts
SMALL_BYTES, LARGE_BYTES = 128, 1 << 18


@dataclass(frozen=True)
class Shape:
    """A model's routed experts, in float32."""

    hidden: int
    width: int
    num_experts: int
    top_k: int
    num_layers: int

    def layers(self) -> LayerShape:
        """As the data plane takes it."""
        return LayerShape(self.num_layers, self.num_experts, self.top_k, self.hidden, torch.float32)


def low(times: Sequence[float]) -> float:
    """What a tenth of the samples stays below: other load only adds to a time."""
    return float(np.quantile(times, 0.1))


def random_ids(shape: Shape, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """int32 [T, L, K], distinct experts."""
    scores = rng.random((tokens, shape.num_layers, shape.num_experts))
    return scores.argsort(axis=2)[:, :, : shape.top_k].astype(np.int32)


def make_kernel(shape: Shape) -> NativeKernel:
    """Random weights in all slots."""
    kernel = NativeKernel(
        KernelShape(shape.num_layers, shape.num_experts, shape.hidden, shape.width, ActivationSpec("silu"))
    )
    w13, w2 = torch.randn(2 * shape.width, shape.hidden), torch.randn(shape.hidden, shape.width)
    weights = ExpertWeights(w13 / shape.hidden**0.5, w2 / shape.width**0.5)
    for layer in range(shape.num_layers):
        for slot in range(shape.num_experts):
            kernel.set_slot(layer, slot, weights)
    return kernel


def _take_turns(calls: Sequence[Callable[[int], None]], seconds: float, clock: Callable[[], float]) -> list[float]:
    """Seconds of each call, in blocks that take turns, so that what else runs on the machine harms all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(BLOCKS):
        for call, into in zip(calls, times, strict=True):
            until_s, of_block = time.perf_counter() + seconds / BLOCKS / len(calls), 0
            while of_block < 4 or time.perf_counter() < until_s:
                start_s = clock()
                call(len(into))
                into.append(clock() - start_s)
                of_block += 1
    return [low(each) for each in times]


def _fit(terms: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Factors of the terms, none negative, with the least relative errors."""
    seconds = np.array(times)
    factors, _ = nnls(np.array(terms) / seconds[:, None], np.ones(len(seconds)))
    return [max(float(factor), 1e-12) for factor in factors]


def fit_kernel(shape: Shape, kernel: NativeKernel, seconds: float, rng: np.random.Generator) -> dict[str, float]:
    """call_s, row_s, memory_bytes_per_s and flops_per_s, from the kernel's own calls on this thread.

    A shard calls it without Python, whose time is that of a call with nothing to compute.
    """
    layers = itertools.cycle(range(shape.num_layers))  # no call finds what the last one read
    row_1D, offsets_2 = torch.randn(1, shape.hidden), torch.zeros(2, dtype=torch.int32)
    slots_0, weights_0, out_1D = torch.zeros(0, dtype=torch.int32), torch.zeros(0), torch.empty_like(row_1D)
    terms, calls = [], [lambda turn: kernel.forward(0, row_1D, offsets_2, slots_0, weights_0, out_1D)]
    for rows, experts in KERNEL_CALLS:
        x_MD = torch.randn(rows, shape.hidden)
        out_MD = torch.empty_like(x_MD)
        slots_CN = [
            torch.from_numpy(rng.random((rows, shape.num_experts)).argsort(1)[:, :experts].astype(np.int32).ravel())
            for _ in range(DRAWS * shape.num_layers)
        ]
        offsets, weights = torch.arange(rows + 1, dtype=torch.int32) * experts, torch.rand(rows * experts)

        def call(turn: int, at: Any = (slots_CN, x_MD, out_MD, offsets, weights)) -> None:
            slots_CN, x_MD, out_MD, offsets, weights = at
            slots_N = slots_CN[turn % len(slots_CN)]
            kernel.forward(next(layers), x_MD, offsets, slots_N, weights, out_MD)

        activated = float(np.mean([len(slots.unique()) for slots in slots_CN]))
        terms.append((1.0, rows, activated, rows * experts))
        calls.append(call)
    python_s, *times = _take_turns(calls, seconds, time.thread_time)
    call_s, row_s, expert_s, pair_s = _fit(terms, [max(spent_s - python_s, 1e-7) for spent_s in times])
    size = shape.hidden * shape.width
    return {
        "call_s": call_s, "row_s": row_s, "memory_bytes_per_s": 3 * 4 * size / expert_s,
        "flops_per_s": 6 * size / pair_s,
    }  # fmt: skip


def fit_router(shape: Shape, seconds: float, rng: np.random.Generator) -> dict[str, float]:
    """router_s, router_token_s and router_row_s, from links that answer immediately."""
    terms, calls = [], []
    for tokens, shards in ROUTER_CALLS:
        dispatcher = loopback_dispatcher(shape.layers(), shards, tokens)
        ids_TK = torch.from_numpy(random_ids(shape, tokens, rng)[:, 0].copy())
        x_TD, weights_TK = torch.randn(tokens, shape.hidden), torch.rand(tokens, shape.top_k)
        ranks_TK = ids_TK.numpy() // (shape.num_experts // shards)
        rows = sum(len(set(row)) for row in ranks_TK.tolist())

        def call(turn: int, at: Any = (dispatcher, x_TD, weights_TK, ids_TK)) -> None:
            dispatcher, x_TD, weights_TK, ids_TK = at
            dispatcher.forward(0, x_TD, weights_TK, ids_TK)

        terms.append((1.0, tokens, rows))
        calls.append(call)
    router_s, token_s, row_s = _fit(terms, _take_turns(calls, seconds, time.perf_counter))
    return {"router_s": router_s, "router_token_s": token_s, "router_row_s": row_s}


def fit_link(transport: str, seconds: float) -> Link:
    """A pair's latency and rate: its round trips, less the copies into and out of its buffers."""
    bell, channels = ShmDoorbell(SPIN_US), []  # type: ignore[var-annotated]
    listener = ControlListener(
        "127.0.0.1", lambda h, l: open_shard_channel(h, l, bell, "cpu", 0), channels.append, channels.remove, LIMIT_S
    )
    endpoint = ShardEndpoint(0, "x", "127.0.0.1", listener.port, host_id(), os.getpid())
    hello = Hello("bench", transport, "x", "float32", 64, 1, 1, LARGE_BYTES // 256)
    link: RouterLink = connect(endpoint, hello, "cpu", SPIN_US, time.monotonic() + LIMIT_S)
    ended = threading.Event()
    peer = threading.Thread(target=_echo, args=(bell, channels, ended))
    peer.start()
    own_bytes = np.ones(LARGE_BYTES, np.uint8)
    beside = np.empty(LARGE_BYTES, np.uint8)

    def less_copies_s(nbytes: int) -> float:
        def round_trip(turn: int) -> None:
            link.send_buffer[:nbytes] = own_bytes[:nbytes]
            link.post(nbytes)
            link.wait(time.monotonic() + LIMIT_S)
            own_bytes[:nbytes] = link.recv_buffer[:nbytes]

        def copies(turn: int) -> None:
            beside[:nbytes] = own_bytes[:nbytes]
            own_bytes[:nbytes] = beside[:nbytes]

        whole_s, copies_s = _take_turns([round_trip, copies], seconds / 2, time.perf_counter)
        return max(whole_s - copies_s, 1e-7)

    small_s, large_s = less_copies_s(SMALL_BYTES), less_copies_s(LARGE_BYTES)
    ended.set()
    peer.join()
    link.close()
    listener.stop()
    rate = 2 * (LARGE_BYTES - SMALL_BYTES) / max(large_s - small_s, 1e-7)
    return Link(bandwidth_bytes_per_s=rate, latency_s=small_s / 2)


def _echo(bell: ShmDoorbell, channels: list[Any], ended: threading.Event) -> None:
    library = data_plane()
    if library is None:
        raise RuntimeError("the compiled data plane is missing; this benchmark measures nothing else")
    while not ended.is_set():
        native = [channel.native for channel in channels]
        table = (ctypes.c_void_p * len(native))(*map(ctypes.addressof, native))
        library.data_plane_echo(bell.region.address, bell.native_sockets, table, len(native), bell.spin_ns, 50_000_000)


class Shards:
    """Shards on threads of this process, one for each kernel, which no two threads may share. A context manager."""

    def __init__(self, shape: Shape, kernels: Sequence[NativeKernel], transport: str) -> None:
        self._shape, self._transport = shape, transport
        self._loops, self._listeners, self._links, endpoints = [], [], [], []  # type: ignore[var-annotated]
        slot_table = np.arange(shape.num_experts, dtype=np.int32)[None].repeat(shape.num_layers, 0)
        for rank, kernel in enumerate(kernels):
            slots = SimpleNamespace(
                begin_request=lambda: None,
                end_request=lambda: None,
                slot_of_expert_LE=slot_table,
                words=NativeSlotWords(slot_of_expert_LE=slot_table.ctypes.data),
                checkpoint=SimpleNamespace(spec=SimpleNamespace(hidden_size=shape.hidden)),
            )
            bell = ShmDoorbell(SPIN_US)
            loop = ShardLoop(slots, kernel, bell, torch.float32, 1)  # type: ignore[arg-type]
            loop.start()
            listener = ControlListener(
                "127.0.0.1",
                lambda hello, line, bell=bell: open_shard_channel(hello, line, bell, "cpu", 0),
                loop.add,
                loop.remove,
                LIMIT_S,
            )
            self._loops.append(loop)
            self._listeners.append(listener)
            endpoints.append(ShardEndpoint(rank, "x", "127.0.0.1", listener.port, host_id(), os.getpid()))
        placement = Placement.linear(shape.num_layers, shape.num_experts, len(kernels))
        self._membership = Membership(1, placement, tuple(endpoints))

    def dispatcher(self, max_rows: int) -> Dispatcher:
        """A router's, with a pair to each shard."""
        shape = self._shape
        name = f"bench-{len(self._links)}"
        hello = Hello(
            name, self._transport, "x", "float32", shape.hidden, shape.top_k, shape.num_layers, max_rows
        )  # fmt: skip
        dispatcher = Dispatcher(shape.layers(), max_rows, LIMIT_S, fallback=None)
        links = {
            endpoint.rank: connect(endpoint, hello, "cpu", SPIN_US, time.monotonic() + LIMIT_S)
            for endpoint in self._membership.endpoints
            if endpoint is not None
        }
        self._links += links.values()
        dispatcher.apply(self._membership, links, {})
        return dispatcher

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exc: object) -> None:
        for link in self._links:
            link.close()
        for listener in self._listeners:
            listener.stop()
        for loop in self._loops:
            loop.stop()
