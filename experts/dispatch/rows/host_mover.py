"""Rows in host memory: plan, pack and combine each in one compiled call for all links.

Legend: T tokens, K top-k, E logical experts, R ranks, L MoE layers, D hidden size, M rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.rows.base import DispatchPlan, RowBatch, RowMover
from experts.dispatch.rows.host_programs import combine, plan_and_pack, request_header
from experts.dispatch.stats import RouterStats
from experts.protocol.membership import Membership
from experts.protocol.wire import DTYPE_CODES, H_HINTS, H_LAYER, H_SEQ
from experts.transports.base import RouterLink


class HostRowMover(RowMover):
    """Plans on the host and leaves rows, replies and sums there; for float32 and bfloat16.

    Movers of tensors plan here too: the lengths of messages have to be known before anything is sent.
    """

    def __init__(
        self, shape: LayerShape, max_rows: int, membership: Membership, links: Mapping[int, RouterLink]
    ) -> None:
        """`max_rows` bounds the tokens of a batch; `links` are those of the ranks that answer."""
        placement = membership.placement
        num_ranks = placement.num_ranks
        self._row_bytes = shape.row_bytes
        self._dtype_code = DTYPE_CODES[shape.dtype]
        self._header = request_header(membership.epoch, shape.dtype, shape.hidden_size)
        self.wants_hints = any(link.wants_hints for link in links.values())
        self._num_nodes, self._node_of_rank_R = placement.num_nodes, placement.node_of_rank_R
        self._work_R = placement.work_R
        self._load_LR = np.zeros((shape.num_layers, num_ranks), np.int64)
        self._rows_in_messages = all(link.send_tensor is None for link in links.values())
        self._send_address_R = np.zeros(num_ranks, np.int64)
        self._reply_address_R = np.zeros(num_ranks, np.int64)
        for rank, link in links.items():
            self._send_address_R[rank] = link.send_buffer.ctypes.data
            self._reply_address_R[rank] = link.recv_buffer.ctypes.data
        self._scratch_D = np.zeros(shape.hidden_size, np.float32)
        self._whole_plan = DispatchPlan(
            rank_TK=np.zeros((max_rows, shape.top_k), np.int32),
            row_TK=np.zeros((max_rows, shape.top_k), np.int32),
            rows_R=np.zeros(num_ranks, np.int32),
            pairs_R=np.zeros(num_ranks, np.int32),
            nbytes_R=np.zeros(num_ranks, np.int64),
        )
        self._plan, self._plan_tokens = self._whole_plan, max_rows

    def hint(self, words: np.ndarray) -> None:
        self._header[H_HINTS:] = words

    def carry_over(self, before: RowMover) -> None:
        if isinstance(before, HostRowMover):
            shared = min(self._load_LR.shape[1], before._load_LR.shape[1])
            if self._load_LR.shape == before._load_LR.shape:
                self._load_LR = before._load_LR
            else:
                self._load_LR[:, :shared] = before._load_LR[:, :shared]

    def count_into(self, stats: RouterStats) -> None:
        """Nothing: it sends nothing by itself."""

    def forget(self, rank: int) -> None:
        self._send_address_R[rank] = self._reply_address_R[rank] = 0

    def stage(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> RowBatch:
        if self._rows_in_messages:
            x_TD = x_TD.cpu()
        x_TD = x_TD.contiguous()
        return RowBatch(layer, len(x_TD), x_TD, *self._routing(topk_ids_TK, topk_weights_TK))

    def plan_and_pack(self, batch: RowBatch, seq: int, slots_ER: np.ndarray) -> DispatchPlan:
        plan = self._plan_of(batch.num_tokens)
        header = self._header
        header[H_LAYER], header[H_SEQ] = batch.layer, seq
        plan.unserved = plan_and_pack(
            batch.x_TD.data_ptr(),
            self._row_bytes,
            batch.topk_ids_TK,
            batch.topk_weights_TK,
            slots_ER,
            self._node_of_rank_R,
            self._num_nodes,
            self._work_R,
            self._load_LR[batch.layer],
            self._send_address_R,
            header,
            self._rows_in_messages,
            plan.rank_TK,
            plan.row_TK,
            plan.rows_R,
            plan.pairs_R,
            plan.nbytes_R,
        )
        return plan

    def combine(self, batch: RowBatch, plan: DispatchPlan, answered_R: np.ndarray) -> None:
        combine(
            plan.rank_TK,
            plan.row_TK,
            answered_R,
            self._reply_address_R,
            self._dtype_code,
            self._scratch_D,
            batch.y_TD.data_ptr(),
            batch.repeated,
        )

    def add(self, batch: RowBatch, tokens_M: torch.Tensor, rows_MD: torch.Tensor) -> None:
        batch.y_TD[tokens_M] += rows_MD

    def _routing(self, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(int32 ids, float32 weights) in host memory; on a GPU each of the two copies waits for the device."""
        ids_TK = topk_ids_TK.to(torch.int32).contiguous().cpu().numpy()
        return ids_TK, topk_weights_TK.to(torch.float32).contiguous().cpu().numpy()

    def _plan_of(self, num_tokens: int) -> DispatchPlan:
        """The plan's memory for so many tokens. Decode steps repeat their size, so the latest views are kept."""
        if num_tokens != self._plan_tokens:
            whole = self._whole_plan
            rank_TK, row_TK = whole.rank_TK[:num_tokens], whole.row_TK[:num_tokens]
            self._plan = DispatchPlan(rank_TK, row_TK, whole.rows_R, whole.pairs_R, whole.nbytes_R)
            self._plan_tokens = num_tokens
        return self._plan
