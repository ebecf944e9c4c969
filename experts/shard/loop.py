"""The compute loop of a shard: wait for the bell, take a request, compute, reply. One thread serves all routers.

Legend: M rows, D hidden size.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from experts.kernels import ExpertKernel
from experts.native.structs import NativeShardCounts
from experts.protocol.router_names import router_of
from experts.protocol.wire import (
    DTYPE_CODES,
    H_COMPUTE_NS,
    H_HINTS,
    H_LAYER,
    H_MAGIC,
    H_ROWS,
    H_SEQ,
    H_STATUS,
    HEADER_BYTES,
    MAGIC,
    STATUS_OK,
    error_reply,
    header_of,
    no_slot_reply,
)
from experts.shard.batch import Work, batches, compute
from experts.shard.compiled import SERVED, CompiledLoop, compiled_loop
from experts.shard.request import BadRequestError, NoSlotError, Request, read_request, warm_up
from experts.shard.slots import SlotTable
from experts.shard.turns import Turns
from experts.transports.base import Doorbell, ShardChannel
from experts.transports.devices import use_device

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.5
_FAILURES_IN_A_ROW = 3


@dataclass
class ShardCounters:
    """What a shard has done since it started; `native` is written by compiled code too."""

    native: NativeShardCounts = field(default_factory=lambda: NativeShardCounts(last_epoch=-1))
    errors: int = 0
    last_error: str | None = None

    def __getattr__(self, name: str) -> int:
        """requests, rows, pairs, compute_ns, last_epoch."""
        return int(getattr(self.native, name))

    def add(self, request: Request, spent_ns: int) -> None:
        """Count an answered request."""
        native = self.native
        native.requests += 1
        native.rows += request.num_rows
        native.pairs += len(request.slots_N)
        native.compute_ns += spent_ns
        native.last_epoch = request.epoch


@dataclass
class _Views:
    """Torch views of one channel's buffers, made once."""

    recv: torch.Tensor
    send: torch.Tensor

    @classmethod
    def of(cls, channel: ShardChannel) -> _Views:
        """Views of the host buffers."""
        return cls(torch.from_numpy(channel.recv_buffer), torch.from_numpy(channel.send_buffer))


def telling_sizes(most_pairs: int) -> list[int]:
    """Numbers of pairs, ascending to `most_pairs`, that meet every program that a kernel chooses by that number.

    Our kernels choose by powers of two. vLLM's take the tuned size that is nearest: 2^n, 3 * 2^n, multiples of 256 or,
    beyond 4096, of 1024.
    """
    powers = [1 << n for n in range(most_pairs.bit_length())]
    found = {most_pairs, *powers, *(3 * power for power in powers), *range(256, 4096, 256)}
    return sorted(size for size in found.union(range(4096, most_pairs, 1024)) if size <= most_pairs)


@dataclass
class ShardLoop:
    """Answers each channel that has a request, in turn, until stopped."""

    slots: SlotTable
    kernel: ExpertKernel
    bell: Doorbell
    dtype: torch.dtype
    num_threads: int
    compiled: bool = True
    """Use C++ for pairs and kernels that have it; False is for comparing the two."""
    top_k: int | None = None  # most experts of a row; None: not checked
    device: str = "cpu"  # the kernel's
    counters: ShardCounters = field(default_factory=ShardCounters)

    def __post_init__(self) -> None:
        self._channels: dict[ShardChannel, _Views] = {}
        self._turns = Turns()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard-compute", daemon=True)
        self._hidden_size = self.slots.checkpoint.spec.hidden_size
        self._row_bytes = self._hidden_size * self.dtype.itemsize
        self._failures = 0  # without an answered request between them
        self._answered_before = 0  # requests that were answered before the last failure
        self._last_failure = ""
        self._torch_device = torch.device(self.device)
        self._on_gpu = self._torch_device.type == "cuda"
        self._compiled = None
        if self.compiled:
            self._compiled = compiled_loop(
                self.slots, self.kernel, self.bell, self.dtype, self.num_threads, self.top_k, self.counters.native
            )

    def warm_up(self, max_rows: int = 1) -> None:
        """Run rows through the checks and the kernel, so that no router's deadline pays for compilation.

        On a GPU in all sizes of a request of up to `max_rows` rows: kernels compile a program for each of their tiles.
        """
        warm_up()
        slots_E = self.slots.slot_of_expert_LE[0]
        held = slots_E[slots_E >= 0][:1]
        if not held.size and not self.kernel.layout:
            return  # it allocates its slots with the first expert
        # An empty shard computes with a slot of zeros.
        slot = int(held[0]) if held.size else 0
        if not held.size:
            self.kernel.finish_write(0, 0)
        try:
            for num_pairs in telling_sizes(max_rows * (self.top_k or 1)) if self._on_gpu else [1]:
                num_rows = min(num_pairs, max_rows)
                rows_MD = torch.zeros(num_rows, self._hidden_size, dtype=self.dtype, device=self.kernel.shape.device)
                offsets_M1 = (torch.arange(num_rows + 1) * num_pairs // num_rows).int()
                slots_N = torch.full((num_pairs,), slot, dtype=torch.int32)
                self.kernel.forward(0, rows_MD, offsets_M1, slots_N, torch.ones(num_pairs), torch.empty_like(rows_MD))
            self.slots.order.note()
        finally:
            if not held.size:
                self.kernel.begin_write(0, 0)

    def start(self) -> None:
        """Run the loop in its own thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop after the current request. TimeoutError if that takes longer than `timeout_s`."""
        self._stopping.set()
        self._call()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"the compute loop did not end within {timeout_s} s")

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    @property
    def fault(self) -> str | None:
        """Why this shard can no longer answer requests although the loop runs; None while it can."""
        if self._failures < _FAILURES_IN_A_ROW or self.counters.requests != self._answered_before:
            return None
        return f"this shard no longer answers requests; the last failure: {self._last_failure}"

    @property
    def router_ids(self) -> list[str]:
        """Names of the connected routers, of which one has a pair for each worker of its engine."""
        with self._lock:
            return sorted({router_of(channel.router_id) for channel in self._channels})

    def add(self, channel: ShardChannel) -> None:
        """Serve one more router."""
        views = _Views.of(channel)
        with self._lock:
            self._channels = {**self._channels, channel: views}
        logger.info("router %s connected", channel.router_id)
        self._call()

    def remove(self, channel: ShardChannel) -> None:
        """Forget a router that left."""
        with self._lock:
            self._channels = {c: v for c, v in self._channels.items() if c is not channel}
        self._call()
        logger.info("router %s left", channel.router_id)

    def _call(self) -> None:
        """Have the loop look at `_stopping` and `_channels`."""
        if self._compiled is not None:
            self._compiled.call()
        self.bell.ring()

    def _run(self) -> None:
        use_device(self.device)
        torch.set_num_threads(self.num_threads)
        # The loop shares the interpreter with control threads and must get it back quickly.
        sys.setswitchinterval(0.0005)
        with torch.inference_mode():
            while not self._stopping.is_set():
                if self._compiled is None:
                    self.bell.wait(_IDLE_WAIT_S)
                    while self._serve(self._channels):
                        continue
                else:
                    self._serve_compiled(self._compiled)

    def _serve_compiled(self, compiled: CompiledLoop) -> None:
        """Have C++ answer requests until it leaves one to Python, or time passes. Other pairs are polled between."""
        compiled.attend()
        if self._stopping.is_set():
            return
        by_python = compiled.begin(self._channels)
        index = compiled.serve(0 if by_python else _IDLE_WAIT_S)
        if index >= 0:
            channel = compiled.channels[index]
            self._serve({channel: self._channels.get(channel) or _Views.of(channel)})
        elif by_python and not self._serve(by_python) and index != SERVED:
            self.bell.wait(_IDLE_WAIT_S)

    def _serve(self, channels: Mapping[ShardChannel, _Views]) -> int:
        """Answer at most one request of each channel, those that want one layer together; returns the number."""
        layers: dict[int, list[tuple[ShardChannel, int]]] = {}
        waiting = [(channel, nbytes) for channel in channels if (nbytes := self._poll(channel)) >= 0]
        for channel, nbytes in self._turns.choose(waiting):
            layer = int(header_of(channel.recv_buffer)[H_LAYER])  # only a hint: the router can write to it
            layers.setdefault(layer, []).append((channel, nbytes))
        for asked in layers.values():
            for channel, length in self._answer([(channel, channels[channel], nbytes) for channel, nbytes in asked]):
                with self._broken_pairs_end(channel):
                    channel.reply(length)
        return sum(map(len, layers.values()))

    def _poll(self, channel: ShardChannel) -> int:
        """Bytes of the channel's request, -1 if it has none."""
        if channel.closed:
            return -1
        with self._broken_pairs_end(channel):
            return channel.poll()
        return -1

    @contextlib.contextmanager
    def _broken_pairs_end(self, channel: ShardChannel) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # one broken pair must not stop the others
            logger.exception("lost router %s", channel.router_id)
            self._count_error(f"router {channel.router_id}: {error}")
            if isinstance(error, torch.AcceleratorError):
                # The GPU's fault, not the pair's. After most GPU errors nothing works on it in this process, not
                # even connecting a router, so no later request would show the fault.
                self._fail(str(error), _FAILURES_IN_A_ROW)
            channel.close()

    def _answer(self, asked: Sequence[tuple[ShardChannel, _Views, int]]) -> list[tuple[ShardChannel, int]]:
        """Write replies to messages of some bytes into the channels' send buffers; returns their lengths in bytes."""
        start_ns, done = time.perf_counter_ns(), list[Work]()
        lengths: list[tuple[ShardChannel, int]] = []
        self.slots.begin_request()
        try:
            works = []
            for channel, views, nbytes in asked:
                try:
                    works.append(self._read(channel, views, nbytes))
                    if (hints := self.kernel.hints) is not None:
                        hints.note(works[-1].request.layer, header_of(channel.recv_buffer)[H_HINTS:])
                except Exception as error:
                    lengths.append((channel, self._refuse(channel, error)))
            for batch in batches(works):
                failed = self._compute(batch)
                lengths += [(work.channel, self._refuse(work.channel, error)) for work, error in failed]
                done += [work for work in batch if all(work is not other for other, _ in failed)]
        finally:
            self.slots.end_request()
        spent_ns = time.perf_counter_ns() - start_ns
        for work in done:
            header = header_of(work.channel.send_buffer)
            header[H_MAGIC], header[H_SEQ], header[H_ROWS], header[H_STATUS], header[H_COMPUTE_NS] = (
                MAGIC, work.request.seq, work.request.num_rows, STATUS_OK, spent_ns,
            )  # fmt: skip
            self.counters.add(work.request, spent_ns // len(done))
            lengths.append((work.channel, HEADER_BYTES + work.request.num_rows * self._row_bytes))
        return lengths

    def _read(self, channel: ShardChannel, views: _Views, nbytes: int) -> Work:
        request = read_request(
            channel.recv_buffer,
            nbytes,
            self.slots.slot_of_expert_LE,
            DTYPE_CODES[self.dtype],
            self._hidden_size,
            self.top_k,
        )
        nbytes = request.num_rows * self._row_bytes
        if HEADER_BYTES + nbytes > len(channel.send_buffer):
            raise BadRequestError(f"{request.num_rows} rows do not fit the reply buffer")
        recv, recv_at, send, send_at = views.recv, request.rows_at, views.send, HEADER_BYTES
        if channel.recv_tensor is not None and channel.send_tensor is not None:
            recv, recv_at, send, send_at = channel.recv_tensor, 0, channel.send_tensor, 0
        rows_MD = recv[recv_at : recv_at + nbytes].view(self.dtype).view(-1, self._hidden_size)
        out_MD = send[send_at : send_at + nbytes].view(self.dtype).view(-1, self._hidden_size)
        return Work(channel, request, rows_MD, out_MD)

    def _compute(self, batch: list[Work]) -> list[tuple[Work, Exception]]:
        """What failed. Where several do together, each has its own try: the others shall not pay for one."""
        try:
            compute(self.kernel, self._torch_device, batch)
        except Exception as error:
            if len(batch) == 1:
                return [(batch[0], error)]
            logger.warning("%d requests are computed one by one: %s", len(batch), error)
            return [failed for work in batch for failed in self._compute([work])]
        return []

    def _refuse(self, channel: ShardChannel, error: Exception) -> int:
        """Write into the send buffer why there are no rows; returns the length in bytes."""
        if not isinstance(error, BadRequestError):
            logger.error("a request of router %s failed", channel.router_id, exc_info=error)
            self._fail(f"{type(error).__name__}: {error}", 1)
        self._count_error(str(error))
        seq = int(header_of(channel.recv_buffer)[H_SEQ])
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, NoSlotError):
            return no_slot_reply(channel.send_buffer, seq, text, error.layer, error.expert)
        return error_reply(channel.send_buffer, seq, text)

    def _fail(self, text: str, count: int) -> None:
        """Note failures that are not a router's fault."""
        answered = self.counters.requests
        self._failures = count + (self._failures if answered == self._answered_before else 0)
        self._answered_before, self._last_failure = answered, text

    def _count_error(self, text: str) -> None:
        self.counters.errors += 1
        self.counters.last_error = text
