"""Rows in host memory, moved by C++ (native/router.h): one call sends a batch, one receives it.

Legend: T tokens, K top-k, E logical experts, R ranks, D hidden size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np
import torch

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.rows.base import DispatchPlan, RowBatch, RowMover
from experts.dispatch.rows.host_mover import HostRowMover
from experts.dispatch.rows.host_programs import choose_ranks_callback
from experts.dispatch.stats import RouterStats
from experts.native.library import data_plane
from experts.native.structs import NativeRouter
from experts.protocol.membership import Membership
from experts.protocol.wire import DTYPE_CODES
from experts.transports.base import RouterLink
from placement.rule.replica_choice import check_top_k

PACK_ONLY, POST, POST_AGAIN = range(3)  # router.h


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
        # Addresses cost more to look up than to keep.
        self._slots_LER: np.ndarray | None = None
        self._slots_address = self._slots_stride = 0
        self._staged_ids_TK: np.ndarray | None = None
        self._staged_addresses = (0, 0)

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
        if not _is_ready(x_TD, x_TD.dtype) or not (
            _is_ready(topk_ids_TK, torch.int32) and _is_ready(topk_weights_TK, torch.float32)
        ):
            return super().stage(layer, x_TD, topk_weights_TK, topk_ids_TK)
        ids_TK = self._staged_ids_TK = topk_ids_TK.numpy()
        self._staged_addresses = topk_ids_TK.data_ptr(), topk_weights_TK.data_ptr()
        return RowBatch(layer, x_TD, torch.empty_like(x_TD), ids_TK, topk_weights_TK.numpy())

    def send(self, batch: RowBatch, seq: int, slots_LER: np.ndarray) -> DispatchPlan | None:
        if not self._all_native:
            return None
        if slots_LER is not self._slots_LER:
            self._slots_LER, self._slots_address, self._slots_stride = (
                slots_LER, slots_LER.ctypes.data, slots_LER.strides[0],
            )  # fmt: skip
        slots_address = self._slots_address + batch.layer * self._slots_stride
        return self._write(batch, seq, slots_address, POST_AGAIN if batch.repeated else POST)

    def receive(self, batch: RowBatch, plan: DispatchPlan, seq: int, timeout_s: float) -> bool:
        if plan.unserved:
            return False
        num_tokens, y_address = len(plan.rank_TK), batch.y_TD.data_ptr()
        return bool(self._finish(self._address, seq, num_tokens, int(timeout_s * 1e9), int(batch.repeated), y_address))

    def plan_and_pack(self, batch: RowBatch, seq: int, slots_ER: np.ndarray) -> DispatchPlan:
        return self._write(batch, seq, slots_ER.ctypes.data, PACK_ONLY)

    def combine(self, batch: RowBatch, plan: DispatchPlan, answered_R: np.ndarray) -> None:
        num_tokens, y_address = len(plan.rank_TK), batch.y_TD.data_ptr()
        self._combine(self._address, num_tokens, answered_R.ctypes.data, int(batch.repeated), y_address)

    def _write(self, batch: RowBatch, seq: int, slots_address: int, post: int) -> DispatchPlan:
        ids_TK = batch.topk_ids_TK
        if ids_TK is self._staged_ids_TK:
            ids_address, weights_address = self._staged_addresses
        else:
            ids_address, weights_address = ids_TK.ctypes.data, batch.topk_weights_TK.ctypes.data
        plan = self._plan_of(len(ids_TK))
        plan.unserved = self._begin(
            self._address,
            batch.layer,
            seq,
            len(ids_TK),
            batch.x_TD.data_ptr(),
            ids_address,
            weights_address,
            slots_address,
            post,
        )
        return plan


def _is_ready(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether compiled code can read the tensor as it is."""
    return tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()
