"""Moves rows between a step's activations and the tensors of the links, by a plan that was made on the host.

Legend: T tokens, K top-k, R ranks, D hidden size, M rows of one rank's message.

Used where rows live on a device, and for dtypes that `plan.combine` does not know. On CUDA with triton the programs of
`experts.device` do it in one launch a direction; elsewhere torch does it rank by rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch


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
