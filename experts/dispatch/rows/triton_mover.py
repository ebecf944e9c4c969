"""RowMover in one launch a direction, for a plan that the host made.

Never run on a GPU by its authors: none was at hand. Checked in Triton's interpreter on the CPU.

Legend: T tokens, K top-k, R ranks, D hidden size.

Where a layer's host waits for the device: once, in `routing`, since the lengths of messages have to be known before
anything is sent. The plan goes back to the device in one copy that nobody waits for.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from experts.dispatch.rows import triton_programs
from experts.dispatch.rows.base import RowMover

BLOCK_D = 1024


def blocks_of(hidden_size: int) -> int:
    """Programs for a row."""
    return -(-hidden_size // BLOCK_D)


def address_table(tensors: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """int64 [ranks]: where each rank's tensor begins, 0 for ranks that have none. ValueError if not 16-aligned."""
    address_R = torch.zeros(max(tensors, default=-1) + 1, dtype=torch.int64)
    for rank, tensor in tensors.items():
        if tensor.data_ptr() % 16:
            raise ValueError(f"rows of rank {rank} begin at {tensor.data_ptr():#x}, expected a multiple of 16")
        address_R[rank] = tensor.data_ptr()
    return address_R


class TritonRowMover(RowMover):
    """Keeps pinned staging memory and its copies on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pin = device.type == "cuda"
        self._out = self._pair_of_buffers(0)
        self._plan = self._pair_of_buffers(0)
        self._plan_sent = torch.cuda.Event() if self._pin else None
        self._bound: list[Mapping[int, torch.Tensor]] = []
        self._send_address_R = self._recv_address_R = torch.zeros(0, dtype=torch.int64, device=device)
        self._plan_TK: tuple[torch.Tensor, torch.Tensor] | None = None

    def _pair_of_buffers(self, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 on the host and on the device."""
        host = torch.empty(words, dtype=torch.int32, pin_memory=self._pin and words > 0)
        return host, torch.empty(words, dtype=torch.int32, device=self._device)

    def routing(self, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        pairs = topk_ids_TK.numel()
        if self._out[0].numel() < 2 * pairs:
            self._out = self._pair_of_buffers(2 * pairs)
        host, staging = (buffer[: 2 * pairs] for buffer in self._out)
        staging[:pairs].view(topk_ids_TK.shape).copy_(topk_ids_TK)
        staging[pairs:].view(torch.float32).view(topk_ids_TK.shape).copy_(topk_weights_TK)
        host.copy_(staging, non_blocking=True)
        if self._pin:
            torch.cuda.current_stream(self._device).synchronize()  # the layer's one wait for the device
        words = host.numpy()
        shape = tuple(topk_ids_TK.shape)
        return words[:pairs].reshape(shape), words[pairs:].view(np.float32).reshape(shape)

    def bind(self, send_tensors: Mapping[int, torch.Tensor], recv_tensors: Mapping[int, torch.Tensor]) -> None:
        self._bound = [dict(send_tensors), dict(recv_tensors)]  # the programs know addresses only
        self._send_address_R = address_table(send_tensors).to(self._device)
        self._recv_address_R = address_table(recv_tensors).to(self._device)

    def pack(self, x_TD: torch.Tensor, rank_TK: np.ndarray, row_TK: np.ndarray) -> None:
        self._plan_TK = self._send_plan(rank_TK, row_TK)
        (num_tokens, top_k), D = rank_TK.shape, x_TD.shape[1]
        if num_tokens:
            triton_programs.pack_rows[(num_tokens * top_k, blocks_of(D))](
                x_TD, *self._plan_TK, self._send_address_R, x_TD.stride(0), D, K=top_k, BLOCK_D=BLOCK_D
            )

    def combine(
        self,
        rank_TK: np.ndarray,
        row_TK: np.ndarray,
        answered_R: np.ndarray,
        y_TD: torch.Tensor,
        sum_TD: torch.Tensor | None,
        accumulate: bool,
    ) -> None:
        (num_tokens, top_k), D = rank_TK.shape, y_TD.shape[1]
        if not num_tokens:
            return
        plan_TK = self._plan_TK
        answered_TK = (rank_TK >= 0) & answered_R[rank_TK]
        if plan_TK is None or not answered_TK[row_TK >= 0].all():
            plan_TK = self._send_plan(rank_TK, np.where(answered_TK, row_TK, np.int32(-1)))
            self._plan_TK = None  # that was its memory
        kept = y_TD if sum_TD is None else sum_TD  # never touched where nothing is kept
        triton_programs.combine_rows[(num_tokens, blocks_of(D))](
            *plan_TK, self._recv_address_R, kept, y_TD, y_TD.stride(0), kept.stride(0), D,
            ADD=accumulate and sum_TD is not None, KEEP=sum_TD is not None, K=top_k, BLOCK_D=BLOCK_D,
        )  # fmt: skip

    def _send_plan(self, rank_TK: np.ndarray, row_TK: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The plan on the device, in one copy."""
        pairs = rank_TK.size
        if self._plan_sent is not None:
            self._plan_sent.synchronize()  # the copy before this one has left the pinned memory, long since as a rule
        second = -(-pairs // 4) * 4  # 16 bytes: Triton compiles anew for addresses that are no multiple
        if self._plan[0].numel() < second + pairs:
            self._plan = self._pair_of_buffers(second + pairs)
        host, plan = (buffer[: second + pairs] for buffer in self._plan)
        words = host.numpy()
        words[:pairs], words[second:] = rank_TK.ravel(), row_TK.ravel()
        plan.copy_(host, non_blocking=True)
        if self._plan_sent is not None:
            self._plan_sent.record(torch.cuda.current_stream(self._device))
        return plan[:pairs], plan[second:]
