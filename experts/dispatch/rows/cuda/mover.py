"""Rows on a GPU, moved by C++: a call fetches the routing, one plans, packs and posts, one waits and combines.

The host waits for the device twice a layer: for the routing decisions, since the lengths of messages have to be known
before anything is sent, and for the packed rows, since another process reads them. Nothing waits for the combined sums.
What is rare is left to `TorchRowMover`: another attempt, and pairs that no live rank can serve.

Legend: T tokens, K top-k, R ranks, D hidden size.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping

import numpy as np
import torch

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.rows.base import DispatchPlan, RowBatch, RowMover
from experts.dispatch.rows.cuda.driver import CALLS, CudaDriver, Driver, DriverError
from experts.dispatch.rows.native_mover import NativeRowMover
from experts.dispatch.rows.torch_mover import TorchRowMover, address_table
from experts.native.library import data_plane
from experts.native.structs import NativeDevice
from experts.protocol.membership import Membership
from experts.transports.base import RouterLink

logger = logging.getLogger(__name__)

UNIT_BYTES = 16  # of a row, device.h


class CudaRowMover(NativeRowMover, TorchRowMover):
    """For links that post and wait in compiled code and carry rows on one GPU."""

    def __init__(
        self,
        shape: LayerShape,
        max_rows: int,
        membership: Membership,
        links: Mapping[int, RouterLink],
        driver: Driver | None = None,
    ) -> None:
        """DriverError where the programs cannot be compiled; `driver` is CUDA's unless another one is given."""
        super().__init__(shape, max_rows, membership, links)
        library = data_plane()
        assert library is not None, "pick.py asks first"
        self._fetch = library.data_plane_fetch
        self._driver = driver = CudaDriver() if driver is None else driver
        self._torch_device = device = next(iter(self._send_tensors.values())).device
        self._top_k = shape.top_k
        pack, combine = driver.programs(device, shape.dtype)
        self._plan_words = self._pinned(2 * max_rows * shape.top_k + 4)
        plan_on_device = torch.empty(len(self._plan_words), dtype=torch.int32, device=device)
        addresses = [address_table(tensors).to(device) for tensors in (self._send_tensors, self._recv_tensors)]
        self._kept = plan_on_device, addresses  # what the struct points to
        self._device = NativeDevice(
            *driver.calls(), pack, combine, plan_on_device.data_ptr(), *(table.data_ptr() for table in addresses)
        )
        self._device_address = ctypes.addressof(self._device)
        self._router.device = self._device_address
        self._routing_words = self._pinned(0), self._pinned(0, torch.float32)
        self._routing_pairs = -1
        self._room_for_routing(max_rows * shape.top_k)
        self._plan_tokens = -1  # none of the memory that the base class made

    def carry_over(self, before: RowMover) -> None:
        super().carry_over(before)
        if isinstance(before, CudaRowMover):
            self._kept_before = before._kept  # the last layer's sums may still be on their way, on another stream

    def stage(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> RowBatch:
        device = self._torch_device
        ids_TK = topk_ids_TK.to(device, torch.int32).contiguous()  # no copies if they are so already
        weights_TK = topk_weights_TK.to(device, torch.float32).contiguous()
        x_TD = x_TD.contiguous()
        if x_TD.data_ptr() % UNIT_BYTES:
            x_TD = x_TD.clone()
        num_tokens = x_TD.shape[0]
        pairs = num_tokens * self._top_k
        if pairs != self._routing_pairs:
            self._room_for_routing(pairs)
        native = self._device
        native.stream = self._driver.stream(device)
        if pairs:
            self._check(self._fetch(self._device_address, ids_TK.data_ptr(), weights_TK.data_ptr(), pairs))
        addresses = x_TD.data_ptr(), native.host_ids, native.host_weights
        return RowBatch(layer, num_tokens, x_TD, *self._routing_views, addresses)

    def send(self, batch: RowBatch, seq: int, slots_LER: np.ndarray) -> DispatchPlan | None:
        if batch.repeated:
            return None
        plan = super().send(batch, seq, slots_LER)
        if plan is not None and plan.unserved < 0:
            self._check(-plan.unserved)
        return plan

    def receive(self, batch: RowBatch, plan: DispatchPlan, timeout_s: float) -> bool:
        if batch.repeated or plan.unserved:
            return False
        self._set_timeout(timeout_s)
        found = self._finish(self._address, batch.y_TD.data_ptr())
        if found < 0:
            self._check(-found)
        return found == 1

    def plan_and_pack(self, batch: RowBatch, seq: int, slots_ER: np.ndarray) -> DispatchPlan:
        return TorchRowMover.plan_and_pack(self, batch, seq, slots_ER)

    def combine(self, batch: RowBatch, plan: DispatchPlan, answered_R: np.ndarray) -> None:
        TorchRowMover.combine(self, batch, plan, answered_R)

    def _plan_of(self, num_tokens: int) -> DispatchPlan:
        """In pinned memory, both parts together: they reach the device in one copy."""
        if num_tokens != self._plan_tokens:
            pairs, whole = num_tokens * self._top_k, self._whole_plan
            second = -(-pairs // 4) * 4
            words, shape = self._plan_words.numpy(), (num_tokens, self._top_k)
            rank_TK, row_TK = words[:pairs].reshape(shape), words[second : second + pairs].reshape(shape)
            self._plan = DispatchPlan(rank_TK, row_TK, whole.rows_R, whole.pairs_R, whole.nbytes_R)
            self._router.rank_TK, self._router.row_TK = rank_TK.ctypes.data, row_TK.ctypes.data
            self._device.row_at = 4 * second
            self._plan_tokens = num_tokens
        return self._plan

    def _room_for_routing(self, pairs: int) -> None:
        """Pinned memory for the routing of so many pairs, and its views."""
        if pairs > len(self._routing_words[0]):
            weights = self._pinned(pairs, torch.float32)
            self._routing_words = self._pinned(pairs), weights
            self._device.host_ids, self._device.host_weights = (words.data_ptr() for words in self._routing_words)
        ids, weights = (words[:pairs].numpy().reshape(-1, self._top_k) for words in self._routing_words)
        self._routing_views, self._routing_pairs = (ids, weights), pairs

    def _pinned(self, words: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(max(words, 1), dtype=dtype, pin_memory=self._driver.pins_memory)

    def _check(self, error: int) -> None:
        if error:
            raise DriverError(f"CUDA's driver failed at {', '.join(CALLS)}: {self._driver.name_of(error)}")


def cuda_row_mover(
    shape: LayerShape, max_rows: int, membership: Membership, links: Mapping[int, RouterLink]
) -> CudaRowMover | None:
    """A mover for links that carry rows on a GPU; None, with the reason in the log, where compiled code cannot."""
    without = sorted({link.transport for link in links.values() if link.native is None})
    if without:
        logger.debug("%s links post and wait in Python, so their rows are moved from there", ", ".join(without))
        return None
    if data_plane() is None or shape.row_bytes % UNIT_BYTES:
        return None
    try:
        return CudaRowMover(shape, max_rows, membership, links)
    except DriverError as error:
        logger.warning("rows on the GPU are moved from Python, which is slower: %s", error)
        return None
