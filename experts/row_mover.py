"""Moves rows between a step's activations and the tensors of the links, by a plan that was made on the host.

Legend: T tokens, K top-k, R ranks, D hidden size, M rows of one rank's message.

Used where rows live on a device, and for dtypes that `plan.combine` does not know. On CUDA with triton the programs of
`experts.device` do it in one launch a direction; elsewhere torch does it rank by rank.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch

from experts.tensor_rows import add_rows, gather_rows, rows_in, tokens_of_rank


def routing_on_host(topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(int32 ids, float32 weights) in host memory; on a GPU each of the two copies waits for the device."""
    ids_TK = topk_ids_TK.to(torch.int32).contiguous().cpu().numpy()
    return ids_TK, topk_weights_TK.to(torch.float32).contiguous().cpu().numpy()


class RowMover(ABC):
    """One router's; a layer is packed and combined before the next one is packed."""

    @abstractmethod
    def bind(self, send_tensors: Mapping[int, torch.Tensor], recv_tensors: Mapping[int, torch.Tensor]) -> None:
        """Take the tensors (uint8) of a new epoch: by rank, where its rows are sent from and where they arrive."""

    def routing(self, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(int32 ids, float32 weights) in host memory, valid until the next call."""
        return routing_on_host(topk_ids_TK, topk_weights_TK)

    @abstractmethod
    def pack(self, x_TD: torch.Tensor, rank_TK: np.ndarray, row_TK: np.ndarray) -> None:
        """Put each rank's rows where they are sent from; the plan (int32) is as `plan_and_pack` wrote it."""

    @abstractmethod
    def combine(
        self,
        rank_TK: np.ndarray,
        row_TK: np.ndarray,
        answered_R: np.ndarray,
        y_TD: torch.Tensor,
        sum_TD: torch.Tensor | None,
        accumulate: bool,
    ) -> None:
        """y = sum of the partial rows of the ranks that answered (bool), accumulated in float32.

        `sum_TD` (float32, where given) gets the sum before it is rounded; with `accumulate` it is what the sum begins
        with. The plan must be the one that was packed last.
        """


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


def pick_row_mover(device: torch.device) -> RowMover:
    """The quickest mover that runs on `device`."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from experts.device.triton_mover import TritonRowMover

        return TritonRowMover(device)
    return TorchRowMover()
