"""Copies experts into this shard's free slots while it serves: from other shards, at last from the checkpoint.

Each source has a lane of its own, a thread that takes the orders to be copied from there one by one; a few lanes run at
a time. An order whose source fails goes to the lane of its next source.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from experts.protocol.errors import ShardError
from experts.protocol.membership import ShardEndpoint
from experts.protocol.orders import CopyOrder, CopyResult
from experts.protocol.secret import MeshSecret
from experts.shard.slots import SlotTable
from experts.transports.tls.identity import TlsIdentity
from experts.transports.weights.frames import WeightsHello
from experts.transports.weights.pace import CopyCancelledError, Pace
from experts.transports.weights.reader import NotCopiedError, SourceLostError, WeightsReader
from experts.transports.weights.staging import HostPieces, pieces_for

logger = logging.getLogger(__name__)

MAX_LANES = 4
ASKED_AHEAD = 6  # so that a source never waits for this shard's bookkeeping; half of them in one message
STALL_S = 5.0  # a source that sends nothing for so long is given up
CONNECT_TIMEOUT_S = 5.0
_POLL_S = 0.1

Source = ShardEndpoint | None
"""Where a copy comes from; None is the checkpoint."""


@dataclass
class MoverCounters:
    """What was copied since the shard started; sources are process, shm, tcp and checkpoint."""

    copies: Counter[str] = field(default_factory=Counter)
    copied_bytes: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    in_flight: int = 0
    seconds: float = 0.0  # with at least one copy under way


@dataclass
class _Task:
    """One order on its way through its sources."""

    number: int
    order: CopyOrder
    sources: deque[Source]
    slot: int | None = None
    start_s: float = 0.0
    failures: list[str] = field(default_factory=list)


class Mover:
    """One shard's copies. `copy` runs once at a time."""

    def __init__(
        self,
        slots: SlotTable,
        hello: WeightsHello,
        stall_s: float = STALL_S,
        secret: Callable[[], MeshSecret] = MeshSecret.from_environment,
        tls: TlsIdentity | None = None,
    ) -> None:
        self._slots = slots
        self._hello = hello
        self._secret, self._tls = secret, tls
        self._stall_s = stall_s
        self._readers: dict[ShardEndpoint, WeightsReader] = {}
        self._busy = threading.Lock()
        self.counters = MoverCounters()

    def copy(
        self,
        orders: Sequence[CopyOrder],
        on_done: Callable[[CopyResult], None],
        max_bytes_per_s: float | None,
        cancelled: Callable[[], bool],
    ) -> None:
        """See `ShardServer.copy`."""
        pace = Pace(max_bytes_per_s, cancelled, lambda: self._slots.requests_ended)
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("another copy of this shard still runs; cancel it, or wait for it to return")
        start_s = time.monotonic()
        try:
            _Run(self, orders, on_done, pace).finish()
        finally:
            self.counters.seconds += time.monotonic() - start_s
            self._busy.release()

    def close(self) -> None:
        """End the connections to sources. Call it when no copy runs."""
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            reader.close()

    # The rest is for `_Run`.

    @property
    def slots(self) -> SlotTable:
        """Where experts go."""
        return self._slots

    def take_reader(self, source: ShardEndpoint) -> WeightsReader:
        """A connection to `source`, if possible one from an earlier call. ShardError, OSError or ValueError."""
        kept = self._readers.pop(source, None)
        if kept is not None:
            if not kept.closed:  # as it is when nobody used it for a while
                return kept
            kept.close()
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        return WeightsReader.connect(source, self._hello, deadline_s, STALL_S, self._secret(), self._tls)

    def keep_reader(self, source: ShardEndpoint, reader: WeightsReader) -> None:
        """Leave a connection for the next lane."""
        self._readers[source] = reader


class _Run:
    """One call of `Mover.copy`."""

    def __init__(
        self, mover: Mover, orders: Sequence[CopyOrder], on_done: Callable[[CopyResult], None], pace: Pace
    ) -> None:
        self._mover = mover
        self._slots = mover.slots
        self._on_done = on_done
        self._pace = pace
        self._changed = threading.Condition()
        self._waiting: dict[Source, deque[_Task]] = {}
        self._running: set[Source] = set()
        self._lost: set[Source] = set()
        self._twins = Counter((order.layer, order.expert) for order in orders)
        self._reporting = threading.Lock()
        readable = bool(self._slots.kernel.layout)
        first: dict[tuple[int, int], CopyOrder] = {}
        for order in orders:
            first.setdefault((order.layer, order.expert), order)
        for number, order in enumerate(first.values()):
            sources: deque[Source] = deque(order.sources if readable else ())
            sources.append(None)
            self._waiting.setdefault(sources[0], deque()).append(_Task(number, order, sources))

    def finish(self) -> None:
        """Run lanes until every order has its result."""
        with self._changed:
            while self._waiting or self._running:
                ready = [source for source in self._waiting if source not in self._running]
                if ready and len(self._running) < MAX_LANES:
                    source = min(ready, key=lambda source: self._waiting[source][0].number)
                    self._running.add(source)
                    threading.Thread(target=self._lane, args=(source,), name="shard-copy", daemon=True).start()
                else:
                    self._changed.wait(_POLL_S)

    def _lane(self, source: Source) -> None:
        try:
            if self._cancelled():
                self._next(source)  # answers them all
            elif source is None:
                self._copy_from_checkpoint()
            else:
                self._copy_from_shard(source)
        finally:
            with self._changed:
                self._running.discard(source)
                self._changed.notify_all()

    def _next(self, source: Source) -> _Task | None:
        """The next order of a lane, with a slot; those that need or get none are answered on the way."""
        while True:
            with self._changed:
                tasks = self._waiting.get(source)
                if not tasks:
                    self._waiting.pop(source, None)
                    return None
                task = tasks.popleft()
                if not tasks:
                    del self._waiting[source]
            if not task.start_s:
                task.start_s = time.monotonic()
            try:
                self._pace.check()
                if task.slot is None:
                    task.slot = self._slots.reserve(task.order.layer, task.order.expert, self._cancelled)
                    if task.slot is None:
                        self._report(task, "", 0)
                        continue
                    with self._reporting:
                        self._mover.counters.in_flight += 1
                return task
            except Exception as error:
                self._fail(task, str(error))

    def _cancelled(self) -> bool:
        try:
            self._pace.check()
        except CopyCancelledError:
            return True
        return False

    def _copy_from_checkpoint(self) -> None:
        slots = self._slots
        nbytes = slots.kernel.shape.expert_bytes
        while (task := self._next(None)) is not None:
            layer, expert = task.order.layer, task.order.expert
            assert task.slot is not None
            try:
                self._pace.take(nbytes)
                slots.checkpoint.fetch_experts([(layer, expert)])
                digest = slots.install(layer, expert, task.slot)
                slots.publish(layer, expert, task.slot, digest)
            except CopyCancelledError as error:
                self._fail(task, str(error))
            except Exception as error:
                logger.exception("expert %d of layer %d could not be read from the checkpoint", expert, layer)
                self._fail(task, "; ".join([*task.failures, f"checkpoint: {type(error).__name__}: {error}"]))
            else:
                self._report(task, "checkpoint", nbytes)

    def _copy_from_shard(self, source: ShardEndpoint) -> None:
        """Ask for orders a little ahead, and take them as they come."""
        asked: deque[_Task] = deque()
        reader: WeightsReader | None = None
        try:
            reader = self._mover.take_reader(source)
            pieces = pieces_for(self._slots.kernel.slot_device)
            while True:
                if len(asked) <= ASKED_AHEAD // 2:
                    while len(asked) < ASKED_AHEAD and (task := self._next(source)) is not None:
                        asked.append(task)
                        reader.ask(task.order.layer, task.order.expert)
                if not asked:
                    break
                self._receive(reader, pieces, asked)
            self._mover.keep_reader(source, reader)
            return
        except CopyCancelledError as error:
            for task in asked:
                self._fail(task, str(error))
        except (SourceLostError, ShardError, OSError, ValueError) as error:
            logger.warning("copies from shard %d go on elsewhere: %s", source.rank, error)
            self._move_on(source, asked, str(error))
        except BaseException as error:
            logger.exception("copies from shard %d failed", source.rank)
            self._move_on(source, asked, f"{type(error).__name__}: {error}")
        if reader is not None:
            reader.close()

    def _receive(self, reader: WeightsReader, pieces: HostPieces, asked: deque[_Task]) -> None:
        """Take the copy that was asked for first; it stays in `asked` if the source is lost."""
        slots, task = self._slots, asked[0]
        layer, expert, slot = task.order.layer, task.order.expert, task.slot
        assert slot is not None
        kernel = slots.kernel
        views = kernel.slot_views(layer, slot)
        kernel.begin_write(layer, slot)
        try:
            digest = reader.receive(views, pieces, self._pace)
        except NotCopiedError as error:
            asked.popleft()
            self._pass_on(task, str(error))
            return
        kernel.finish_write(layer, slot)
        slots.publish(layer, expert, slot, digest)
        asked.popleft()
        self._report(task, reader.transport, sum(view.numel() for view in views))

    def _move_on(self, source: Source, asked: deque[_Task], reason: str) -> None:
        """Pass all orders of a lost source on to the next ones."""
        with self._changed:
            self._lost.add(source)
            waiting = self._waiting.pop(source, deque())
        for task in (*asked, *waiting):
            self._pass_on(task, reason)

    def _pass_on(self, task: _Task, reason: str) -> None:
        task.failures.append(reason)
        task.sources.popleft()
        with self._changed:
            while task.sources[0] in self._lost:
                task.sources.popleft()
            following = self._waiting.setdefault(task.sources[0], deque())
            following.append(task)
            self._changed.notify_all()

    def _fail(self, task: _Task, reason: str) -> None:
        if task.slot is not None:
            self._slots.give_up(task.order.layer, task.slot)
        self._report(task, "", 0, " ".join(reason.split()) or "unknown")

    def _report(self, task: _Task, source: str, nbytes: int, error: str = "") -> None:
        layer, expert = task.order.layer, task.order.expert
        counters = self._mover.counters
        with self._reporting:
            if task.slot is not None:
                counters.in_flight -= 1
            if error:
                counters.failed += 1
            elif source:
                counters.copies[source] += 1
                counters.copied_bytes[source] += nbytes
            result = CopyResult(layer, expert, source, nbytes, time.monotonic() - task.start_s, error)
            twin = result if error else CopyResult(layer, expert, "", 0, result.seconds)
            for number in range(self._twins[layer, expert]):
                try:
                    self._on_done(result if number == 0 else twin)
                except Exception:
                    logger.exception("nobody took the result of a copy: %s", result)
