"""The slots of one shard: which experts they hold, which are free, and how they are filled from the checkpoint.

A slot is free, being written, held (in the table, so requests may use it), or released: out of the table, and free
again as soon as the request of that moment is over.

Legend: L MoE layers, E logical experts, s slots of this shard in a layer.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.checkpoint.weight_format import QuantizedExpert
from experts.kernels import ExpertKernel
from experts.model.spec import ExpertWeights
from experts.native.library import data_plane
from experts.native.structs import NativeSlotWords
from experts.shard.device_order import order_on
from placement.placement import Placement, check_same_model

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 2.0
_REQUEST_TIMEOUT_S = 60.0  # far longer than any router waits for a reply


def experts_of(placement: Placement, rank: int) -> list[tuple[int, int]]:
    """(layer, expert) of each expert that a placement gives to a rank, in order and once."""
    wanted_Ls = np.asarray(placement.experts_of_rank(rank))
    return [(layer, int(e)) for layer, wanted_s in enumerate(wanted_Ls) for e in np.unique(wanted_s) if e >= 0]


class SlotTable:
    """Maps experts to a kernel's slots. Threads may fill and release slots while the compute loop serves requests."""

    def __init__(self, checkpoint: ExpertCheckpoint, kernel: ExpertKernel, num_slots: int, dtype: torch.dtype) -> None:
        spec = checkpoint.spec
        self.checkpoint = checkpoint
        self.kernel = kernel
        self.num_slots = num_slots
        self.words = NativeSlotWords()
        """What the compute loop shares with this table; compiled code writes and reads it without the GIL."""
        self._old_tables: list[tuple[int, np.ndarray]] = []  # requests that had ended when each was replaced
        self._table_LE = np.empty((0, 0), np.int32)
        self._replace_table(np.full((spec.num_layers, spec.num_experts), -1, np.int32))
        self._taken_Ls = np.zeros((spec.num_layers, num_slots), np.bool_)
        self._releases_Ls = np.zeros((spec.num_layers, num_slots), np.int64)
        self._released: dict[tuple[int, int], int] = {}  # by (layer, slot): requests ended when it left the table
        self._digests: dict[tuple[int, int], bytes] = {}
        self._dtype = dtype
        self._lock = threading.Lock()
        self.order = order_on(kernel.shape.device)

    @property
    def slot_of_expert_LE(self) -> np.ndarray:
        """int32, -1 where this shard does not hold the expert. Replaced, never written to, so readers see one state."""
        return self._table_LE

    def _replace_table(self, table_LE: np.ndarray) -> None:
        """Later requests use `table_LE`; one that is under way may use the old table. The caller has the lock."""
        old_LE, self._table_LE = self._table_LE, table_LE
        library = data_plane()
        if library is not None:
            library.data_plane_replace_table(ctypes.addressof(self.words), table_LE.ctypes.data)
        self._old_tables.append((self.requests_ended, old_LE))  # read after the table is replaced, as in release()

    def begin_request(self) -> None:
        """The compute loop calls this before it looks up slots; their weights do not change until `end_request`."""
        self.words.in_request = 1

    def end_request(self) -> None:
        """The compute loop calls this when it no longer uses the slots it looked up."""
        try:
            self.order.note()
        finally:
            self.words.requests_ended += 1
            self.words.in_request = 0

    @property
    def requests_ended(self) -> int:
        """Requests that the compute loop has answered."""
        return int(self.words.requests_ended)

    @property
    def num_loaded(self) -> int:
        """Experts held, over all layers."""
        return int((self.slot_of_expert_LE >= 0).sum())

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the experts held, in the kernel's format and without padding."""
        return self.num_loaded * self.kernel.shape.expert_bytes

    def held_Ls(self) -> np.ndarray:
        """int32 [L, s]: the expert in each slot that requests may use, else -1."""
        table_LE = self.slot_of_expert_LE
        held_Ls = np.full((len(table_LE), self.num_slots), -1, np.int32)
        layer_N, expert_N = np.nonzero(table_LE >= 0)
        held_Ls[layer_N, table_LE[layer_N, expert_N]] = expert_N
        return held_Ls

    @property
    def num_free(self) -> int:
        """Slots that could be reserved now, over all layers."""
        with self._lock:
            self._reclaim()
            return int((~self._taken_Ls).sum())

    def digest(self) -> str:
        """A hash of samples of each expert held: changes with the weights, and is cheap for large models."""
        total = hashlib.sha256()
        with self._lock:
            digests = sorted(self._digests.items())
        for _, digest in digests:
            total.update(digest)
        return total.hexdigest()[:16]

    def reserve(self, layer: int, expert: int, cancelled: Callable[[], bool] = lambda: False) -> int | None:
        """A free slot to write `expert` into, then `publish` or `give_up`; None if the table has the expert already.

        Waits for the current request if only released slots are left, and for a GPU to have run those before.
        ValueError says why there is none, TimeoutError
        that a request computes for too long.
        """
        shape = self.slot_of_expert_LE.shape
        if not (0 <= layer < shape[0] and 0 <= expert < shape[1]):
            raise ValueError(
                f"expert {expert} of layer {layer}, this model has {shape[0]} layers of {shape[1]} experts"
            )
        deadline_s = time.monotonic() + _REQUEST_TIMEOUT_S
        while True:
            with self._lock:
                if self.slot_of_expert_LE[layer, expert] >= 0:
                    return None
                self._reclaim()
                free = np.flatnonzero(~self._taken_Ls[layer])
                if free.size:
                    slot = int(free[0])
                    self._taken_Ls[layer, slot] = True
                    break
                if all(released[0] != layer for released in self._released):
                    raise ValueError(
                        f"layer {layer} has no free slot for expert {expert}: all {self.num_slots} are in use; "
                        "release an expert first, or give the shard more slots (slots_per_rank)"
                    )
            if cancelled():
                raise ValueError("cancelled")
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"a request has computed for {_REQUEST_TIMEOUT_S:.0f} s, so no slot of layer {layer} is free"
                )
            time.sleep(0.0002)
        try:
            self.order.await_noted()
        except BaseException:
            self.give_up(layer, slot)
            raise
        return slot

    def publish(self, layer: int, expert: int, slot: int, digest: bytes) -> None:
        """Enter an expert, that stands in its reserved slot, into the table. `digest` is what `install` gives."""
        with self._lock:
            self._reclaim()
            self._digests[layer, expert] = digest
            table_LE = self.slot_of_expert_LE.copy()
            table_LE[layer, expert] = slot
            self._replace_table(table_LE)

    def give_up(self, layer: int, slot: int) -> None:
        """A reserved slot was not filled: it is free again."""
        with self._lock:
            self.kernel.begin_write(layer, slot)
            self._taken_Ls[layer, slot] = False

    def release(self, pairs: Iterable[tuple[int, int]]) -> int:
        """Take (layer, expert) pairs out of the table; returns how many were in it.

        Their slots are free when the request of this moment is over. Does not wait for it.
        """
        with self._lock:
            table_LE = self.slot_of_expert_LE.copy()
            places = []
            for layer, expert in pairs:
                if not (0 <= layer < table_LE.shape[0] and 0 <= expert < table_LE.shape[1]):
                    continue
                slot = int(table_LE[layer, expert])
                if slot >= 0:
                    table_LE[layer, expert] = -1
                    del self._digests[layer, expert]
                    self._releases_Ls[layer, slot] += 1
                    places.append((layer, slot))
            self._replace_table(table_LE)
            # Read after the table is replaced: a request that begins later cannot find these slots.
            ended = self.requests_ended
            self._released |= dict.fromkeys(places, ended)
            self._reclaim()
        return len(places)

    def _reclaim(self) -> None:
        """Free the released slots and the old tables that no request can still use. The caller has the lock."""
        self._old_tables = [old for old in self._old_tables if self._may_be_in_use(old[0])]
        for (layer, slot), ended in list(self._released.items()):
            if not self._may_be_in_use(ended):
                del self._released[layer, slot]
                self.kernel.begin_write(layer, slot)
                self._taken_Ls[layer, slot] = False

    def _may_be_in_use(self, ended: int) -> bool:
        """Whether the request of the moment when so many had ended may still run."""
        return bool(self.words.in_request) and self.requests_ended == ended

    def lend(self, layer: int, expert: int) -> tuple[int, bytes, np.ndarray, int] | None:
        """For a copy of an expert: its slot, its digest, a counter, and what that says now. None if not held.

        Nothing keeps the slot. The counter (int64 [1], a view) counts its releases: who has read the slot must look
        whether it still says the same, and drop what it read if not.
        """
        shape = self.slot_of_expert_LE.shape
        if not (0 <= layer < shape[0] and 0 <= expert < shape[1]):
            return None
        with self._lock:
            slot = int(self.slot_of_expert_LE[layer, expert])
            if slot < 0:
                return None
            releases_1 = self._releases_Ls[layer, slot : slot + 1]
            return slot, self._digests[layer, expert], releases_1, int(releases_1[0])

    def load(self, placement: Placement, rank: int, num_threads: int = 1) -> int:
        """Load the experts that `placement` gives to `rank` and that are not here yet; returns how many.

        With several threads reading and packing overlap. Raises ValueError if there are too few slots.
        """
        check_same_model("the placement", placement, "the checkpoint", self.checkpoint.spec)
        missing = [pair for pair in experts_of(placement, rank) if self.slot_of_expert_LE[pair] < 0]
        self.checkpoint.fetch_experts(missing)
        start_s = logged_s = time.monotonic()
        for count, _ in enumerate(self._fill(missing, num_threads), start=1):
            now_s = time.monotonic()
            if now_s - logged_s > _LOG_INTERVAL_S or count == len(missing):
                logged_s = now_s
                done = count * self.kernel.shape.expert_bytes
                rate = done / max(now_s - start_s, 1e-6) / 1e6
                logger.info(
                    "rank %d: %d of %d experts loaded, %.1f MB, %.0f MB/s",
                    rank, count, len(missing), done / 1e6, rate,
                )  # fmt: skip
        return len(missing)

    def _fill(self, missing: list[tuple[int, int]], num_threads: int) -> Iterator[None]:
        """Load experts, (layer, expert) each, in order; yields after each one, which the table then has."""
        under_way: deque[tuple[int, int, int, Future[bytes]]] = deque()
        with ThreadPoolExecutor(num_threads, "loading") as pool:
            try:
                for layer, expert in missing:
                    slot = self.reserve(layer, expert)
                    assert slot is not None
                    under_way.append((layer, expert, slot, pool.submit(self.install, layer, expert, slot)))
                    if len(under_way) == num_threads:
                        self._publish_when_done(under_way)
                        yield
                while under_way:
                    self._publish_when_done(under_way)
                    yield
            finally:
                for layer, _, slot, future in under_way:
                    if not future.cancel():
                        future.exception()  # wait: it still writes into the slot
                    self.give_up(layer, slot)

    def _publish_when_done(self, under_way: deque[tuple[int, int, int, Future[bytes]]]) -> None:
        layer, expert, slot, installed = under_way[0]
        digest = installed.result()  # if it failed, the slot is given up with the others
        under_way.popleft()
        self.publish(layer, expert, slot, digest)

    def install(self, layer: int, expert: int, slot: int) -> bytes:
        """Read an expert from the checkpoint into a reserved slot; returns its digest. Runs in several threads."""
        weights = self._read(layer, expert)
        with self.order.writing():
            self.kernel.set_slot(layer, slot, weights)
        if isinstance(weights, QuantizedExpert):
            first, last = weights.w13_2IB, weights.w2_DB
        else:
            first, last = weights.w13_2ID, weights.w2_DI
        sample = torch.cat([first.flatten()[:16], last.flatten()[-16:]]).float().numpy().tobytes()
        return hashlib.sha256(f"{layer}.{expert}.".encode() + sample).digest()

    def _read(self, layer: int, expert: int) -> ExpertWeights | QuantizedExpert:
        if self.kernel.takes_quantized:
            return self.checkpoint.read_quantized(layer, expert)
        return self.checkpoint.read_expert(layer, expert, self._dtype)
