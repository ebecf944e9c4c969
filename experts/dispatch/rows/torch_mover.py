"""Pack and combine as torch operations, rank by rank; on any device and for any dtype.

Legend: T tokens, K top-k, R ranks, D hidden size, M rows of one rank's message.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from experts.dispatch.rows.base import RowMover
from experts.dispatch.rows.tensor_rows import add_rows, gather_rows, rows_in, tokens_of_rank


class TorchRowMover(RowMover):
    """torch operations, some for each rank; on any device."""

    def __init__(self) -> None:
        self._send_tensors: Mapping[int, torch.Tensor] = {}
        self._recv_tensors: Mapping[int, torch.Tensor] = {}

    def bind(self, send_tensors: Mapping[int, torch.Tensor], recv_tensors: Mapping[int, torch.Tensor]) -> None:
        self._send_tensors, self._recv_tensors = dict(send_tensors), dict(recv_tensors)

    def pack(self, x_TD: torch.Tensor, rank_TK: np.ndarray, row_TK: np.ndarray) -> None:
        for rank, tensor in self._send_tensors.items():
            tokens_M = tokens_of_rank(rank, rank_TK, row_TK, x_TD.device)
            if len(tokens_M):
                gather_rows(x_TD, tokens_M, rows_in(tensor, len(tokens_M), x_TD.shape[1], x_TD.dtype))

    def combine(
        self,
        rank_TK: np.ndarray,
        row_TK: np.ndarray,
        answered_R: np.ndarray,
        y_TD: torch.Tensor,
        sum_TD: torch.Tensor | None,
        accumulate: bool,
    ) -> None:
        if sum_TD is None:
            sum_TD = torch.zeros(y_TD.shape, dtype=torch.float32, device=y_TD.device)
        elif not accumulate:
            sum_TD.zero_()
        for rank in np.flatnonzero(answered_R).tolist():
            tokens_M = tokens_of_rank(rank, rank_TK, row_TK, y_TD.device)
            rows_MD = rows_in(self._recv_tensors[rank], len(tokens_M), y_TD.shape[1], y_TD.dtype)
            add_rows(sum_TD, tokens_M, rows_MD)
        y_TD.copy_(sum_TD)
