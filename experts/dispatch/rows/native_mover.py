"""Rows in host memory, moved by C++ (native/router.h): one call sends a batch, one receives it.

Legend: T tokens, K top-k, E logical experts, R ranks, D hidden size.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping

import numpy as np
import torch

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.rows.base import DispatchPlan, RowBatch, RowMover
from experts.dispatch.rows.host_mover import HostRowMover
from experts.dispatch.rows.host_programs import choose_ranks_callback
from experts.dispatch.rows.torch_mover import TorchRowMover
from experts.dispatch.stats import RouterStats
from experts.native.library import data_plane
from experts.native.structs import NativeRouter
from experts.protocol.membership import Membership
from experts.protocol.wire import DTYPE_CODES
from experts.transports.base import RouterLink
from placement.rule.replica_choice import check_top_k

PACK_ONLY, POST, POST_AGAIN = range(3)  # router.h
_BATCH = struct.Struct(
    "@8q"
)  # the words of Router from `layer` on: one write costs less than eight arguments of a call


class NativeRowMover(HostRowMover):
    """HostRowMover in C++. Sends and receives by itself if all links have a compiled form too."""

    def __init__(
        self, shape: LayerShape, max_rows: int, membership: Membership, links: Mapping[int, RouterLink]
    ) -> None:
        super().__init__(shape, max_rows, membership, links)
        check_top_k(shape.top_k)
        library = data_plane()
        assert library is not None, "pick.py asks first"
        self._begin, self._finish, self._combine = (
            library.data_plane_begin,
            library.data_plane_finish,
            library.data_plane_combine,
        )
        num_ranks = membership.placement.num_ranks
        self._links = {rank: link.native for rank, link in links.items() if link.native is not None}
        self._all_native = len(self._links) == len(links)
        self._link_address_R = np.zeros(num_ranks, np.int64)
        for rank, native in self._links.items():
            self._link_address_R[rank] = ctypes.addressof(native)
        plan = self._whole_plan
        self._router = NativeRouter(
            num_ranks=num_ranks,
            top_k=shape.top_k,
            num_experts=shape.num_experts,
            hidden=shape.hidden_size,
            dtype=DTYPE_CODES[shape.dtype],
            num_nodes=self._num_nodes,
            choose_ranks=choose_ranks_callback.address,
            node_of_rank_R=self._node_of_rank_R.ctypes.data,
            work_R=self._work_R.ctypes.data,
            load_LR=self._load_LR.ctypes.data,
            header=self._header.ctypes.data,
            send_R=self._send_address_R.ctypes.data,
            recv_R=self._reply_address_R.ctypes.data,
            links_R=self._link_address_R.ctypes.data,
            rank_TK=plan.rank_TK.ctypes.data,
            row_TK=plan.row_TK.ctypes.data,
            rows_R=plan.rows_R.ctypes.data,
            pairs_R=plan.pairs_R.ctypes.data,
            nbytes_R=plan.nbytes_R.ctypes.data,
        )
        self._address = ctypes.addressof(self._router)
        self._batch_at = NativeRouter.layer.offset
        # Addresses cost more to look up than to keep.
        self._slots_LER: np.ndarray | None = None
        self._slots_address = self._slots_stride = 0
        self._timeout_s = -1.0

    def count_into(self, stats: RouterStats) -> None:
        router = self._router
        router.counts = ctypes.addressof(stats.native)
        router.shard_rows_R, router.shard_pairs_R = stats.shard_rows.ctypes.data, stats.shard_pairs.ctypes.data
        self._stats = stats, stats.shard_rows, stats.shard_pairs  # what the addresses point to

    def time_into(self, words: np.ndarray | None) -> None:
        self._router.times = None if words is None else words.ctypes.data

    def carry_over(self, before: RowMover) -> None:
        super().carry_over(before)
        self._router.load_LR = self._load_LR.ctypes.data

    def forget(self, rank: int) -> None:
        super().forget(rank)
        self._link_address_R[rank] = 0
        self._links.pop(rank, None)

    def stage(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> RowBatch:
        if not (
            topk_ids_TK.dtype is torch.int32
            and topk_weights_TK.dtype is torch.float32
            and x_TD.is_cpu
            and topk_ids_TK.is_cpu
            and topk_weights_TK.is_cpu
            and x_TD.is_contiguous()
            and topk_ids_TK.is_contiguous()
            and topk_weights_TK.is_contiguous()
        ):
            return super().stage(layer, x_TD, topk_weights_TK, topk_ids_TK)
        addresses = x_TD.data_ptr(), topk_ids_TK.data_ptr(), topk_weights_TK.data_ptr()
        return RowBatch(layer, x_TD.shape[0], x_TD, topk_ids_TK, topk_weights_TK, addresses)

    def send(self, batch: RowBatch, seq: int, slots_LER: np.ndarray) -> DispatchPlan | None:
        if not self._all_native:
            return None
        if slots_LER is not self._slots_LER:
            self._slots_LER, self._slots_address, self._slots_stride = (
                slots_LER, slots_LER.ctypes.data, slots_LER.strides[0],
            )  # fmt: skip
        slots_address = self._slots_address + batch.layer * self._slots_stride
        return self._write(batch, seq, slots_address, POST_AGAIN if batch.repeated else POST)

    def receive(self, batch: RowBatch, plan: DispatchPlan, timeout_s: float) -> bool:
        if plan.unserved:
            return False
        self._set_timeout(timeout_s)
        return bool(self._finish(self._address, batch.y_TD.data_ptr()))

    def _set_timeout(self, timeout_s: float) -> None:
        if timeout_s != self._timeout_s:
            self._timeout_s, self._router.timeout_ns = timeout_s, int(timeout_s * 1e9)

    def plan_and_pack(self, batch: RowBatch, seq: int, slots_ER: np.ndarray) -> DispatchPlan:
        return self._write(batch, seq, slots_ER.ctypes.data, PACK_ONLY)

    def combine(self, batch: RowBatch, plan: DispatchPlan, answered_R: np.ndarray) -> None:
        y_address = batch.y_TD.data_ptr()
        self._combine(self._address, batch.num_tokens, answered_R.ctypes.data, int(batch.repeated), y_address)

    def _write(self, batch: RowBatch, seq: int, slots_address: int, post: int) -> DispatchPlan:
        x, ids, weights = batch.addresses or (
            batch.x_TD.data_ptr(), batch.topk_ids_TK.ctypes.data, batch.topk_weights_TK.ctypes.data,
        )  # fmt: skip
        num_tokens = batch.num_tokens
        plan = self._plan if num_tokens == self._plan_tokens else self._plan_of(num_tokens)
        _BATCH.pack_into(
            self._router, self._batch_at, batch.layer, seq, num_tokens, x, ids, weights, slots_address, post
        )
        plan.unserved = self._begin(self._address)
        return plan


class NativeFloat16Mover(NativeRowMover):
    """The same for float16. A batch that takes several attempts is rare and left to torch: its sums stay in float32."""

    def __init__(
        self, shape: LayerShape, max_rows: int, membership: Membership, links: Mapping[int, RouterLink]
    ) -> None:
        super().__init__(shape, max_rows, membership, links)
        self._in_torch = TorchRowMover(shape, max_rows, membership, links)

    def receive(self, batch: RowBatch, plan: DispatchPlan, timeout_s: float) -> bool:
        return not batch.repeated and super().receive(batch, plan, timeout_s)

    def combine(self, batch: RowBatch, plan: DispatchPlan, answered_R: np.ndarray) -> None:
        self._in_torch.combine(batch, plan, answered_R)

    def add(self, batch: RowBatch, tokens_M: torch.Tensor, rows_MD: torch.Tensor) -> None:
        self._in_torch.add(batch, tokens_M, rows_MD)
