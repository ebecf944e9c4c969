"""Rows as tensors, rank by rank, on any device: rows that travel from a device, and dtypes that numba does not know.

Legend: T tokens, K top-k, E logical experts, R ranks, D hidden size, M rows of one rank's message.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.rows.base import DispatchPlan, RowBatch
from experts.dispatch.rows.host_mover import HostRowMover
from experts.protocol.membership import Membership
from experts.protocol.wire import HEADER_BYTES
from experts.transports.base import RouterLink


class TorchRowMover(HostRowMover):
    """The host's plan; torch operations pack and combine, a few for each rank. Sums stay in float32 to the end."""

    def __init__(
        self, shape: LayerShape, max_rows: int, membership: Membership, links: Mapping[int, RouterLink]
    ) -> None:
        super().__init__(shape, max_rows, membership, links)
        self._send_tensors = {rank: link.send_tensor for rank, link in links.items() if link.send_tensor is not None}
        self._recv_tensors = {
            rank: torch.from_numpy(link.recv_buffer[HEADER_BYTES:]) if link.recv_tensor is None else link.recv_tensor
            for rank, link in links.items()
        }

    def plan_and_pack(self, batch: RowBatch, seq: int, slots_ER: np.ndarray) -> DispatchPlan:
        plan = super().plan_and_pack(batch, seq, slots_ER)
        self._pack(batch, plan)
        return plan

    def combine(self, batch: RowBatch, plan: DispatchPlan, answered_R: np.ndarray) -> None:
        y_TD = batch.y_TD
        if batch.sum_TD is None:
            batch.sum_TD = torch.zeros(y_TD.shape, dtype=torch.float32, device=y_TD.device)
        for rank in np.flatnonzero(answered_R).tolist():
            tokens_M = _tokens_of(rank, plan, y_TD.device)
            rows_MD = _rows_in(self._recv_tensors[rank], len(tokens_M), y_TD)
            batch.sum_TD.index_add_(0, tokens_M, rows_MD.float())
        y_TD.copy_(batch.sum_TD)

    def add(self, batch: RowBatch, tokens_M: torch.Tensor, rows_MD: torch.Tensor) -> None:
        assert batch.sum_TD is not None, "rows are added after combine, which keeps the sums of incomplete batches"
        batch.sum_TD[tokens_M] += rows_MD.float()
        batch.y_TD[tokens_M] = batch.sum_TD[tokens_M].to(batch.y_TD.dtype)

    def _pack(self, batch: RowBatch, plan: DispatchPlan) -> None:
        """Copy each rank's rows to where they travel from, if that is not its message."""
        for rank, tensor in self._send_tensors.items():
            tokens_M = _tokens_of(rank, plan, batch.x_TD.device)
            if len(tokens_M):
                torch.index_select(batch.x_TD, 0, tokens_M, out=_rows_in(tensor, len(tokens_M), batch.x_TD))


def address_table(tensors: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """int64 [ranks]: address of each rank's tensor, 0 for ranks without one. ValueError if not 16-aligned."""
    address_R = torch.zeros(max(tensors, default=-1) + 1, dtype=torch.int64)
    for rank, tensor in tensors.items():
        if tensor.data_ptr() % 16:
            raise ValueError(f"rows of rank {rank} begin at {tensor.data_ptr():#x}, expected a multiple of 16")
        address_R[rank] = tensor.data_ptr()
    return address_R


def _tokens_of(rank: int, plan: DispatchPlan, device: torch.device) -> torch.Tensor:
    """The token of each row of a rank's message: int64 [M] on `device`."""
    return torch.from_numpy(np.nonzero((plan.rank_TK == rank) & (plan.row_TK >= 0))[0]).to(device, non_blocking=True)


def _rows_in(data: torch.Tensor, num_rows: int, like_TD: torch.Tensor) -> torch.Tensor:
    """The first `num_rows` rows [M, D] in the bytes `data` (uint8), of the dtype and width of `like_TD`; a view."""
    hidden_size, dtype = like_TD.shape[1], like_TD.dtype
    return data[: num_rows * hidden_size * dtype.itemsize].view(dtype).view(num_rows, hidden_size)
