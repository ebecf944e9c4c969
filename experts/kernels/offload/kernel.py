"""The kernel of a shard that holds more experts than its memory for computing takes.

A slot is packed once, into the backing. A call brings the slots that it needs into places, in several parts if it needs
more than there are. So nothing that happens in the places loses an expert, and copies of experts from shard to shard
read and write the backing.

Legend as in base.py; U distinct slots.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from experts.checkpoint.weight_format import QuantizedExpert
from experts.kernels.base import ExpertKernel, KernelShape
from experts.kernels.offload.backing import Backing
from experts.kernels.offload.link import Link
from experts.kernels.offload.places import placed
from experts.kernels.offload.residency import Residency
from experts.model.spec import ExpertWeights
from placement.capacity.eviction import in_parts, most_at_once

_COPY_TIMEOUT_S = 60.0  # far longer than any router waits for a reply


@dataclass
class OffloadCounts:
    """What an offloaded kernel has done since it started."""

    misses: int = 0  # slots of a call that stood in no place, or were still coming
    copied: int = 0  # slots copied into places
    copy_ns: int = 0  # of those copies, added up over threads
    wait_ns: int = 0  # in which calls waited for copies
    prefetched: int = 0  # of the copied, those that nobody had asked for yet


class OffloadedKernel(ExpertKernel):
    """Slots in a backing, of which some stand in places. See `ExpertKernel` for the threads that may call it."""

    name = "offloaded"

    def __init__(self, picked: ExpertKernel, shape: KernelShape, backing: Backing, link: Link) -> None:
        """For the slots of `shape`, like `picked`, which has as many slots as a layer has places.

        `backing` has the views of a slot of `picked`, whose slots can be copied as bytes.
        """
        self.takes_quantized = picked.takes_quantized
        super().__init__(shape)
        self.kernel_name = picked.name
        self.places = placed(picked, shape)
        self.residency = Residency(self.places, shape.num_layers, shape.num_slots)
        self.counts = OffloadCounts()
        self.most_at_once = most_at_once(self.places.layer_places, shape.num_layers, self.places.shares_places)
        """Slots of a layer that a call, or what comes early for one, may have in places."""
        self.copy_s = 0.0
        """Seconds that a slot takes to come, lately; 0.0 before any came."""
        self.slot_bytes = sum(view.numel() for view in picked.slot_views(0, 0))
        """Bytes of a packed expert."""
        self._picked_class, self._packing_text = type(picked), picked._packing()
        self._packers = threading.local()
        self._backing, self._link = backing, link
        self.versions_LS = np.zeros((shape.num_layers, shape.num_slots), np.int64)
        """Counts what was written to a slot: its expert is another one when this has changed."""
        self._before_close: list[Callable[[], None]] = []
        self._filled = False
        self._compiled_call = False  # the next call may use other slots, too, than those that `residency` is told of

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """What the kernel in the places supports was asked before."""
        return None

    # Slots are in the backing.

    @property
    def slot_device(self) -> str:
        """The backing is on the host."""
        return "cpu"

    def slot_views(self, layer: int, slot: int) -> list[torch.Tensor]:
        """See `ExpertKernel.slot_views`."""
        return self._backing.views(layer, slot)

    def begin_write(self, layer: int, slot: int) -> None:
        """See `ExpertKernel.begin_write`."""
        with self.residency.changed:
            self.versions_LS[layer, slot] += 1  # a copy that runs is dropped when it ends
            self._loaded_LS[layer, slot] = False
            self.residency.drop(layer, slot)

    def finish_write(self, layer: int, slot: int) -> None:
        """See `ExpertKernel.finish_write`. What comes after `fill` takes a free place as it comes, if there is one.

        Migration copies what is most urgent first. Not for a thread in the midst of a call.
        """
        super().finish_write(layer, slot)
        if self._filled:
            self._bring_unasked(layer, [slot], None, count=False)

    def _pack(self, layer: int, slot: int, weights: ExpertWeights | QuantizedExpert) -> None:
        packer: ExpertKernel | None = getattr(self._packers, "kernel", None)
        if packer is None:  # one for each thread that loads
            packer = self._packers.kernel = self._picked_class(replace(self.shape, num_layers=1, num_slots=1))
        packer.set_slot(0, 0, weights)
        for target, source in zip(self.slot_views(layer, slot), packer.slot_views(0, 0), strict=True):
            target.copy_(source)

    def _check_weights(self, weights: ExpertWeights | QuantizedExpert) -> None:
        """The packer does."""

    def _packing(self) -> str:
        return self._packing_text

    def _weight_tensors(self) -> list[torch.Tensor]:
        places = range(self.shape.num_layers * self.places.layer_places)
        return [view for place in places for view in self.places.place_views(place)]

    # Calls.

    def compiled_forward(self) -> tuple[int, int] | None:
        """It refuses calls whose slots are not all in places: see `make_ready`."""
        return self.places.compiled_forward()

    def make_ready(self) -> bool:
        """See `ExpertKernel.make_ready`. More slots than can be in places at once are left to `forward`."""
        wanted = self.places.take_wanted()
        if wanted is None or len(wanted[1]) > self.most_at_once or not self._holds(*wanted):
            return False
        self._compiled_call = True
        try:
            self._bring_in(*wanted)
        except Exception:  # `forward` will meet it, too, and its caller answers for it
            self.end_ready()
            return False
        return True

    def end_ready(self) -> None:
        """See `ExpertKernel.end_ready`."""
        with self.residency.changed:
            self.residency.unuse()
            self._compiled_call = False

    def forward(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
    ) -> None:
        """See `ExpertKernel.forward`. Waits for slots that stand in no place."""
        slots_U = np.unique(slots_N.numpy())
        if not 0 <= layer < self.shape.num_layers or not self._holds(layer, slots_U):
            self._check_call(layer, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD)  # which says what is wrong
        any_order = self.places.takes_any_order(len(slots_N))
        parts = self._parts(layer, slots_U, any_order)
        pairs = (row_offsets_M1, slots_N, weights_N)
        ranks_N = _ranks(slots_N) if any_order and len(parts) > 1 else None
        try:
            for number, slots_U in enumerate(parts):
                self._bring_in(layer, slots_U)
                first, last = number == 0, number == len(parts) - 1
                if len(parts) == 1:
                    self.places.forward_part(layer, rows_MD, *pairs, out_MD, first, last)
                else:
                    taken_N = _of_slots(slots_U, slots_N, self.shape.num_slots)
                    told = None if ranks_N is None else ranks_N[taken_N]
                    self.places.forward_part(
                        layer, rows_MD, *_some(taken_N, *pairs), out_MD, first, last, told, len(slots_N)
                    )
                self._backing.note()
        finally:
            self.end_ready()

    def _holds(self, layer: int, slots_U: np.ndarray) -> bool:
        if not len(slots_U):
            return True
        return bool(slots_U[0] >= 0 and slots_U[-1] < self.shape.num_slots and self._loaded_LS[layer, slots_U].all())

    def _parts(self, layer: int, slots_U: np.ndarray, any_order: bool) -> list[np.ndarray]:
        """Slots to compute at a time."""
        here_S = self.residency.place_of_slot_LS[layer] >= 0 if any_order else None
        return in_parts(slots_U, here_S, self.most_at_once)

    def _bring_in(self, layer: int, slots_U: np.ndarray) -> None:
        """Return when all are in places, where they stay until the next part.

        TimeoutError if a place is waited for, or a copy that others make, and no copy ends for long.
        """
        residency = self.residency
        with residency.changed:
            residency.use(layer, slots_U)
            missing = slots_U[residency.place_of_slot_LS[layer, slots_U] < 0].tolist()
        if not missing:
            return
        start_ns = time.perf_counter_ns()
        self.counts.misses += len(missing)
        try:
            while True:
                with residency.changed:
                    missing = [slot for slot in missing if not residency.is_in(layer, slot)]
                    if not missing:
                        return
                    pairs = residency.claim(layer, [slot for slot in missing if not residency.is_coming(layer, slot)])
                    if not pairs and not residency.changed.wait(_COPY_TIMEOUT_S):
                        raise TimeoutError(
                            f"layer {layer} slots {missing} waited for {_COPY_TIMEOUT_S:.0f} s for places: no copy "
                            "into one ends"
                        )
                if pairs:
                    self._copy(layer, pairs, [int(self.versions_LS[layer, slot]) for slot, _ in pairs], unasked=False)
        finally:
            self.counts.wait_ns += time.perf_counter_ns() - start_ns

    def _copy(self, layer: int, pairs: Sequence[tuple[int, int]], versions: Sequence[int], unasked: bool) -> int:
        """Copy (slot, place), all of them expected; returns how many came, which is those with still these versions."""
        residency, came = self.residency, list[int]()
        whole, start_ns = False, time.perf_counter_ns()
        try:
            end_s = self._link.book(self.slot_bytes * len(pairs))
            targets = [self.places.place_views(place) for _, place in pairs]
            self._backing.copy([(layer, slot) for slot, _ in pairs], targets)
            self._link.wait(end_s)
            self.counts.copied += len(pairs)
            taken_ns = time.perf_counter_ns() - start_ns
            self.counts.copy_ns += taken_ns
            taken_s = taken_ns / 1e9 / len(pairs)
            self.copy_s += 0.1 * (taken_s - self.copy_s) if self.copy_s else taken_s
            whole = True
        finally:
            with residency.changed:
                for (slot, _), version in zip(pairs, versions, strict=True):
                    if whole and self.versions_LS[layer, slot] == version:
                        came.append(slot)
                    else:
                        residency.miss(layer, slot)
                residency.arrive(layer, came, unasked)
        return len(came)

    # What comes before it is asked for.

    @property
    def together(self) -> int:
        """So many copies in one go take hardly longer than one."""
        return 1 if self._link.limited else self._backing.together

    def bring_early(self, layer: int, slots: Sequence[int], keep_S: np.ndarray) -> int:
        """Bring slots in for a later call, as far as others than `keep_S` (bool) can leave; returns how many came.

        Not for the thread that calls the kernel.
        """
        came = self._bring_unasked(layer, slots, keep_S, count=True)
        self.counts.prefetched += came
        return came

    def _bring_unasked(self, layer: int, slots: Sequence[int], keep_S: np.ndarray | None, count: bool) -> int:
        """`keep_S` None: into free places of the layer's share alone."""
        residency = self.residency
        with residency.changed:
            slots = [slot for slot in slots if self._may_come(layer, slot)]
            places, layers = residency.vacate(layer, len(slots), keep_S)
            told = residency.using and not self._compiled_call
            versions = [int(self.versions_LS[layer, slot]) for slot in slots]
        if not told and layers:
            self.places.await_calls(layers)
        pairs, as_of = [], []
        with residency.changed:
            for slot, place, version in zip(slots, places, versions, strict=False):
                if not residency.still_vacated(place):
                    continue
                if not self._may_come(layer, slot) or self.versions_LS[layer, slot] != version:
                    residency.leave(place)
                    continue
                residency.expect(layer, slot, place)
                pairs.append((slot, place))
                as_of.append(version)
        return self._copy(layer, pairs, as_of, unasked=count) if pairs else 0

    def _may_come(self, layer: int, slot: int) -> bool:
        residency = self.residency
        held = bool(self._loaded_LS[layer, slot])
        return held and not residency.is_in(layer, slot) and not residency.is_coming(layer, slot)

    def fill(self, slots: Iterable[tuple[int, int]]) -> None:
        """Bring in (layer, slot) in this order, as many as find places, in place of what is there. No call runs."""
        with self.residency.changed:
            for layer, slot in np.argwhere(self.residency.place_of_slot_LS >= 0).tolist():
                self.residency.drop(layer, slot)
        for layer, slot in slots:
            self._bring_unasked(layer, [slot], None, count=False)
        self._filled = True

    @property
    def hits(self) -> int:
        """Slots of calls that stood in a place when they were asked for."""
        return self.places.uses - self.counts.misses

    def before_close(self, end: Callable[[], None]) -> None:
        """Have `end` called, which ends a thread that brings slots in."""
        self._before_close.append(end)

    def close(self) -> None:
        """Give the backing back. No call and no copy follows."""
        while self._before_close:
            self._before_close.pop()()
        self._backing.close()


def _ranks(slots_N: torch.Tensor) -> torch.Tensor:
    """int32 [N]: the place of each pair in the order of slots, then rows."""
    order_N = np.argsort(slots_N.numpy(), kind="stable")
    ranks_N = np.empty(len(order_N), np.int32)
    ranks_N[order_N] = np.arange(len(order_N), dtype=np.int32)
    return torch.from_numpy(ranks_N)


def _of_slots(slots_U: np.ndarray, slots_N: torch.Tensor, num_slots: int) -> torch.Tensor:
    """bool [N]: the pairs whose slot is one of `slots_U`."""
    taken_S = np.zeros(num_slots, np.bool_)
    taken_S[slots_U] = True
    return torch.from_numpy(taken_S[slots_N.numpy()])


def _some(
    taken_N: torch.Tensor, row_offsets_M1: torch.Tensor, slots_N: torch.Tensor, weights_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some pairs of a call."""
    before_N1 = torch.zeros(len(slots_N) + 1, dtype=torch.int32)
    torch.cumsum(taken_N, 0, out=before_N1[1:], dtype=torch.int32)
    return before_N1[row_offsets_M1.long()], slots_N[taken_N], weights_N[taken_N]
