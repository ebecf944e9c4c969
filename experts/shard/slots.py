"""The slots of one shard: which experts they hold, and how they are filled from the checkpoint.

Legend: L MoE layers, E logical experts, s slots of this shard in a layer.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.checkpoint.weight_format import QuantizedExpert
from experts.kernels import ExpertKernel
from experts.model.spec import ExpertWeights
from placement.placement import Placement, check_same_model

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 2.0
_REQUEST_TIMEOUT_S = 60.0  # far longer than any router waits for a reply


def experts_of(placement: Placement, rank: int) -> list[tuple[int, int]]:
    """(layer, expert) of each expert that a placement gives to a rank, in order and once."""
    wanted_Ls = np.asarray(placement.experts_of_rank(rank))
    return [(layer, int(e)) for layer, wanted_s in enumerate(wanted_Ls) for e in np.unique(wanted_s) if e >= 0]


class SlotTable:
    """Fills a kernel's slots with the experts that a placement gives to a rank, and maps experts to slots.

    One thread may load while the compute loop serves requests; see `begin_request`.
    """

    def __init__(self, checkpoint: ExpertCheckpoint, kernel: ExpertKernel, num_slots: int, dtype: torch.dtype) -> None:
        spec = checkpoint.spec
        self.checkpoint = checkpoint
        self.num_slots = num_slots
        self.slot_of_expert_LE = np.full((spec.num_layers, spec.num_experts), -1, np.int32)
        """int32, -1 where this shard does not hold the expert. Replaced, never written to, so readers see one state."""
        self._expert_in_slot_Ls = np.full((spec.num_layers, num_slots), -1, np.int32)
        self._digests: dict[tuple[int, int], bytes] = {}
        self._kernel = kernel
        self._dtype = dtype
        self._in_request = False
        self._requests_ended = 0

    def begin_request(self) -> None:
        """The compute loop calls this before it looks up slots; their weights do not change until `end_request`."""
        self._in_request = True

    def end_request(self) -> None:
        """The compute loop calls this when it no longer uses the slots it looked up."""
        self._in_request = False
        self._requests_ended += 1

    def _await_request(self) -> None:
        """Wait for the current request, which may use a slot that was just removed from the table."""
        seen, deadline_s = self._requests_ended, time.monotonic() + _REQUEST_TIMEOUT_S
        while self._in_request and self._requests_ended == seen:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"a request has computed for {_REQUEST_TIMEOUT_S} s, so no slot can be refilled")
            time.sleep(0.0002)

    @property
    def num_loaded(self) -> int:
        """Experts held, over all layers."""
        return int((self.slot_of_expert_LE >= 0).sum())

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the experts held, in the kernel's format and without padding."""
        return self.num_loaded * self._kernel.shape.expert_bytes

    def digest(self) -> str:
        """A hash of samples of each expert held: changes with the weights, and is cheap for large models."""
        total = hashlib.sha256()
        for _, digest in sorted(self._digests.items()):  # a snapshot, as another thread may be loading
            total.update(digest)
        return total.hexdigest()[:16]

    def load(self, placement: Placement, rank: int, num_threads: int = 1) -> int:
        """Load the experts that `placement` gives to `rank` and that are not here yet; returns how many.

        Experts that the placement no longer gives to this rank stay until their slots are needed, so that routers of
        the previous epoch are still answered. With several threads reading and packing overlap; while the shard serves
        they would take its cores. Raises ValueError if there are too few slots.
        """
        spec = self.checkpoint.spec
        check_same_model("the placement", placement, "the checkpoint", spec)
        wanted_Ls = np.asarray(placement.experts_of_rank(rank))
        missing = [pair for pair in experts_of(placement, rank) if self.slot_of_expert_LE[pair] < 0]
        self.checkpoint.fetch_experts(missing)
        start_s = logged_s = time.monotonic()
        for count, _ in enumerate(self._fill(missing, wanted_Ls, num_threads), start=1):
            now_s = time.monotonic()
            if now_s - logged_s > _LOG_INTERVAL_S or count == len(missing):
                logged_s = now_s
                done = count * self._kernel.shape.expert_bytes
                rate = done / max(now_s - start_s, 1e-6) / 1e6
                logger.info(
                    "rank %d: %d of %d experts loaded, %.1f MB, %.0f MB/s",
                    rank, count, len(missing), done / 1e6, rate,
                )  # fmt: skip
        return len(missing)

    def _fill(self, missing: list[tuple[int, int]], wanted_Ls: np.ndarray, num_threads: int) -> Iterator[None]:
        """Load experts, (layer, expert) each, in order; yields after each one, which the table then has."""
        under_way: deque[tuple[int, int, int, Future[bytes]]] = deque()
        with ThreadPoolExecutor(num_threads, "loading") as pool:
            try:
                for layer, expert in missing:
                    slot = self._free_slot(layer, wanted_Ls[layer])
                    self._vacate(layer, slot)
                    self._expert_in_slot_Ls[layer, slot] = expert  # so that no other expert takes it
                    under_way.append((layer, slot, expert, pool.submit(self._install, layer, slot, expert)))
                    if len(under_way) == num_threads:
                        self._publish(*under_way.popleft())
                        yield
                while under_way:
                    self._publish(*under_way.popleft())
                    yield
            finally:
                for layer, slot, _, future in under_way:
                    future.cancel()
                    self._expert_in_slot_Ls[layer, slot] = -1

    def _read(self, layer: int, expert: int) -> ExpertWeights | QuantizedExpert:
        if self._kernel.takes_quantized:
            return self.checkpoint.read_quantized(layer, expert)
        return self.checkpoint.read_expert(layer, expert, self._dtype)

    def _free_slot(self, layer: int, wanted_s: np.ndarray) -> int:
        held_s = self._expert_in_slot_Ls[layer]
        empty = np.flatnonzero(held_s < 0)
        if empty.size:
            return int(empty[0])
        spare = np.flatnonzero(~np.isin(held_s, wanted_s))
        if not spare.size:
            raise ValueError(
                f"layer {layer} needs more experts than the {self.num_slots} slots of this shard; raise slots_per_rank"
            )
        return int(spare[0])

    def _vacate(self, layer: int, slot: int) -> None:
        """Take the expert in a slot out of the table, and wait for the request that may use it."""
        old = int(self._expert_in_slot_Ls[layer, slot])
        if old < 0:
            return
        table_LE = self.slot_of_expert_LE.copy()
        table_LE[layer, old] = -1
        self.slot_of_expert_LE = table_LE
        self._digests.pop((layer, old), None)
        self._await_request()
        self._expert_in_slot_Ls[layer, slot] = -1

    def _install(self, layer: int, slot: int, expert: int) -> bytes:
        """Read an expert and pack it into a slot that nobody uses; returns its digest. Runs in several threads."""
        weights = self._read(layer, expert)
        self._kernel.set_slot(layer, slot, weights)
        if isinstance(weights, QuantizedExpert):
            first, last = weights.w13_2IB, weights.w2_DB
        else:
            first, last = weights.w13_2ID, weights.w2_DI
        sample = torch.cat([first.flatten()[:16], last.flatten()[-16:]]).float().numpy().tobytes()
        return hashlib.sha256(f"{layer}.{expert}.".encode() + sample).digest()

    def _publish(self, layer: int, slot: int, expert: int, installed: Future[bytes]) -> None:
        """Enter an expert into the table when it is installed; if that fails, its slot is free."""
        try:
            digest = installed.result()
        except BaseException:
            self._expert_in_slot_Ls[layer, slot] = -1
            raise
        table_LE = self.slot_of_expert_LE.copy()
        table_LE[layer, expert] = slot
        self.slot_of_expert_LE = table_LE
        self._digests[(layer, expert)] = digest
